"""Trials by simulation: what a unit's requests see at a rate, and the bounds that spare a trial.

The bridge from candidates to ``simulate``: latency models of shapes, deployments of units, links between instances. One
phase alone is a unit too: a prefill-only one answers one token, a decode-only one gets its prompts computed in no time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from distserve.core.types import Role
from distserve.sched.config import InstanceConfig
from distserve_planner.cluster import Cluster, Pod
from distserve_planner.latency.base import LatencyModel, OutOfRange
from distserve_planner.latency.fitted import FittedModel
from distserve_planner.latency.operators import OperatorLatency, engine_named
from distserve_planner.latency.profile import read_profile
from distserve_planner.latency.profiled import ALONE, ProfiledModel, within
from distserve_planner.memory import DEFAULT_RULE, MemoryRule
from distserve_planner.models import ModelFacts
from distserve_planner.selection.bounds import Requests, decode_work, prefill_work, rate_by_work, rate_md1, share_within
from distserve_planner.selection.candidates import Shape, Unit
from distserve_planner.selection.rates import Outcome
from distserve_planner.simulation.deployment import Deployment, InstanceSpec, instance, on_ports, policy
from distserve_planner.simulation.result import SimulationResult, Slo
from distserve_planner.simulation.run import simulate
from distserve_planner.simulation.shared import Machine, Settled, settle
from distserve_planner.slo import SloClasses
from distserve_planner.workload import Workload

_LINK_SHARE = 0.9
LINK_LATENCY_S = 50e-6  # one hand-off's first byte: a rendezvous and a kernel launch at each end
_INSTANT_S = 1e-9
_NO_LIMIT = 1e15
_POWERS = tuple(1 << power for power in range(12))


class LatencySource(Protocol):
    """Makes the latency model of a shape. Raises OutOfRange where it has no data."""

    def of(self, shape: Shape) -> LatencyModel: ...


@dataclass(frozen=True, slots=True)
class FromTables:
    """The operator model (``latency.operators``), extrapolation held and told."""

    model: ModelFacts
    engine: str = "vllm"
    dtype: str = "bf16"
    rule: MemoryRule = DEFAULT_RULE

    def of(self, shape: Shape) -> LatencyModel:
        engine = engine_named(self.engine)
        return OperatorLatency(
            self.model, shape.gpu, shape.tp, shape.pp, dtype=self.dtype, engine=engine, rule=self.rule, hold=True
        )


@dataclass(frozen=True, slots=True)
class FromFit:
    """DistServe's fitted coefficients (``latency.fitted``); only the TP degrees that were fitted."""

    profile: str
    model: str

    def of(self, shape: Shape) -> LatencyModel:
        return FittedModel(self.profile, self.model, shape.tp, shape.pp)


@dataclass(frozen=True, slots=True)
class FromProfile:
    """This machine's own measurements (``latency.profiled``): of an instance alone, which no crowded one beats, for
    bounds and phases; whole units are simulated as they share the machine (``simulation.shared``)."""

    path: str
    digest: str = ""  # of the file: measured anew, it is another question

    def of(self, shape: Shape) -> LatencyModel:
        return ProfiledModel(read_profile(self.path), shape.tp, shape.pp, beside=ALONE)


@dataclass(frozen=True, slots=True)
class InstantPrefill:
    """A ``LatencyModel`` that prefills in no time into endless memory: the feeder of a decode-only trial."""

    kv_bytes: float
    name: str = "instant prefill"
    stages: int = 1
    kv_capacity_tokens: int = 1 << 28
    uncertainty: float = 0.0

    @property
    def kv_bytes_per_token(self) -> float:
        return self.kv_bytes

    def step_s(self, chunks: Sequence[tuple[int, int]], decodes: int, decode_context: int) -> float:
        return _INSTANT_S

    def decode_s(self, batch: int, context: int) -> float:
        return _INSTANT_S


