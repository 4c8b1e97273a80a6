"""A search's result as a plan: instances on GPUs, what is predicted, what it was compared to, and why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from distserve_planner.latency.profiled import ProfiledModel
from distserve_planner.plan import (
    VERSION,
    Alternative,
    Batching,
    Load,
    Plan,
    PlannedInstance,
    PlannedLink,
    Prediction,
    Stage,
    Targets,
)
from distserve_planner.selection.candidates import Unit
from distserve_planner.selection.explore import Entry
from distserve_planner.selection.fleet import classes_met, outcome_of, spread
from distserve_planner.selection.problem import drawn_bursty
from distserve_planner.selection.run import SearchResult
from distserve_planner.selection.trials import FromProfile
from distserve_planner.workload import burstiness

_SHORT = 2000  # requests below which a goodput is a matter of the run's length


def plan_from(result: SearchResult, trace: str = "") -> Plan:
    """The plan of the best fleet. Raises CannotPlan if it contradicts itself."""
    problem, lengths = result.problem, result.problem.workload.lengths()
    plan = Plan(
        version=VERSION,
        model=problem.model.name,
        cluster=problem.cluster.name,
        pod=problem.cluster.pod.value,
        algorithm=problem.algorithm,
        objective=problem.objective,
        latency=", ".join(dict.fromkeys(result.model(shape).name for shape in result.fleet.shapes)),
        policy=result.fleet.unit.policy or problem.policy,
        slo=Targets(problem.slo.ttft_s, problem.slo.tpot_s, problem.slo.attainment),
        load=Load(
            problem.workload.name or "requests",
            problem.rate,
            float(lengths[:, 0].mean()),
            float(lengths[:, 1].mean()),
            len(problem.workload.jobs),
            problem.effort.seed,
        ),
        instances=tuple(_instances(result)),
        prediction=_prediction(result),
        why=why(result),
        links=tuple(
            PlannedLink(link.link, link.bytes_s, link.capacity_bytes_s) for link in result.fleet.placement.links
        ),
        alternatives=tuple(_alternatives(result)),
        notes=(*result.notes, *_cautions(result)),
        trace=trace,
        slo_classes=classes_met(result.fleet.result, problem),
        batching=Batching.of(result.fleet.run.deployment.instances[0].config),
        **_of_profile(result),
    )
    plan.check()
    return plan


def _of_profile(result: SearchResult) -> dict[str, Any]:
    """Which machine's measurements it rests on, if on any."""
    source, model = result.problem.latency, result.model(result.fleet.shapes[0])
    if not isinstance(source, FromProfile) or not isinstance(model, ProfiledModel):
        return {}
    return {"profile": source.path, "dtype": model.profile.dtype, "threads": model.profile.threads}


def _instances(result: SearchResult) -> Iterator[PlannedInstance]:
    fleet, nodes = result.fleet, result.problem.cluster.nodes
    domains = result.problem.cluster.domains
    for name, shape in zip(fleet.ids, fleet.shapes, strict=True):
        stages = [
            Stage(nodes[domains[d].node].name, gpus)
            for segment, d, gpus in zip(fleet.segments, fleet.placement.domains, fleet.placement.gpus, strict=True)
            if segment.instance == name
        ]
        tokens = result.model(shape).kv_capacity_tokens
        yield PlannedInstance(name, name.rpartition("-")[0], shape.gpu.name, shape.tp, shape.pp, tokens, tuple(stages))


def _prediction(result: SearchResult) -> Prediction:
    fleet, problem = result.fleet, result.problem
    found, gpus = fleet.found, fleet.unit.gpus
    tokens_per_hour = problem.rate * float(problem.workload.lengths()[:, 1].mean()) * 3600
    return Prediction(
        attainment=outcome_of(fleet.result, problem).attainment,
        **spread(fleet.result),
        goodput=found.rate,
        goodput_low=found.low,
        goodput_high=found.high,
        gpus=gpus,
        per_gpu=found.rate / gpus,
        cost_per_million=fleet.unit.price_per_hour / tokens_per_hour * 1e6,
        uncertainty=max(result.model(shape).uncertainty for shape in fleet.shapes),
    )


def _alternatives(result: SearchResult) -> Iterator[Alternative]:
    """The finalists and the colocated ones, each as one unit."""
    best = result.best.unit
    for entry in (*result.finalists, *result.colocated):
        assert entry.found is not None
        yield Alternative(
            what=str(entry.unit),
            kind="colocated" if entry.unit.colocated else "disaggregated",
            gpus=entry.unit.gpus,
            goodput=entry.found.rate,
            goodput_low=entry.found.low,
            goodput_high=entry.found.high,
            per_gpu=entry.found.rate / entry.unit.gpus,
            verdict="chosen" if entry.unit == best else f"{_per_gpu(entry) / _per_gpu(result.best):.0%} of the chosen",
        )


def _per_gpu(entry: Entry) -> float:
    return entry.rate / entry.unit.gpus


def why(result: SearchResult) -> str:
    """One sentence: disaggregate or not, by how much, and whether the difference is beyond the interval."""
    best, others = result.best, result.finalists if result.best.unit.colocated else result.colocated
    words = "Stay colocated" if best.unit.colocated else "Disaggregate"
    other = max(others, key=_per_gpu, default=None)
    if other is None or other.found is None or best.found is None:
        kind = "disaggregated" if best.unit.colocated else "colocated"
        return f"{words}: no {kind} configuration meets the targets at any rate that was tried."
    ratio = _per_gpu(best) / _per_gpu(other)
    clear = best.found.low / best.unit.gpus > other.found.high / other.unit.gpus
    sure = "beyond" if clear else "within"
    return (
        f"{words}: {_per_gpu(best):.2f} req/s per GPU against {_per_gpu(other):.2f} of the best "
        f"{_kind(other.unit)} alternative ({other.unit}), {ratio:.2f} times; the difference is {sure} the intervals."
    )


def _kind(unit: Unit) -> str:
    return "colocated" if unit.colocated else "disaggregated"


def _cautions(result: SearchResult) -> Iterator[str]:
    effort, placement = result.problem.effort, result.fleet.placement
    ranking = result.ranking
    yield (
        f"{len(ranking.entries)} disaggregated units: {ranking.simulated} simulated ({ranking.trials} runs), "
        f"{len(ranking.entries) - ranking.simulated} ruled out by bounds"
    )
    workload = result.problem.workload
    if len(workload.jobs) < effort.requests:
        cv = f"Gamma arrivals of variation {burstiness(workload):.2f}" if drawn_bursty(workload) else "Poisson arrivals"
        yield f"{len(workload.jobs)} requests are fewer than a trial's: lengths were drawn from them, with {cv}"
    if max(effort.requests, effort.final_requests) < _SHORT:
        yield f"goodput over {effort.final_requests} requests: short runs overstate it, by a third and more"
    if result.fleet.found.low < result.problem.rate:
        yield f"the planned rate is within the interval of what it serves ({result.fleet.found.low:.2f}): no reserve"
    if placement.worst > 1:
        link = max(placement.links, key=lambda each: each.share)
        yield f"{link.link} would carry {link.share:.1f} times what it can: this placement is bound by it"
    if not placement.exact:
        yield "the cluster is too large to place exactly: the placement is good, not proven best"
    if result.fleet.unit.one_node and result.fleet.copies > 1:
        yield f"{result.fleet.copies} slices that each serve alone: share the traffic evenly between them"
