"""A plan of a deployment that somebody chose: what ``distserve simulate --out`` writes, for serving and verifying it.

Nothing was searched, so there are no alternatives; the prediction is one simulation's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distserve_planner.latency.profiled import ProfiledModel
from distserve_planner.plan import (
    VERSION,
    Batching,
    Load,
    Plan,
    PlannedInstance,
    Prediction,
    Stage,
    Targets,
)
from distserve_planner.simulation.result import SimulationResult
from distserve_planner.simulation.shared import Machine
from distserve_planner.slo import SloClasses, planned_classes
from distserve_planner.workload import Workload

NODE = "this-machine"


@dataclass(frozen=True, slots=True)
class Source:
    """Where the question's parts lie: file names as given."""

    model: str
    profile: str
    trace: str


def plan_of_machine(
    machine: Machine, workload: Workload, classes: SloClasses, result: SimulationResult, source: Source
) -> Plan:
    """The deployment as a plan. Raises CannotPlan if it contradicts itself."""
    profile, lengths = machine.profile, workload.lengths()
    slo, kinds = classes.loosest, classes.kinds(workload.jobs)
    met = classes.met(result, kinds)
    attained = float(met.mean())
    plan = Plan(
        version=VERSION,
        model=source.model,
        cluster=NODE,
        pod="slice",
        algorithm="given",
        objective="given",
        latency=f"profile of {profile.model} {profile.dtype}, {profile.instances} × {profile.threads} threads",
        policy="serve",
        slo=Targets(slo.ttft_s, slo.tpot_s, slo.attainment),
        load=Load(
            workload.name or "requests",
            workload.rate if np.isfinite(workload.rate) else 1.0,
            float(lengths[:, 0].mean()),
            float(lengths[:, 1].mean()),
            len(workload.jobs),
            0,
        ),
        instances=tuple(_instances(machine)),
        prediction=prediction(result, attained, workload.rate * attained, len(machine.roles), profile.prefill.error),
        slo_classes=planned_classes(classes, met, kinds),
        why="Given, not searched.",
        trace=source.trace,
        profile=source.profile,
        dtype=profile.dtype,
        threads=profile.threads,
        batching=Batching.of(machine.config),
        overflow_prefill_tokens=machine.cluster.overflow_prefill_tokens,
    )
    plan.check()
    return plan


def _instances(machine: Machine) -> Sequence[PlannedInstance]:
    tokens = machine.kv_tokens or ProfiledModel(machine.profile).kv_capacity_tokens
    found: list[PlannedInstance] = []
    for place, role in enumerate(machine.roles):
        number = sum(1 for each in found if each.role == role.value)
        found.append(
            PlannedInstance(f"{role.value}-{number}", role.value, "cpu", 1, 1, tokens, (Stage(NODE, (place,)),))
        )
    return found


def prediction(result: SimulationResult, attained: float, within: float, count: int, uncertainty: float) -> Prediction:
    """Of one simulation. ``within``: requests a second inside the limits at its rate; no goodput was searched."""
    ttft, tpot = result.ttft_s(), result.tpot_s()
    within = within if np.isfinite(within) else 0.0
    return Prediction(
        attainment=attained,
        ttft_p50_s=_finite(result.percentile(ttft, 0.5)),
        ttft_p90_s=_finite(result.percentile(ttft, 0.9)),
        tpot_p50_s=_finite(result.percentile(tpot, 0.5)),
        tpot_p90_s=_finite(result.percentile(tpot, 0.9)),
        goodput=within,
        goodput_low=within,
        goodput_high=within,
        gpus=count,
        per_gpu=within / count,
        uncertainty=uncertainty,
    )


def _finite(seconds: float) -> float:
    """A plan holds no infinity: what never came, came after a day."""
    return min(seconds, 86_400.0)
