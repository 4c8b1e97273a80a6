"""From samples to curves: step times by non-negative least squares, the form chosen by errors on samples left out.

Two forms are tried for each kind of step: a line in the rows, and a table over the rows with linear interpolation
(matrix products are bound by memory for few rows, by arithmetic for many). Attention adds terms in both. Errors are
relative: a step of 10 ms counts as much as one of a second. Everything is deterministic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from distserve_planner.latency.profile import Curve, Extra, LinkCost, Range, Sample
from distserve_planner.refusal import CannotPlan

Floats = NDArray[np.float64]
FOLDS = 5
LEAST_SAMPLES = 6
_SMOOTHING = 0.03  # of the median time: how much a kink of the table costs beside an error of the fit


@dataclass(frozen=True, slots=True)
class Terms:
    """Names and values of what a step's time is linear in, beside its rows."""

    names: tuple[str, ...]
    of: Callable[[Sample], tuple[float, ...]]


def squares(chunks: Sequence[tuple[int, int]]) -> float:
    """(query, key) pairs of causal attention, twice: a chunk after ``before`` tokens attends to them as well."""
    return float(sum(new * (new + 2 * before) for new, before in chunks))


PREFILL = Terms(
    ("squares", "chunks", "decodes", "decode_context"),
    lambda s: (squares(s.chunks), len(s.chunks), s.decodes, s.decode_context),
)
DECODE = Terms(("decode_context",), lambda s: (s.decode_context,))


def fit_curve(samples: Sequence[Sample], terms: Terms) -> Curve:
    """The better of the two forms. Raises CannotPlan for too few samples."""
    if len(samples) < LEAST_SAMPLES:
        raise CannotPlan(f"{len(samples)} measured steps are too few to fit; measure with a larger --kv-tokens")
    forms = {"line": _ends(samples), "table": _powers(samples)}
    tried = {name: _left_out(samples, terms, knots) for name, knots in forms.items()}
    form = min(tried, key=lambda name: tried[name])
    knots = forms[form]
    solved = _solve(samples, terms, knots)
    relative = np.abs(_told(samples, terms, knots, solved) / _seconds(samples) - 1)
    count = len(knots)
    return Curve(
        form=form,
        knots=tuple(knots.tolist()),
        values=tuple(solved[:count].tolist()),
        weights=dict(zip(terms.names, solved[count:].tolist(), strict=True)),
        error=tried[form],
        median_residual=float(np.median(relative)),
        worst_residual=float(relative.max()),
        tried=tried,
    )


def told(curve: Curve, terms: Terms, sample: Sample) -> float:
    """What a fitted curve says of one sample, seconds."""
    base = float(np.interp(sample.rows, curve.knots, curve.values))
    return base + sum(curve.weights[n] * v for n, v in zip(terms.names, terms.of(sample), strict=True))


def range_of(samples: Sequence[Sample]) -> Range:
    """The largest of everything that was measured."""
    prompts = [s for s in samples if s.chunks]
    decodes = [s for s in samples if s.decodes]
    return Range(
        step_tokens=max(s.rows for s in prompts),
        sequence=max(new + before for s in prompts for new, before in s.chunks),
        batch=max(s.decodes for s in decodes),
        context=max(s.decode_context for s in decodes),
    )


def fit_link(points: Sequence[tuple[float, float]]) -> LinkCost:
    """Latency and bandwidth of (bytes, seconds). Raises CannotPlan for fewer than two sizes."""
    if len({nbytes for nbytes, _ in points}) < 2:
        raise CannotPlan("KV of one size only was moved; a link's latency and bandwidth need at least two sizes")
    size, seconds = np.array(points, dtype=np.float64).T
    (latency, per_byte), _ = nnls(np.stack([1 / seconds, size / seconds], axis=1), np.ones(len(seconds)))
    per_byte = max(float(per_byte), 1e-15)
    error = float(np.sqrt(np.mean(((latency + per_byte * size) / seconds - 1) ** 2)))
    return LinkCost(float(latency), 1 / per_byte, error, tuple((float(a), float(b)) for a, b in points))


