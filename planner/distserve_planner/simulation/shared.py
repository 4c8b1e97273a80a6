"""A cluster whose instances share one machine: what a profile of that machine says of it, simulated.

Instances slow each other down while both are busy, more or less according to what both are at. How much of its time an
instance is not alone depends on the run itself, so a run is repeated with the shares that the one before showed, until
they stand still. What the cluster adds
around its steps shifts arrivals; the way back of a token is part of that. Knows no policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from distserve.core.types import Role
from distserve.sched.config import ClusterConfig, InstanceConfig
from distserve_planner.latency.base import OutOfRange
from distserve_planner.latency.profile import KINDS, Profile
from distserve_planner.latency.profiled import ALONE, CROWDED, Beside, ProfiledModel
from distserve_planner.refusal import CannotPlan
from distserve_planner.simulation.deployment import OPEN_DOOR, Deployment, instance, on_ports
from distserve_planner.simulation.result import SimulationResult
from distserve_planner.simulation.run import simulate
from distserve_planner.simulation.shell import StepWatch
from distserve_planner.workload import Workload

_ROUNDS = 5
_STILL = 0.02
Interval = tuple[float, float]
Shares = tuple[Beside, Beside]


@dataclass(frozen=True, slots=True)
class Machine:
    """Instances on the profiled machine. ``kv_tokens`` 0: the profile's."""

    profile: Profile
    roles: tuple[Role, ...]
    config: InstanceConfig
    kv_tokens: int = 0
    link: str = ""  # shm, gloo; empty: the fastest measured
    cluster: ClusterConfig = OPEN_DOOR

    def __post_init__(self) -> None:
        most = self.profile.instances
        if len(self.roles) > most:
            raise OutOfRange(
                f"the profile of {self.profile.model} was measured with {most} instances of {self.profile.threads} "
                f"threads on {self.profile.cores} cores; {len(self.roles)} would share them otherwise",
                f"{most} instances (or profile with --instances {len(self.roles)})",
            )
        if self.link and self.link not in self.profile.links:
            raise OutOfRange(f"the profile has no data for the link {self.link!r}", ", ".join(self.profile.links))

    def deployment(self, shares: Sequence[Shares]) -> Deployment:
        """With what the others do beside each instance."""
        link = self.profile.links[self.link] if self.link else self.profile.link
        specs = [
            instance(
                role,
                ProfiledModel(self.profile, beside=share),
                self.config,
                prefix_cache=self.config.prefix_cache,
                kv_tokens=self.kv_tokens,
            )
            for role, share in zip(self.roles, shares, strict=True)
        ]
        return on_ports(specs, link.bytes_s, link.latency_s + self.profile.live.handoff_s, self.cluster)


@dataclass(frozen=True, slots=True)
class Settled:
    """The run at which the shares stood still: ``workload`` as it reaches the instances, ``result`` as a client sees
    it."""

    deployment: Deployment
    workload: Workload
    result: SimulationResult


def simulate_shared(machine: Machine, workload: Workload, *, seed: int = 0) -> SimulationResult:
    """What every request of ``workload`` would see of the machine. Times are a client's on the same machine.

    Raises as ``settle``.
    """
    return settle(machine, workload, seed=seed).result


def settle(machine: Machine, workload: Workload, *, seed: int = 0) -> Settled:
    """Runs until the shares that go in are those that come out.

    Raises CannotPlan for a workload without requests, and OutOfRange for steps beyond what was measured.
    """
    if not workload.jobs:
        raise CannotPlan("the workload holds no requests; a simulation needs at least one")
    live = machine.profile.live
    shifted = replace(
        workload,
        jobs=tuple(
            replace(j, arrival_s=j.arrival_s + live.around_s + live.around_token_s * j.prompt) for j in workload.jobs
        ),
    )
    shares: list[Shares] = [CROWDED if len(machine.roles) > 1 else ALONE] * len(machine.roles)
    for _ in range(_ROUNDS):
        busy = [_Busy() for _ in machine.roles]
        deployment = machine.deployment(shares)
        result = simulate(deployment, shifted, seed=seed, watch=_watch(busy))
        seen = [_beside(busy, i) for i in range(len(busy))]
        moved = max(_distance(a, b) for a, b in zip(seen, shares, strict=True))
        if moved < _STILL:
            break
        shares = seen
    for trail, job in zip(result.trails, workload.jobs, strict=True):
        trail.arrival = job.arrival_s
    return Settled(deployment, shifted, result)


class _Busy:
    """When one instance was in steps with prompts, and in steps without."""

    def __init__(self) -> None:
        self.kinds: dict[str, list[Interval]] = {kind: [] for kind in KINDS}
        self._last: list[Interval] = []

    def add(self, start: float, end: float, prompts: int) -> None:
        """Steps follow each other: one that begins before the last was to end has cut that short."""
        if self._last and self._last[-1][1] > start:
            self._last[-1] = (self._last[-1][0], start)
        self._last = self.kinds["prefill" if prompts else "decode"]
        self._last.append((start, end))

    def total_s(self, kind: str) -> float:
        return sum(end - start for start, end in self.kinds[kind])


def _watch(busy: Sequence[_Busy]) -> StepWatch:
    return lambda index, start, end, prompts, _: busy[index].add(start, end, prompts)


def _beside(busy: Sequence[_Busy], index: int) -> Shares:
    """Of this instance's time in each kind of step: what the others did, on average over the others."""
    others = [b for i, b in enumerate(busy) if i != index]
    found = []
    for kind in KINDS:
        mine, total = busy[index].kinds[kind], busy[index].total_s(kind)
        shares = [
            sum(common_s(mine, other.kinds[what]) for other in others) / len(others) / total
            if others and total
            else 0.0
            for what in KINDS
        ]
        found.append(Beside(*shares))
    return found[0], found[1]


def _distance(a: Shares, b: Shares) -> float:
    return max(max(abs(x.prefill - y.prefill), abs(x.decode - y.decode)) for x, y in zip(a, b, strict=True))


def common_s(a: Sequence[Interval], b: Sequence[Interval]) -> float:
    """Seconds that two lists of intervals, each in order and without overlaps, have in common."""
    i = j = 0
    total = 0.0
    while i < len(a) and j < len(b):
        total += max(0.0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return total
