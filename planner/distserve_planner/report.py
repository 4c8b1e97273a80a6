"""The HTML report: one self-contained file, tables and plots as inlined SVG. Needs matplotlib (extra ``report``).

Knows the page; what the plots show is ``figures``.
"""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from distserve_planner.figures import figures
from distserve_planner.plan import Plan, TargetsOfClass, as_text
from distserve_planner.refusal import CannotPlan
from distserve_planner.selection.run import SearchResult

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:960px;margin:2em auto;padding:0 1em;color:#222}"
    "pre{background:#f6f6f4;padding:1em;overflow-x:auto;font-size:13px}figure{margin:2em 0}figcaption{color:#555}"
    "svg{max-width:100%;height:auto}table{border-collapse:collapse}th,td{text-align:left;padding:.2em .9em .2em 0}"
)


def write_report(result: SearchResult, plan: Plan, path: str | Path) -> None:
    """Raises CannotPlan when matplotlib is not installed or the file cannot be written."""
    plt = _pyplot()
    drawn = [(caption, _svg(plt, draw)) for caption, draw in figures(result)]
    body = "".join(f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>" for caption, svg in drawn)
    title = html.escape(f"{plan.model} on {plan.cluster}")
    text = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Plan: {title}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1><p>{html.escape(plan.why)}</p>"
        f"{classes_table(plan.slo_classes)}<pre>{html.escape(as_text(plan))}</pre>{body}</body></html>\n"
    )
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise CannotPlan(f"cannot write {path}: {error.strerror or error}") from error


def classes_table(classes: Sequence[TargetsOfClass]) -> str:
    """The classes of requests, their targets, and what is foretold of each; nothing where all have common targets."""
    if not classes:
        return ""
    heads = ("class", "requests it takes", "TTFT", "TPOT", "target", "requests", "predicted", "")
    rows = [
        (
            c.name,
            c.rule or "of any length",
            f"≤ {c.ttft_s:g} s",
            f"≤ {c.tpot_s:g} s",
            f"{c.attainment:.0%}",
            str(c.requests),
            f"{c.predicted:.1%}",
            "met" if c.predicted >= c.attainment else "missed",
        )
        for c in classes
    ]
    lines = [_row("th", heads), *(_row("td", row) for row in rows)]
    return f"<h2>Classes of requests</h2><table>{''.join(lines)}</table>"


def _row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


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
