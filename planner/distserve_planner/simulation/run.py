"""``simulate``: a workload through a deployment, on a virtual clock."""

from __future__ import annotations

import contextlib

from distserve_planner.refusal import CannotPlan
from distserve_planner.simulation.deployment import Deployment
from distserve_planner.simulation.quick import QuickWorld, covers
from distserve_planner.simulation.result import SimulationResult
from distserve_planner.simulation.shell import StepWatch
from distserve_planner.simulation.tally import NotCounted
from distserve_planner.simulation.world import World
from distserve_planner.workload import Workload


def simulate(
    deployment: Deployment,
    workload: Workload,
    *,
    seed: int = 0,
    machines: bool = False,
    jumps: bool = True,
    watch: StepWatch | None = None,
) -> SimulationResult:
    """What every request of ``workload`` would see of ``deployment``: times, refusals, and what each part did.

    The same arguments give the same result, digest and all. ``jumps=False`` takes every decode step alone: slower, and
    the same result. ``machines=True`` runs the state machines themselves where counts would do (``tally``): slower, the
    same result again. ``watch`` is told of every step planned. Raises CannotPlan for a workload without requests, and
    OutOfRange where a latency model has no data.
    """
    if not workload.jobs:
        raise CannotPlan("the workload holds no requests; a simulation needs at least one")
    if jumps and not machines and covers(deployment):
        with contextlib.suppress(NotCounted):
            return QuickWorld(deployment, workload, watch=watch).run()
    return World(deployment, workload, jumps=jumps, seed=seed, watch=watch).run()
