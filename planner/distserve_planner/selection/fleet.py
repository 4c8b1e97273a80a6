"""From the best unit to a fleet: replicas for the rate, trimmed while they serve it, on GPUs, on the links they got.

A unit that keeps its phases on one node serves alone (a slice, with its own front): its copies share nothing. All other
instances form one pool, in which any prefill may hand to any decode instance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from distserve_planner.cluster import Cluster
from distserve_planner.models import ModelFacts
from distserve_planner.placement import Flow, Path, Placement, Segment, path_between, path_bytes_s, place
from distserve_planner.plan import TargetsOfClass
from distserve_planner.refusal import CannotPlan
from distserve_planner.selection.candidates import Shape, Unit, node_segments
from distserve_planner.selection.explore import Entry
from distserve_planner.selection.problem import Problem, steady, trials_of
from distserve_planner.selection.rates import Goodput, Outcome, Point, goodput
from distserve_planner.selection.trials import LINK_LATENCY_S, SimulatedTrials
from distserve_planner.simulation.deployment import Deployment
from distserve_planner.simulation.result import SimulationResult
from distserve_planner.simulation.shared import Settled
from distserve_planner.slo import planned_classes


@dataclass(frozen=True, slots=True)
class Fleet:
    """``unit``: all instances. ``copies``: of the unit that was measured. ``ids`` and ``shapes``: one each instance, in
    the order of ``segments``' instances. ``found``: what all of them serve.
    ``run``: the fleet (or one of its slices) simulated at the rate.
    """

    unit: Unit
    copies: int
    ids: tuple[str, ...]
    shapes: tuple[Shape, ...]
    segments: tuple[Segment, ...]
    flows: tuple[Flow, ...]
    placement: Placement
    found: Goodput
    run: Settled

    @property
    def result(self) -> SimulationResult:
        return self.run.result


def size_fleet(problem: Problem, trials: SimulatedTrials, entry: Entry) -> Fleet:
    """The fewest copies of the entry's unit that serve the rate, placed.

    Raises CannotPlan when the cluster does not hold them, with the rate that it would serve.
    """
    assert entry.found is not None  # only measured units become fleets
    unit, copies = entry.unit, max(1, math.ceil(problem.rate / entry.rate - 1e-9))
    most = _copies_that_fit(problem.cluster, unit)
    if copies > most:
        raise CannotPlan(
            f"{problem.rate:g} req/s need {copies} × ({unit}) = {copies * unit.gpus} GPUs, but "
            f"{problem.cluster.name} holds {most} of them, which serve {most * entry.rate:.3g} req/s within the targets"
        )
    whole = _multiplied(unit, copies)
    if unit.one_node:
        each = entry.found
        found = Goodput(each.rate * copies, each.low * copies, each.high * copies)
    else:
        whole = _trimmed(problem, trials, whole)
        found = goodput(lambda rate: trials.trial(whole, rate), problem.slo.attainment, problem.rate)
    return _placed(problem, trials, whole, copies, found)


def _copies_that_fit(cluster: Cluster, unit: Unit) -> int:
    return min(cluster.count_of(gpu) // count for gpu, count in unit.gpus_by_type().items())


def _multiplied(unit: Unit, copies: int) -> Unit:
    return replace(
        unit, n_prefill=unit.n_prefill * copies, n_decode=unit.n_decode * copies, n_mixed=unit.n_mixed * copies
    )


def _trimmed(problem: Problem, trials: SimulatedTrials, whole: Unit) -> Unit:
    """Instances taken away one by one, the larger kind first, while the rest still meets the target at the rate."""
    smaller = True
    while smaller:
        smaller = False
        for less in _one_less(whole):
            outcome = trials.trial(less, problem.rate)
            if Point.of(problem.rate, outcome).attainment >= problem.slo.attainment:
                whole, smaller = less, True
                break
    return whole


def _one_less(unit: Unit) -> Iterator[Unit]:
    """The unit without one instance of each kind that has several, the largest kind first."""
    fewer = [(unit.mixed, unit.n_mixed, replace(unit, n_mixed=unit.n_mixed - 1))]
    fewer += [(unit.prefill, unit.n_prefill, replace(unit, n_prefill=unit.n_prefill - 1))]
    fewer += [(unit.decode, unit.n_decode, replace(unit, n_decode=unit.n_decode - 1))]
    sized = [(shape.gpus, less) for shape, count, less in fewer if shape is not None and count > 1]
    for _, less in sorted(sized, key=lambda each: -each[0]):
        yield less


# ── placing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _placed(problem: Problem, trials: SimulatedTrials, whole: Unit, copies: int, found: Goodput) -> Fleet:
    ids, kinds = _instances(whole)
    segments, stages = _segments(ids, kinds)
    prompt = float(problem.workload.lengths()[:, 0].mean())
    kv_bytes = problem.model.kv_bytes_per_token(problem.rule.kv_dtype)
    pairs = list(_pairs(whole))
    flows = [
        Flow(stages[p][i], stages[d][j], problem.rate * prompt * kv_bytes / len(pairs) * share)
        for p, d in pairs
        for i, j, share in _overlaps(problem.model, kinds[p].pp, kinds[d].pp)
    ]
    together: list[tuple[int, ...]] = []
    if whole.one_node:
        together = [
            group for p, d in pairs for group in _cuts(problem.cluster, kinds[p], kinds[d], stages[p], stages[d])
        ]
    placement = place(problem.cluster, segments, flows, together)
    if whole.one_node:
        run = trials.run(_divided(whole, copies), problem.rate / copies)
    elif whole.colocated or trials.machine(whole) is not None:
        run = trials.run(whole, problem.rate)
    else:
        deployment = linked(problem.cluster, trials, whole, segments, stages, placement)
        run = trials.run(whole, problem.rate, deployment)
    return Fleet(whole, copies, ids, kinds, tuple(segments), tuple(flows), placement, found, run)


def _divided(whole: Unit, copies: int) -> Unit:
    return replace(
        whole, n_prefill=whole.n_prefill // copies, n_decode=whole.n_decode // copies, n_mixed=whole.n_mixed // copies
    )


def _instances(unit: Unit) -> tuple[tuple[str, ...], tuple[Shape, ...]]:
    """Ids and shapes: prefill first, then decode, then mixed."""
    kinds = (("prefill", unit.prefill, unit.n_prefill), ("decode", unit.decode, unit.n_decode))
    ids, found = [], []
    for role, shape, count in (*kinds, ("mixed", unit.mixed, unit.n_mixed)):
        if shape is not None:
            ids += [f"{role}-{i}" for i in range(count)]
            found += [shape] * count
    return tuple(ids), tuple(found)


def _segments(ids: Sequence[str], kinds: Sequence[Shape]) -> tuple[list[Segment], list[list[int]]]:
    """Every stage of every instance, and for each instance the indices of its stages."""
    segments: list[Segment] = []
    stages: list[list[int]] = []
    for name, shape in zip(ids, kinds, strict=True):
        stages.append(list(range(len(segments), len(segments) + shape.pp)))
        segments += [Segment(name, stage, shape.tp, shape.gpu) for stage in range(shape.pp)]
    return segments, stages


def _pairs(unit: Unit) -> Iterator[tuple[int, int]]:
    """(prefill instance, decode instance) that hand over: each to its own in slices, all to all in a pool."""
    for p in range(unit.n_prefill):
        for d in range(unit.n_decode):
            if not unit.one_node or p == d:
                yield p, unit.n_prefill + d


def _cuts(cluster: Cluster, p: Shape, d: Shape, a: Sequence[int], b: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """The segments of a pair that share a node: for each cut its stages of both phases."""
    cuts = node_segments(cluster, p, d)
    for i in range(cuts):
        mine = a[i * p.pp // cuts : (i + 1) * p.pp // cuts], b[i * d.pp // cuts : (i + 1) * d.pp // cuts]
        yield (*mine[0], *mine[1])


def _overlaps(model: ModelFacts, p: int, d: int) -> Iterator[tuple[int, int, float]]:
    """(prefill stage, decode stage, share of the layers) for stages that hold common layers."""
    for i, a in enumerate(model.stages(p)):
        for j, b in enumerate(model.stages(d)):
            common = min(a.stop, b.stop) - max(a.start, b.start)
            if common > 0:
                yield i, j, common / model.layers


def linked(
    cluster: Cluster,
    trials: SimulatedTrials,
    unit: Unit,
    segments: Sequence[Segment],
    stages: Sequence[Sequence[int]],
    placement: Placement,
) -> Deployment:
    """The unit's deployment on the links its placement gives it: own ports inside a node, the nodes' NICs between."""
    every = cluster.domains
    links: dict[str, float] = {}
    routes: dict[tuple[int, int], tuple[str, ...]] = {}
    for p, d in _pairs(unit):
        a, b = stages[p][0], stages[d][0]
        first, second = every[placement.domains[a]], every[placement.domains[b]]
        path = path_between(cluster, first, second)
        rate = path_bytes_s(cluster, path, segments[a], segments[b], first, second)
        if path is Path.NETWORK:
            route = (f"{cluster.nodes[first.node].name} out", f"{cluster.nodes[second.node].name} in")
        else:
            route = (f"instance {p} out", f"instance {d} in")
        for name in route:
            links[name] = max(rate, links.get(name, 0.0))
        routes[p, d] = route
    return Deployment(tuple(trials.specs(unit)), links, routes, link_latency_s=LINK_LATENCY_S)


def spread(result: SimulationResult) -> Mapping[str, float]:
    """Percentiles of a prediction, seconds, over the requests after the warm-up."""
    start = len(result.trails) // 10
    ttft, tpot = result.ttft_s()[start:], result.tpot_s()[start:]
    return {
        "ttft_p50_s": result.percentile(ttft, 0.5),
        "ttft_p90_s": result.percentile(ttft, 0.9),
        "tpot_p50_s": result.percentile(tpot, 0.5),
        "tpot_p90_s": result.percentile(tpot, 0.9),
    }


def met_by(result: SimulationResult, problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """[n] whether each request of the fleet kept its TTFT limit, and its TPOT limit."""
    return trials_of(problem, len(result.trails)).judged(result)


def outcome_of(result: SimulationResult, problem: Problem) -> Point:
    """Attainment of the fleet at the planned rate, all classes together."""
    return Point.of(problem.rate, Outcome(*met_by(result, problem)))


def classes_met(result: SimulationResult, problem: Problem) -> tuple[TargetsOfClass, ...]:
    """The named classes of the question and how the fleet serves them."""
    if problem.classes is None:
        return ()
    ttft, tpot = met_by(result, problem)
    kinds = problem.classes.kinds(steady(problem.workload, len(result.trails), problem.effort.seed).jobs)
    return planned_classes(problem.classes, ttft & tpot, kinds)
