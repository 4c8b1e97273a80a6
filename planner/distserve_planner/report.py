"""The HTML report: one self-contained file, plots as inlined SVG. Needs matplotlib (extra ``report``).

Knows how to draw a search's result; everything drawn was measured by the search or is simulated here from it.
"""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distserve_planner.plan import Plan, as_text
from distserve_planner.refusal import CannotPlan
from distserve_planner.selection.explore import Entry
from distserve_planner.selection.rates import goodput
from distserve_planner.selection.run import SearchResult
from distserve_planner.simulation.result import Slo

_SCALES = (0.5, 0.7, 1.0, 1.4, 2.0)
_SHIFTS = (0.7, 0.85, 1.0, 1.2, 1.5)
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:960px;margin:2em auto;padding:0 1em;color:#222}"
    "pre{background:#f6f6f4;padding:1em;overflow-x:auto;font-size:13px}figure{margin:2em 0}figcaption{color:#555}"
    "svg{max-width:100%;height:auto}"
)


def write_report(result: SearchResult, plan: Plan, path: str | Path) -> None:
    """Raises CannotPlan when matplotlib is not installed or the file cannot be written."""
    plt = _pyplot()
    figures = [(caption, _svg(plt, draw)) for caption, draw in _figures(result)]
    body = "".join(f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>" for caption, svg in figures)
    title = html.escape(f"{plan.model} on {plan.cluster}")
    text = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Plan: {title}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1><p>{html.escape(plan.why)}</p>"
        f"<pre>{html.escape(as_text(plan))}</pre>{body}</body></html>\n"
    )
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise CannotPlan(f"cannot write {path}: {error.strerror or error}") from error


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise CannotPlan(
            'the report needs matplotlib: pip install "distserve[report]"; the plan itself was written'
        ) from error
    matplotlib.use("Agg")
    matplotlib.rcParams.update(
        {"svg.fonttype": "none", "svg.hashsalt": "distserve", "axes.grid": True, "grid.alpha": 0.3}
    )
    import matplotlib.pyplot as plt

    return plt


def _svg(plt: Any, draw: Callable[[Any], None]) -> str:
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    try:
        draw(axes)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    finally:
        plt.close(figure)
    text = stream.getvalue()
    return text[text.index("<svg") :]


def _figures(result: SearchResult) -> Sequence[tuple[str, Callable[[Any], None]]]:
    slo = result.problem.slo
    return (
        (
            "Attainment against rate per GPU, with 95 % intervals; the line is the target.",
            lambda a: _attainment(result, a),
        ),
        (
            "TTFT of the plan at the planned rate; the line is the limit.",
            lambda a: _spread(result, a, "ttft", slo.ttft_s),
        ),
        (
            "TPOT of the plan at the planned rate; the line is the limit.",
            lambda a: _spread(result, a, "tpot", slo.tpot_s),
        ),
        ("Goodput per GPU when both limits are scaled: below 1 is stricter.", lambda a: _slo_scale(result, a)),
        (
            "A window of the simulation: each request's way to its first token, its hand-off and its decode.",
            lambda a: _timeline(result, a),
        ),
        ("Expected KV traffic of each link, share of what it carries.", lambda a: _links(result, a)),
        ("Attainment of the plan when the rate shifts, and when all lengths do.", lambda a: _sensitivity(result, a)),
    )


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


def _spread(result: SearchResult, axes: Any, what: str, limit: float) -> None:
    values = result.fleet.result.ttft_s() if what == "ttft" else result.fleet.result.tpot_s()
    ordered = np.sort(values[np.isfinite(values)])
    axes.plot(ordered, np.arange(1, len(ordered) + 1) / max(1, len(values)))
    axes.axvline(limit, color="black", lw=0.8)
    axes.set(xlabel=f"{what.upper()} in s", ylabel="share of requests", xlim=(0, max(limit * 2, 1e-6)))


def _slo_scale(result: SearchResult, axes: Any) -> None:
    for entry in _shown(result)[:1] + [e for e in _shown(result) if e.unit.colocated][:1]:
        rates = []
        for scale in _SCALES:
            slo = Slo(
                result.problem.slo.ttft_s * scale, result.problem.slo.tpot_s * scale, result.problem.slo.attainment
            )
            trials = result.trials(slo)
            unit = entry.unit
            found = goodput(lambda rate, t=trials, u=unit: t.trial(u, rate), slo.attainment, max(entry.rate, 0.1))  # type: ignore[misc]
            rates.append(found.rate / unit.gpus)
        axes.plot(_SCALES, rates, marker="o", label=str(entry.unit))
    axes.set(xlabel="scale of both limits", ylabel="requests a second and GPU", ylim=(0, None))
    axes.legend(fontsize=7)


def _timeline(result: SearchResult, axes: Any, count: int = 40) -> None:
    trails = sorted(result.fleet.result.trails, key=lambda t: t.arrival)
    window = trails[len(trails) // 2 :][:count]
    start_s = window[0].arrival
    parts = (("queue and prefill", "arrival", "first"), ("hand-off", "first", "owned"), ("decode", "owned", "last"))
    for row, trail in enumerate(window):
        ends = {"arrival": trail.arrival, "first": trail.first, "last": trail.last}
        ends["owned"] = trail.owned if np.isfinite(trail.owned) else trail.first
        for i, (_, start, end) in enumerate(parts):
            if np.isfinite(ends[start]) and np.isfinite(ends[end]):
                axes.barh(row, max(0.0, ends[end] - ends[start]), left=ends[start] - start_s, color=f"C{i}", height=0.8)
    for i, (name, _, _) in enumerate(parts):
        axes.barh(0, 0, color=f"C{i}", label=name)
    axes.set(xlabel="s", ylabel="request", xlim=(0, 1.5 * (window[-1].arrival - start_s) + 1))
    axes.legend(fontsize=7)


def _links(result: SearchResult, axes: Any) -> None:
    links = result.fleet.placement.links
    axes.barh([link.link for link in links], [100 * link.share for link in links])
    axes.axvline(100, color="black", lw=0.8)
    axes.set(xlabel="% of capacity")


def _sensitivity(result: SearchResult, axes: Any) -> None:
    fleet, problem = result.fleet, result.problem
    unit = fleet.unit
    rate = problem.rate
    if unit.one_node:
        unit, rate = result.best.unit, problem.rate / fleet.copies
    plain, target = result.trials(problem.slo), problem.slo.attainment
    axes.plot(_SHIFTS, [_share(plain.trial(unit, rate * shift)) for shift in _SHIFTS], marker="o", label="rate")
    longer = [_share(result.trials(problem.slo, shift).trial(unit, rate)) for shift in _SHIFTS]
    axes.plot(_SHIFTS, longer, marker="s", label="prompt and output lengths")
    axes.axhline(target, color="black", lw=0.8)
    axes.set(xlabel="times what was planned for", ylabel="attainment", ylim=(0, 1.02))
    axes.legend(fontsize=8)


def _share(outcome: Any) -> float:
    return float((outcome.ttft_met & outcome.tpot_met).mean())
