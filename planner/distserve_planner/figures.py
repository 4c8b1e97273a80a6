"""The plots of a plan's report: each a caption and how to draw it on matplotlib's axes.

Everything drawn was measured by the search or is simulated here from it. Knows no page and no file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from distserve_planner.selection.explore import Entry
from distserve_planner.selection.fleet import classes_met
from distserve_planner.selection.rates import Outcome, Point, goodput
from distserve_planner.selection.run import SearchResult
from distserve_planner.simulation.journeys import PARTS, Journey, journeys

Draw = Callable[[Any], None]
_SCALES = (0.5, 0.7, 1.0, 1.4, 2.0)
_SHIFTS = (0.7, 0.85, 1.0, 1.2, 1.5)
_SHOWN = 40  # requests in the time line
_COLOURS = {name: f"C{i}" for i, name in enumerate(PARTS)}
_FIRST, _PER_INSTANCE, _MOST = 120, 60, 1000  # requests that are run for it


def figures(result: SearchResult) -> Iterator[tuple[str, Draw]]:
    """(caption, draw) in the order of the report."""
    several, ways = result.problem.classes is not None, window(result)
    whose = " (of the class furthest below its target)" if several else ""
    lines = "lines are the limits of the classes" if several else "the line is the limit"
    yield (
        f"Attainment against rate per GPU{whose}, with 95 % intervals; the line is the target.",
        lambda a: _attainment(result, a),
    )
    if several:
        yield "Attainment of each class at the planned rate; the marks are the targets.", lambda a: _classes(result, a)
    yield f"TTFT of the plan at the planned rate; {lines}.", lambda a: _spread(result, a, "ttft")
    yield f"TPOT of the plan at the planned rate; {lines}.", lambda a: _spread(result, a, "tpot")
    yield "Goodput per GPU when all limits are scaled: below 1 is stricter.", lambda a: _slo_scale(result, a)
    yield (
        "A window of the simulation of the chosen plan: each request's way from its arrival to its last token.",
        lambda a: _timeline(ways, a),
    )
    yield (
        "The same requests until they decode, from each one's arrival: what its first two tokens waited for.",
        lambda a: _start(ways, a),
    )
    yield "Expected KV traffic of each link, share of what it carries.", lambda a: _links(result, a)
    yield "Attainment of the plan when the rate shifts, and when all lengths do.", lambda a: _sensitivity(result, a)


def _shown(result: SearchResult) -> list[Entry]:
    return [entry for entry in (*result.finalists, *result.colocated) if entry.found is not None]


def _attainment(result: SearchResult, axes: Any) -> None:
    for entry in _shown(result):
        assert entry.found is not None
        points = entry.found.points
        rates = [p.rate / entry.unit.gpus for p in points]
        style = "--" if entry.unit.colocated else "-"
        bars = [1.96 * p.error for p in points]
        axes.errorbar(
            rates, [p.attainment for p in points], bars, linestyle=style, marker="o", ms=3, label=str(entry.unit)
        )
    axes.axhline(result.problem.slo.attainment, color="black", lw=0.8)
    axes.set(xlabel="requests a second and GPU", ylabel="attainment", ylim=(0, 1.02))
    axes.legend(fontsize=7)


def _classes(result: SearchResult, axes: Any) -> None:
    found = classes_met(result.fleet.result, result.problem)
    names = [each.name for each in found]
    axes.barh(names, [each.predicted for each in found])
    axes.plot([each.attainment for each in found], names, linestyle="", marker="|", ms=24, color="black")
    axes.set(xlabel="attainment", xlim=(0, 1.02))


def _spread(result: SearchResult, axes: Any, what: str) -> None:
    """One curve a class, beside its limit."""
    problem, run = result.problem, result.fleet.run
    values = run.result.ttft_s() if what == "ttft" else run.result.tpot_s()
    if problem.classes is None:
        parts = [("", values, problem.slo)]
    else:
        kinds = problem.classes.kinds(run.workload.jobs)
        parts = [(c.name, values[kinds == i], c.slo) for i, c in enumerate(problem.classes.classes)]
    limits = []
    for i, (name, own, slo) in enumerate(parts):
        limits.append(slo.ttft_s if what == "ttft" else slo.tpot_s)
        ordered = np.sort(own[np.isfinite(own)])
        axes.plot(ordered, np.arange(1, len(ordered) + 1) / max(1, len(own)), color=f"C{i}", label=name or "requests")
        axes.axvline(limits[-1], color=f"C{i}" if name else "black", lw=0.8)
    axes.set(xlabel=f"{what.upper()} in s", ylabel="share of requests", xlim=(0, max(2 * max(limits), 1e-6)))
    axes.legend(fontsize=7)


def _slo_scale(result: SearchResult, axes: Any) -> None:
    target = result.problem.slo.attainment
    for entry in _shown(result)[:1] + [e for e in _shown(result) if e.unit.colocated][:1]:
        rates, unit = [], entry.unit
        for scale in _SCALES:
            trials = result.trials(scale=scale)
            found = goodput(lambda rate, t=trials, u=unit: t.trial(u, rate), target, max(entry.rate, 0.1))  # type: ignore[misc]
            rates.append(found.rate / unit.gpus)
        axes.plot(_SCALES, rates, marker="o", label=str(unit))
    axes.set(xlabel="scale of all limits", ylabel="requests a second and GPU", ylim=(0, None))
    axes.legend(fontsize=7)


def window(result: SearchResult) -> tuple[Journey, ...]:
    """The requests of the time line: so many in a row, from a run of the chosen plan that is under way by then."""
    run = result.fleet.run
    count = min(_MOST, _FIRST + _PER_INSTANCE * len(run.deployment.instances))
    found = journeys(run.deployment, run.workload, count)
    start = max(0, 2 * len(found) // 3 - _SHOWN // 2)
    return found[start : start + _SHOWN]


def _timeline(ways: Sequence[Journey], axes: Any) -> None:
    """Time from left to right, a request a row."""
    if not ways:
        return
    begin = ways[0].arrival
    for row, way in enumerate(ways):
        for name, start, end in way.parts:
            (bar,) = axes.barh(row, end - start, left=start - begin, color=_COLOURS[name], height=0.8)
            bar.set_gid(f"request-{row}-{name.replace(' ', '-')}")
    axes.set(xlabel="s", ylabel="request", xlim=(0, 1.5 * (ways[-1].arrival - begin) + 1))
    _key(axes)


def _start(ways: Sequence[Journey], axes: Any) -> None:
    """The same up to the first decode step, from each one's arrival."""
    for row, way in enumerate(ways):
        for name, start, end in way.parts:
            if name != PARTS[-1]:
                axes.barh(row, end - start, left=start - way.arrival, color=_COLOURS[name], height=0.8)
    axes.set(xlabel="s after its arrival", ylabel="request", xlim=(0, None))
    _key(axes)


