"""``distserve verify``: a plan started on this machine, its trace replayed, what was foretold beside what was measured.

The simulation and the run get the same requests at the same times. Prompts are made up to the trace's lengths. Before
the replay a few single requests tell how fast the machine is just now, beside its profile; that factor is part of the
prediction, and is told.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from distserve.core.types import Role
from distserve.launch.cluster import Cluster
from distserve.loadgen.client import Client, Record
from distserve.loadgen.http import Target
from distserve.loadgen.machine import CpuWatch, hardware, versions
from distserve.loadgen.run import Progress, open_loop, warm_up
from distserve.profiling import goodput
from distserve.profiling.goodput import Question, times
from distserve.profiling.prompts import Prompts
from distserve.sched.config import InstanceConfig
from distserve.wire.loop import run_loop
from distserve_planner import workload as workloads
from distserve_planner.latency.profile import Profile, read_profile
from distserve_planner.plan import Plan
from distserve_planner.refusal import CannotPlan
from distserve_planner.simulation.deployment import limits, open_door
from distserve_planner.simulation.result import SimulationResult, Slo
from distserve_planner.simulation.shared import Machine, simulate_shared
from distserve_planner.slo import SloClasses
from distserve_planner.workload import Job, Workload

_WARM_UP = 4
_TIMEOUT_S = 600.0
_ROUNDS = 6
_NEAR = 0.005
_PULSES, _PULSE_TOKENS, _APART_S = 6, 24, 30.0
Say = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Bounds:
    """``points`` of attainment (0 to 100), and the relative difference of the medians and of the goodput."""

    points: float = 5.0
    median: float = 0.15
    goodput: float = 0.25


@dataclass(frozen=True, slots=True)
class Figures:
    """One side of the comparison. ``within``: requests a second inside both limits at the rate of the run."""

    requests: int
    failed: int
    attainment: float
    ttft_p50_s: float
    ttft_p90_s: float
    tpot_p50_s: float
    tpot_p90_s: float
    within: float
    goodput: float | None = None

    @staticmethod
    def of(ttft: np.ndarray, tpot: np.ndarray, trial: Trial, rate: float) -> Figures:
        """``ttft``, ``tpot``: seconds a request, infinite where it failed."""
        good, several = np.isfinite(ttft), np.array([j.output > 1 for j in trial.workload.jobs])
        limits = trial.limits
        met = float(((ttft < limits[0]) & (tpot < limits[1])).mean())
        paces = tpot[several & good]
        return Figures(len(ttft), int((~good).sum()), met, *_marks(ttft[good]), *_marks(paces), rate * met)


def _marks(values: np.ndarray) -> tuple[float, float]:
    return (float(np.quantile(values, 0.5)), float(np.quantile(values, 0.9))) if len(values) else (0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Pulse:
    """How fast the machine is now, in times of its profile: seconds of single requests, measured over foretold."""

    prefill: float = 1.0
    decode: float = 1.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """The whole comparison. ``reasons`` are empty when the plan is accepted."""

    predicted: Figures
    measured: Figures
    reasons: tuple[str, ...]
    document: dict[str, Any]
    pulse: Pulse = Pulse()

    @property
    def accepted(self) -> bool:
        return not self.reasons


@dataclass(frozen=True, slots=True)
class Trial:
    """What is started and replayed. ``arguments`` are of ``distserve serve``; ``model`` gives prompts their words."""

    plan: Plan
    machine: Machine
    workload: Workload
    classes: SloClasses
    model: str
    arguments: tuple[str, ...]
    bounds: Bounds = Bounds()
    seed: int = 1
    goodput: bool = False
    pulse: bool = True  # whether the profile is first brought to the machine's speed of the moment

    @property
    def slo(self) -> Slo:
        """The loosest of the classes."""
        return self.classes.loosest

    @property
    def question(self) -> Question:
        """Its requests and limits at any rate."""
        return Question(self.workload, self.classes)

    @property
    def limits(self) -> tuple[np.ndarray, np.ndarray]:
        """[n] TTFT and [n] TPOT limits of the requests, seconds."""
        return self.classes.limits(self.classes.kinds(self.workload.jobs))


# ── what a plan asks for ─────────────────────────────────────────────────────────────────────────────────────────────


def beside(path: str, plan_path: Path) -> Path:
    """A file that a plan names: as given, or else beside the plan."""
    given = Path(path)
    return given if given.exists() or given.is_absolute() else plan_path.parent / given


def check_here(plan: Plan) -> None:
    """Raises CannotPlan for a plan that is not of one machine without GPUs."""
    if any(each.tp * each.pp > 1 or each.gpu != "cpu" for each in plan.instances):
        raise CannotPlan("this plan is of GPUs or of several ranks an instance; verify it where it is to run")


def machine_of(plan: Plan, profile: Profile) -> Machine:
    """The plan's instances on the profiled machine. Raises CannotPlan or OutOfRange when it is not such a plan."""
    check_here(plan)
    tokens = min(each.kv_tokens for each in plan.instances)
    patient = limits(InstanceConfig().batching, batch=1, mixed=1, chunk=1, sequences=1, headroom=0.0)
    roles = tuple(Role(role) for role in plan.roles)
    return Machine(profile, roles, plan.batching.onto(patient), tokens, cluster=open_door(plan.overflow_prefill_tokens))