def fit_extra(points: Sequence[tuple[float, float]]) -> Extra:
    """Of (alone, beside) seconds: non-negative least squares of the difference, relative to the time alone."""
    if not points:
        return Extra()
    alone, beside = np.array(points, dtype=np.float64).T
    (constant, relative), _ = nnls(np.stack([1 / alone, np.ones(len(alone))], axis=1), beside / alone - 1)
    return Extra(float(constant), float(relative), tuple((float(a), float(b)) for a, b in points))


# ── solving ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _ends(samples: Sequence[Sample]) -> Floats:
    rows = [s.rows for s in samples]
    return np.array([0.0, max(rows)], dtype=np.float64)


def _powers(samples: Sequence[Sample]) -> Floats:
    """Powers of two from the least rows to the most, which is the last knot; every interval has samples at its ends."""
    rows = sorted({s.rows for s in samples})
    knots = [float(rows[0])]
    while knots[-1] * 2 < rows[-1]:
        nearest = min(rows, key=lambda r: abs(r - knots[-1] * 2))
        if nearest <= knots[-1]:
            nearest = next(r for r in rows if r > knots[-1])
        knots.append(float(nearest))
    if rows[-1] > knots[-1]:
        knots.append(float(rows[-1]))
    return np.array(knots)


def _hats(rows: Floats, knots: Floats) -> Floats:
    """[n, knots]: each row's weights of the two knots beside it; held beyond the ends."""
    return np.stack([np.interp(rows, knots, unit) for unit in np.eye(len(knots))], axis=1)


def _design(samples: Sequence[Sample], terms: Terms, knots: Floats) -> Floats:
    rows = np.array([s.rows for s in samples], dtype=np.float64)
    return np.concatenate([_hats(rows, knots), np.array([terms.of(s) for s in samples], dtype=np.float64)], axis=1)


def _seconds(samples: Sequence[Sample]) -> Floats:
    return np.array([s.seconds for s in samples], dtype=np.float64)


def _told(samples: Sequence[Sample], terms: Terms, knots: Floats, solved: Floats) -> Floats:
    found: Floats = _design(samples, terms, knots) @ solved
    return found


def _solve(samples: Sequence[Sample], terms: Terms, knots: Floats) -> Floats:
    """Non-negative least squares on relative errors, kinks of the table held small."""
    seconds = _seconds(samples)
    design = _design(samples, terms, knots) / seconds[:, None]
    kinks = _kinks(knots, design.shape[1]) * _SMOOTHING / np.median(seconds)
    scale = np.maximum(np.abs(design).max(axis=0), 1e-300)  # columns of like size: squares are 10^6 of the rest
    solved, _ = nnls(
        np.concatenate([design, kinks]) / scale, np.concatenate([np.ones(len(seconds)), np.zeros(len(kinks))])
    )
    found: Floats = solved / scale
    return found


def _kinks(knots: Floats, width: int) -> Floats:
    """Second differences of the table over log rows: zero for a straight table."""
    rows = []
    for i in range(1, len(knots) - 1):
        row = np.zeros(width)
        left, right = knots[i] - knots[i - 1], knots[i + 1] - knots[i]
        row[i - 1], row[i], row[i + 1] = right / (left + right), -1.0, left / (left + right)
        rows.append(row)
    return np.array(rows).reshape(-1, width)


def _left_out(samples: Sequence[Sample], terms: Terms, knots: Floats) -> float:
    """Root mean square of relative errors, each fold told by a fit on the others."""
    errors: list[float] = []
    order = sorted(range(len(samples)), key=lambda i: (samples[i].rows, samples[i].decode_context, i))
    for fold in range(FOLDS):
        out = [samples[i] for place, i in enumerate(order) if place % FOLDS == fold]
        rest = [samples[i] for place, i in enumerate(order) if place % FOLDS != fold]
        if out and rest:
            solved = _solve(rest, terms, knots)
            errors += (_told(out, terms, knots, solved) / _seconds(out) - 1).tolist()
    return float(np.sqrt(np.mean(np.square(errors))))
