"""A plan's instances under any roles, simulated with recorded traffic: what ``propose`` asks.

The bridge from a plan to the simulator. A plan made with a profile of this machine is simulated with it; one of GPUs
with the latencies it was made with, on ports of the slowest link it names.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np

from distserve.core.types import Role
from distserve.sched.config import ClusterConfig, InstanceConfig
from distserve_planner.latency.base import LatencyModel, OutOfRange
from distserve_planner.latency.profile import Profile
from distserve_planner.latency.source import default_policy, is_file, latency_model, profile_for
from distserve_planner.plan import Plan
from distserve_planner.refusal import CannotPlan
from distserve_planner.simulation.deployment import InstanceSpec, instance, on_ports, open_door, policy
from distserve_planner.simulation.result import SimulationResult
from distserve_planner.simulation.run import simulate
from distserve_planner.simulation.shared import Machine, simulate_shared
from distserve_planner.slo import classes_of
from distserve_planner.workload import Workload

KV_BYTES_S = 25e9
"""What a port carries when the plan names no link: a 200 Gb/s network card."""


@dataclass(frozen=True, slots=True)
class Running:
    """``profile`` as for ``distserve simulate``; ``tables`` alone: of the GPU each instance has."""

    plan: Plan
    workload: Workload
    profile: str

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(each.id for each in self.plan.instances)

    @property
    def roles(self) -> tuple[Role, ...]:
        return tuple(Role(each.role) for each in self.plan.instances)

    @property
    def kinds(self) -> tuple[Hashable, ...]:
        return tuple((each.gpu, each.tp, each.pp, each.kv_tokens) for each in self.plan.instances)

    def met(self, roles: tuple[Role, ...]) -> np.ndarray:
        """Whether each request met both limits of its class, in order of arrival. Raises CannotPlan or OutOfRange."""
        classes = classes_of(self.plan)
        met = classes.met(self.result(roles), classes.kinds(self.workload.jobs))
        order = np.argsort([job.arrival_s for job in self.workload.jobs], kind="stable")
        return np.asarray(met)[order]

    def result(self, roles: tuple[Role, ...]) -> SimulationResult:
        """The recorded requests on the plan's instances under these roles. Raises CannotPlan or OutOfRange."""
        if is_file(self.profile):
            machine = self._machine(profile_for(self.profile, self.plan.model), roles)
            return simulate_shared(machine, self.workload)
        limits = policy(self.plan.policy or default_policy(self.profile))
        specs = [self._spec(i, role, limits) for i, role in enumerate(roles)]
        return simulate(on_ports(specs, self._port_bytes_s(), cluster=self._cluster), self.workload)

    def _machine(self, profile: Profile, roles: tuple[Role, ...]) -> Machine:
        limits = self.plan.batching.onto(policy("serve"))
        tokens = min(each.kv_tokens for each in self.plan.instances)
        return Machine(profile, roles, limits, tokens, cluster=self._cluster)

    @property
    def _cluster(self) -> ClusterConfig:
        return open_door(self.plan.overflow_prefill_tokens)

    def _spec(self, index: int, role: Role, limits: InstanceConfig) -> InstanceSpec:
        planned = self.plan.instances[index]
        return instance(role, self._latency(index), limits, kv_tokens=planned.kv_tokens)

    def _latency(self, index: int) -> LatencyModel:
        planned, name = self.plan.instances[index], self.profile
        if not name:
            raise CannotPlan("the plan does not name its latencies; give --profile, as for `distserve simulate`")
        kind, _, engine = name.partition(":")
        if kind == "tables":  # of the GPU that the plan gave this instance
            name = f"tables:{planned.gpu}:{engine or 'vllm'}"
        try:
            return latency_model(name, self.plan.model, planned.tp, planned.pp)
        except OutOfRange as error:
            raise CannotPlan(f"{planned.id}: {error}") from error

    def _port_bytes_s(self) -> float:
        return min((link.capacity_bytes_s for link in self.plan.links), default=KV_BYTES_S)