def workload_of(
    plan: Plan, plan_path: Path, trace: Path | None, rate: float | None, duration_s: float, seed: int
) -> Workload:
    """The plan's trace, or another, at its rate, cut to a duration. Raises CannotPlan."""
    if trace is None and not plan.trace:
        if not plan.load.name.startswith("constant:"):
            raise CannotPlan(f"the plan names no trace (its load is {plan.load.name}); give one with --trace FILE")
        found = workloads.named(plan.load.name, max(2, math.ceil((rate or plan.load.rate) * duration_s)), seed)
    else:
        found = workloads.read(trace if trace is not None else beside(plan.trace, plan_path))
    jobs = sorted(found.jobs, key=lambda j: j.arrival_s)
    found = replace(found, jobs=tuple(jobs))
    if found.span_s:
        found = found.at_rate(rate or plan.load.rate)
    first = found.jobs[0].arrival_s
    kept = tuple(replace(j, arrival_s=j.arrival_s - first) for j in found.jobs if j.arrival_s - first <= duration_s)
    return replace(found, jobs=kept)


# ── the comparison ───────────────────────────────────────────────────────────────────────────────────────────────────


def verify(trial: Trial, say: Say) -> Verdict:
    """Foretell, run, compare. Raises CannotPlan, OutOfRange, ClusterFailed, or VerifyFailed with a sentence."""
    say("simulating", 0.0)
    rate = trial.workload.rate if math.isfinite(trial.workload.rate) else 0.0
    result = simulate_shared(trial.machine, trial.workload)
    as_profiled = Figures.of(result.ttft_s(), result.tpot_s(), trial, rate)
    say("starting the plan", 0.05)
    with Cluster([*trial.arguments, "--model-name", "verified"]) as cluster:
        client = Client(Target.parse(cluster.http_url), "verified", timeout_s=_TIMEOUT_S, count_empty=True)
        pulse = run_loop(feel_pulse(client, trial)) if trial.pulse else Pulse()
        trial = at_pulse(trial, pulse)
        result = simulate_shared(trial.machine, trial.workload)
        predicted = Figures.of(result.ttft_s(), result.tpot_s(), trial, rate)
        if trial.goodput:
            say("foretelling the goodput", 0.1)
            predicted = replace(predicted, goodput=goodput.told(trial.question, trial.machine))
        watch = CpuWatch(tuple(cluster.ready["pids"]))
        records, found_goodput = run_loop(_run(client, trial, say))
        cores = watch.stop()
    ttft, tpot = times(records)
    measured = replace(Figures.of(ttft, tpot, trial, rate), goodput=found_goodput)
    reasons = tuple(judge(predicted, measured, trial.bounds))
    document = _document(trial, result, records, predicted, measured, reasons, cores)
    document |= {"pulse": asdict(pulse), "predicted_as_profiled": asdict(as_profiled)}
    return Verdict(predicted, measured, reasons, document, pulse)