def _key(axes: Any) -> None:
    for name in PARTS:
        axes.barh(0, 0, color=_COLOURS[name], label=name)
    axes.legend(fontsize=7)


def _links(result: SearchResult, axes: Any) -> None:
    links = result.fleet.placement.links
    axes.barh([link.link for link in links], [100 * link.share for link in links])
    axes.axvline(100, color="black", lw=0.8)
    axes.set(xlabel="% of capacity")


def _sensitivity(result: SearchResult, axes: Any) -> None:
    fleet, problem = result.fleet, result.problem
    unit, rate = fleet.unit, problem.rate
    if unit.one_node:
        unit, rate = result.best.unit, problem.rate / fleet.copies
    plain = result.trials()
    axes.plot(_SHIFTS, [_share(plain.trial(unit, rate * shift)) for shift in _SHIFTS], marker="o", label="rate")
    longer = [_share(result.trials(longer=shift).trial(unit, rate)) for shift in _SHIFTS]
    axes.plot(_SHIFTS, longer, marker="s", label="prompt and output lengths")
    axes.axhline(problem.slo.attainment, color="black", lw=0.8)
    axes.set(xlabel="times what was planned for", ylabel="attainment", ylim=(0, 1.02))
    axes.legend(fontsize=8)


def _share(outcome: Outcome) -> float:
    """Attainment, of the class furthest below its target where there are several."""
    return Point.of(1.0, outcome).attainment