@dataclass(slots=True)
class SimulatedTrials:
    """``workload`` is the base of every trial: its lengths and arrivals, stretched to the rate. ``policies``: names of
    the batching limits for disaggregated and, by default, for mixed instances.
    """

    cluster: Cluster
    latency: LatencySource
    workload: Workload
    slo: Slo
    policy: str = "chunked"
    mixed_latency: LatencySource | None = None
    classes: SloClasses | None = None
    _of_class: np.ndarray | None = None
    _models: dict[tuple[Shape, bool], LatencyModel] = field(default_factory=dict)
    _bounds: dict[Unit, float] = field(default_factory=dict)
    _requests: Requests | None = None

    def model(self, shape: Shape, mixed: bool = False) -> LatencyModel:
        """The shape's latencies, as a mixed instance if ``mixed``. Raises OutOfRange."""
        other = mixed and self.mixed_latency is not None
        if (shape, other) not in self._models:
            source = self.mixed_latency if other and self.mixed_latency is not None else self.latency
            self._models[shape, other] = source.of(shape)
        return self._models[shape, other]

    @property
    def models(self) -> dict[Shape, LatencyModel]:
        """Those that were asked for."""
        return {shape: model for (shape, _), model in self._models.items()}

    def trial(self, unit: Unit, rate: float) -> Outcome:
        """Simulates ``unit`` at ``rate`` requests a second."""
        ttft, tpot = self.judged(self.run(unit, rate).result)
        if unit.prefill is None and unit.mixed is None:
            ttft = np.ones_like(ttft)
        return self.outcome(ttft, tpot)

    def judged(self, result: SimulationResult) -> tuple[np.ndarray, np.ndarray]:
        """[n] whether each request kept its TTFT limit, and its TPOT limit."""
        if self.classes is None:
            return result.ttft_s() < self.slo.ttft_s, result.tpot_s() < self.slo.tpot_s
        ttft, tpot = self.classes.limits(self._kinds())
        return result.ttft_s() < ttft, result.tpot_s() < tpot

    def outcome(self, ttft: np.ndarray, tpot: np.ndarray) -> Outcome:
        """With the classes, if there are several."""
        if self.classes is None:
            return Outcome(ttft, tpot)
        return Outcome(ttft, tpot, self._kinds(), tuple(c.slo.attainment for c in self.classes.classes))

    def _kinds(self) -> np.ndarray:
        assert self.classes is not None
        if self._of_class is None:
            self._of_class = self.classes.kinds(self.workload.jobs)
        return self._of_class

    def run(self, unit: Unit, rate: float, deployment: Deployment | None = None) -> Settled:
        """The whole simulation at ``rate``, on given links if a deployment is given."""
        asked = self._asked(unit).at_rate(rate)
        if (machine := self.machine(unit)) is not None:
            return settle(machine, asked)
        deployment = deployment or self.deployment(unit)
        return Settled(deployment, asked, simulate(deployment, asked))

    def machine(self, unit: Unit) -> Machine | None:
        """The profiled machine that the unit's instances share, when its latencies are of one."""
        roles = [role for _, count, role in _roles(unit) for _ in range(count)]
        model = self.model(next(unit.parts())[0], unit.colocated)
        if not isinstance(model, ProfiledModel) or not unit.serves:
            return None
        return Machine(model.profile, tuple(roles), self.limits(unit))

    def limits(self, unit: Unit) -> InstanceConfig:
        """Batching limits of the unit's instances; never beyond what a profile measured."""
        found = policy(unit.policy or self.policy)
        model = self.model(next(unit.parts())[0], unit.colocated)
        return within(model.profile, found) if isinstance(model, ProfiledModel) else found

    def _asked(self, unit: Unit) -> Workload:
        """The base workload; a prefill-only unit is asked for one token each."""
        if unit.decode is not None or unit.mixed is not None:
            return self.workload
        return replace(self.workload, jobs=tuple(replace(j, output=1) for j in self.workload.jobs))

    # ── deployments ──────────────────────────────────────────────────────────────────────────────────────────────────

    def deployment(self, unit: Unit) -> Deployment:
        """The unit on ports of equal bandwidth: its node's fabric when it is on one node, else the network."""
        if unit.mixed is None and unit.prefill is None:
            specs = self._fed(unit)
            return on_ports(specs, _NO_LIMIT)
        return on_ports(self.specs(unit), self.kv_bytes_s(unit), LINK_LATENCY_S)

    def specs(self, unit: Unit) -> list[InstanceSpec]:
        """One spec an instance: prefill ones, then decode, then mixed."""
        limits = self.limits(unit)
        if unit.decode is None and unit.mixed is None:  # a prefill phase alone: one instance that also ends the request
            assert unit.prefill is not None
            return [instance(Role.MIXED, self.model(unit.prefill), limits)] * unit.n_prefill
        found: list[InstanceSpec] = []
        for shape, count, role in _roles(unit):
            found += [instance(role, self.model(shape, role is Role.MIXED), limits)] * count
        return found

    def _fed(self, unit: Unit) -> list[InstanceSpec]:
        assert unit.decode is not None
        limits, model = self.limits(unit), self.model(unit.decode)
        feeder = replace(limits, max_batch_tokens=1 << 30, max_sequences=1 << 20, prefill_chunk=1 << 30)
        decode = instance(Role.DECODE, model, limits)
        return [instance(Role.PREFILL, InstantPrefill(model.kv_bytes_per_token), feeder), *[decode] * unit.n_decode]

    def kv_bytes_s(self, unit: Unit) -> float:
        """What one instance's port carries, one direction."""
        shapes = [shape for shape, _ in unit.parts()]
        network = min(node.network_bytes_s for node in self.cluster.nodes)
        near = unit.one_node or unit.gpus <= min(self.cluster.widest(s.gpu) for s in shapes)
        if len({s.gpu for s in shapes}) > 1 or not near or self.cluster.pod is Pod.INSTANCE:
            return _LINK_SHARE * network
        ports = min(shape.tp for shape in shapes)
        return _LINK_SHARE * ports * min(s.gpu.nvlink_bytes_s or s.gpu.pcie_bytes_s for s in shapes)

    # ── bounds ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def bound(self, unit: Unit) -> float:
        """No higher rate meets the target (``bounds``); 0 when the latency limits cannot be met at any rate.

        Infinite where the latency model declines to say: a trial then tells.
        """
        if unit not in self._bounds:
            try:
                self._bounds[unit] = self._bound(unit)
            except OutOfRange:
                self._bounds[unit] = math.inf
        return self._bounds[unit]

    def _bound(self, unit: Unit) -> float:
        limits = self.limits(unit)
        asked, share = self.requests(), self.slo.attainment
        prompts, outputs = asked.prompt.tolist(), asked.output.tolist()
        rates = []
        for shape, count, prefills, decodes in _kinds(unit):
            model = self.model(shape, unit.colocated)
            if prefills and self.fastest_ttft(shape, share, unit.colocated) >= self.slo.ttft_s:
                return 0.0
            if decodes and self.fastest_tpot(shape, share, unit.colocated) >= self.slo.tpot_s:
                return 0.0
            work, latest = np.zeros(len(prompts)), self.slo.ttft_s
            if prefills:
                work = work + prefill_work(model, prompts, limits.max_batch_tokens)
            if decodes:
                held = model.kv_capacity_tokens
                work = work + decode_work(model, prompts, outputs, held, limits.max_sequences)
                latest += float(max(outputs)) * self.slo.tpot_s
            rates.append(rate_by_work(work, asked, share, count, latest))
        return min(rates)

    def guess(self, unit: Unit) -> float:
        """By the paper's formulas: the rate at which one device's mean TTFT comes to half its limit (M/D/1, mean work),
        and the rate that keeps decode batches within the TPOT limit (Little's law).
        """
        asked = self.requests()
        prompt, output = float(asked.prompt.mean()), float(asked.output.mean())
        rates = []
        for shape, count, prefills, decodes in _kinds(unit):
            model = self.model(shape, unit.colocated)
            if prefills:
                work = model.step_s([(max(1, int(prompt)), 0)], 0, 0)
                rates.append(count * max(rate_md1(work, self.slo.ttft_s / 2), 0.1 / work))
            if decodes and output > 1:
                context = prompt + output / 2
                most = max(1, int(min(model.kv_capacity_tokens / context, self.limits(unit).max_sequences)))
                fitting = [b for b in _POWERS if b <= most and self._step(model, b, context) <= self.slo.tpot_s]
                batch = max(fitting, default=1)
                rates.append(0.8 * count * batch / (self._step(model, batch, context) * (output - 1)))
        rate = min(rates, default=1.0)
        return rate / 2 if unit.colocated else rate

    @staticmethod
    def _step(model: LatencyModel, batch: int, context: float) -> float:
        try:
            return model.decode_s(batch, int(batch * context))
        except OutOfRange:
            return math.inf

    def fastest_ttft(self, shape: Shape, share: float, mixed: bool = False) -> float:
        """The TTFT that ``share`` of the requests meet on an idle instance: prefill alone, through every stage."""
        model = self.model(shape, mixed)
        prompt = int(np.quantile(self.requests().prompt, share, method="lower"))
        return model.stages * model.step_s([(prompt, 0)], 0, 0)

    def fastest_tpot(self, shape: Shape, share: float, mixed: bool = False) -> float:
        """The TPOT that ``share`` of the requests meet on an idle instance."""
        model = self.model(shape, mixed)
        context = int(np.quantile(self.requests().prompt, 1 - share, method="lower")) + 1
        answers_of_one = share_within(self.requests().output.astype(np.float64), 2)
        return 0.0 if answers_of_one >= share else model.stages * model.decode_s(1, context)

    def requests(self) -> Requests:
        if self._requests is None:
            jobs = sorted(self.workload.at_rate(1.0).jobs, key=lambda job: job.arrival_s)
            self._requests = Requests(
                np.array([job.prompt for job in jobs]),
                np.array([job.output for job in jobs]),
                np.array([job.arrival_s for job in jobs]),
            )
        return self._requests


def _roles(unit: Unit) -> Iterator[tuple[Shape, int, Role]]:
    """(shape, instances, role), prefill first, then decode, then mixed."""
    kinds = ((unit.prefill, unit.n_prefill, Role.PREFILL), (unit.decode, unit.n_decode, Role.DECODE))
    for shape, count, role in (*kinds, (unit.mixed, unit.n_mixed, Role.MIXED)):
        if shape is not None and count:
            yield shape, count, role


def _kinds(unit: Unit) -> Iterator[tuple[Shape, int, bool, bool]]:
    """(shape, instances, prefills, decodes) of each kind of instance."""
    roles = ((unit.prefill, unit.n_prefill, True, False), (unit.decode, unit.n_decode, False, True))
    for shape, count, prefills, decodes in (*roles, (unit.mixed, unit.n_mixed, True, True)):
        if shape is not None and count:
            yield shape, count, prefills, decodes