async def feel_pulse(client: Client, trial: Trial) -> Pulse:
    """A few single requests on the idle cluster: a shared machine is not always as fast as when it was profiled.

    Raises VerifyFailed.
    """
    lengths = trial.workload.lengths()
    prompt = int(np.median(lengths[:, 0]))
    jobs = tuple(Job(prompt, _PULSE_TOKENS, i * _APART_S) for i in range(_PULSES))
    told = simulate_shared(trial.machine, Workload(jobs))
    prompts = Prompts(trial.model, trial.seed + 1)
    records = [await client.send(prompts.ask(prompt, _PULSE_TOKENS)) for _ in range(_PULSES + 2)][2:]
    if error := next((r.error for r in records if not r.ok), ""):
        raise VerifyFailed(f"the plan was started, but a single request failed: {error}")
    ttft, tpot = times(records)
    return Pulse(float(np.median(ttft) / np.median(told.ttft_s())), float(np.median(tpot) / np.median(told.tpot_s())))


def at_pulse(trial: Trial, pulse: Pulse) -> Trial:
    """The trial on a machine of that speed."""
    profile = trial.machine.profile
    live = replace(
        profile.live,
        prefill_scale=profile.live.prefill_scale * pulse.prefill,
        decode_scale=profile.live.decode_scale * pulse.decode,
    )
    return replace(trial, machine=replace(trial.machine, profile=replace(profile, live=live)))


class VerifyFailed(RuntimeError):
    """The plan was started and could not be asked; the text is for the user."""


async def _run(client: Client, trial: Trial, say: Say) -> tuple[list[Record], float | None]:
    prompts = Prompts(trial.model, trial.seed)
    asks = [prompts.ask(j.prompt, j.output, j.arrival_s) for j in trial.workload.jobs]
    if error := await warm_up(client, iter([prompts.ask(64, 8) for _ in range(_WARM_UP)]), _WARM_UP):
        raise VerifyFailed(f"the plan was started, but a warm-up request failed: {error}")
    share = 0.4 if trial.goodput else 0.9
    progress = Progress(changed=lambda p: say(f"replaying {p.done}/{p.total}", 0.1 + share * p.done / max(1, p.total)))
    records, _ = await open_loop(client, asks, progress)
    return records, await goodput.measured(trial.question, client, prompts, say) if trial.goodput else None


def judge(predicted: Figures, measured: Figures, bounds: Bounds) -> Iterable[str]:
    """What is out of bounds, each in words."""
    if measured.failed:
        yield f"{measured.failed} of {measured.requests} requests failed"
    points = 100 * (predicted.attainment - measured.attainment)
    if abs(points) > bounds.points + 1e-9:
        yield f"attainment is off by {points:+.1f} points (bound {bounds.points:g})"
    for name in ("ttft", "tpot"):
        told, seen = getattr(predicted, f"{name}_p50_s"), getattr(measured, f"{name}_p50_s")
        if seen and abs(told / seen - 1) > bounds.median:
            yield f"median {name.upper()} is off by {told / seen - 1:+.0%} (bound {bounds.median:.0%})"
    if predicted.goodput is not None and measured.goodput is not None:
        if not measured.goodput:
            yield f"no rate met the targets, and a goodput of {predicted.goodput:.2f} req/s was foretold"
        elif abs(predicted.goodput / measured.goodput - 1) > bounds.goodput:
            off = predicted.goodput / measured.goodput - 1
            yield f"goodput is off by {off:+.0%} (bound {bounds.goodput:.0%})"


