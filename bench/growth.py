"""How a cost grows, and whether faster than the work that it is for.

The verdict looks at neighbouring points alone: where the work grows by some ratio, the time may grow by at most that
ratio times ``TOLERANCE``. So a cost with a fixed part, or one that first waits for memory and then computes, is judged
rightly, whatever curve would fit it. The exponent p of a + b·x^p over the whole range is told beside it: information.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.optimize import curve_fit

TOLERANCE = 1.1
"""Caches that a larger step no longer fits cost some of it, and a shared machine's noise the rest."""


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds ``y`` over ``x``. ``excess``: the most that time grew beyond work from one point to the next, and the
    ``x`` that it grew to.
    """

    name: str
    over: str
    x: list[int]
    y: list[float]
    excess: float | None = None  # a ratio of ratios; 1: just as the work
    excess_at: int | None = None
    super_linear: bool = False
    exponent: float | None = None
    growing_share: float | None = None  # of the last step: what is not its constant part


def curve(name: str, over: str, points: dict[int, float], work: Callable[[int], float] = float) -> Curve:
    """The points, by rising x, with their growth. ``work``: of a point, in any unit; x itself where none is given.

    A point without work is no base to compare with. Fewer than four points tell nothing of an exponent.
    """
    x, y = list(points), list(points.values())
    grown = [(y[j] / y[i] / (work(x[j]) / work(x[i])), x[j]) for i, j in pairwise(range(len(x))) if work(x[i]) > 0]
    excess, at = max(grown, default=(None, None))
    exponent, share = growth(x, y) if len(x) >= 4 else (None, None)
    return Curve(name, over, x, y, excess, at, excess is not None and excess > TOLERANCE, exponent, share)


def growth(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """(p, share of the growing part at the last point) of a + b·x^p, fitted with equal relative errors."""
    scaled, times = np.asarray(x, float) / max(x), np.asarray(y, float)

    def model(at: np.ndarray, fixed: float, growing: float, exponent: float) -> np.ndarray:
        return fixed + growing * at**exponent

    guess = (float(times[0]), float(max(times[-1] - times[0], 1e-9)), 1.0)
    found, _ = curve_fit(
        model, scaled, times, p0=guess, sigma=times, bounds=((0.0, 0.0, 0.2), (np.inf, np.inf, 4.0)), max_nfev=20_000
    )
    fixed, growing, exponent = (float(v) for v in found)
    return exponent, growing / (fixed + growing)


def verdict(line: Curve) -> str:
    """A sentence's worth."""
    fitted = f" ({line.over}^{line.exponent:.2f} beside its fixed part)" if line.exponent is not None else ""
    if line.excess is None:
        return f"{line.name}: too few points to judge"
    said = "SUPER-LINEAR" if line.super_linear else "no faster than its work"
    return (
        f"{line.name}: grows {said}: from one point to the next at most {line.excess:.2f} times as much as that "
        f"({line.over} {line.excess_at}; {TOLERANCE:g} is tolerated){fitted}"
    )