# ── results ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _document(
    trial: Trial,
    result: SimulationResult,
    records: Sequence[Record],
    predicted: Figures,
    measured: Figures,
    reasons: Sequence[str],
    cores: dict[str, float],
) -> dict[str, Any]:
    profile = trial.machine.profile
    rows = [
        {
            "prompt": t.prompt,
            "output": t.output,
            "arrival_s": round(t.arrival, 4),
            "predicted_ms": [_ms(t.ttft_s), _ms(t.tpot_s)],
            "measured_ms": [_ms(r.ttft_s), _ms(r.tpot_s)] if r.ok else None,
        }
        for t, r in zip(result.trails, records, strict=True)
    ]
    return {
        "kind": "measured",
        "accepted": not reasons,
        "reasons": list(reasons),
        "bounds": asdict(trial.bounds),
        "slo": {"ttft_s": trial.slo.ttft_s, "tpot_s": trial.slo.tpot_s, "attainment": trial.slo.attainment},
        "classes": _classes(trial, result, records) if trial.classes.several else {},
        "instances": [str(role) for role in trial.machine.roles],
        "rate": trial.workload.rate if math.isfinite(trial.workload.rate) else None,
        "predicted": asdict(predicted),
        "measured": asdict(measured),
        "profile": {"model": profile.model, "dtype": profile.dtype, "when": profile.about.get("when", "")},
        "errors": sorted({r.error for r in records if r.error})[:5],
        "cores": cores,
        "when": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": versions(),
        "hardware": hardware(),
        "requests": rows,
    }


def _classes(trial: Trial, result: SimulationResult, records: Sequence[Record]) -> dict[str, Any]:
    """Attainment of each class, foretold and measured."""
    kinds, (most_ttft, most_tpot) = trial.classes.kinds(trial.workload.jobs), trial.limits
    ttft, tpot = times(records)
    told = trial.classes.shares(trial.classes.met(result, kinds), kinds)
    seen = trial.classes.shares((ttft < most_ttft) & (tpot < most_tpot), kinds)
    return {
        a.name: {"requests": a.requests, "target": a.target, "predicted": a.attainment, "measured": b.attainment}
        for a, b in zip(told, seen, strict=True)
    }


def _ms(seconds: float) -> float | None:
    return round(seconds * 1e3, 3) if math.isfinite(seconds) else None


# ── recalibration ────────────────────────────────────────────────────────────────────────────────────────────────────


def recalibrated(trial: Trial, measured: Figures) -> Profile:
    """The profile with its prompt and decode times scaled until the medians that it foretells are the measured ones.

    Raises CannotPlan when there is nothing to go by.
    """
    if not measured.ttft_p50_s:
        raise CannotPlan("no request was answered, so there is nothing to recalibrate by")
    profile = trial.machine.profile
    for _ in range(_ROUNDS):
        result = simulate_shared(replace(trial.machine, profile=profile), trial.workload)
        told = Figures.of(result.ttft_s(), result.tpot_s(), trial, 0.0)
        prefill = measured.ttft_p50_s / told.ttft_p50_s
        decode = measured.tpot_p50_s / told.tpot_p50_s if told.tpot_p50_s and measured.tpot_p50_s else 1.0
        live = profile.live
        scaled = replace(
            live, prefill_scale=live.prefill_scale * math.sqrt(prefill), decode_scale=live.decode_scale * decode
        )
        profile = replace(profile, live=scaled)
        if abs(prefill - 1) < _NEAR and abs(decode - 1) < _NEAR:
            break
    about = {**profile.about, "recalibrated": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    return replace(profile, about=about)


def read_for(plan: Plan, plan_path: Path, profile: str) -> Profile:
    """The profile a plan was made with, or another. Raises CannotPlan."""
    if not profile and not plan.profile:
        raise CannotPlan("the plan names no profile of this machine; make one with `distserve profile`, give --profile")
    return read_profile(Path(profile) if profile else beside(plan.profile, plan_path))


def serve_arguments(plan_path: Path, model: str, tokenizer: str) -> tuple[str, ...]:
    """Of ``distserve serve`` for a plan."""
    found = ["--plan", str(plan_path), "--log-level", "error"]
    found += ["--model", model] if model else []
    return tuple([*found, "--tokenizer", tokenizer] if tokenizer else found)
