"""The highest rate at which enough requests meet their targets, with its confidence interval.

Every candidate sees the same requests (common random numbers): a trial at another rate is the same lengths and the
same arrivals, stretched. Rates tried lie on one geometric grid, so that two candidates that are equal get equal
goodput and a repeat gives the same digits. Knows no simulator: a trial is a function of the rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

STEP = 1.02
"""Ratio of neighbouring rates of the grid: the resolution of a goodput."""
MOST = 1e4
"""Requests a second beyond which nothing is asked: a run this short cannot tell any more."""
_BATCHES = 20
_Z = 1.96
WARM_UP = 0.1
"""Share of the requests that only fill the system: not judged."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one trial showed: for each request in order of arrival, whether it met the TTFT and the TPOT limit.

    ``kinds``: the class of each request, with the share that each class must attain in ``targets``; none: one class.
    """

    ttft_met: NDArray[np.bool_]
    tpot_met: NDArray[np.bool_]
    kinds: NDArray[np.int64] | None = None
    targets: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Point:
    """Attainment at one rate with its standard error (batch means over the arrivals after a warm-up).

    With several classes ``attainment`` is of the class that is furthest below its own target, counted from the least
    target of all: it reaches that one when every class reaches its own.
    """

    rate: float
    attainment: float
    error: float
    ttft: float
    tpot: float

    @staticmethod
    def of(rate: float, outcome: Outcome) -> Point:
        start = int(len(outcome.ttft_met) * WARM_UP)
        ttft, tpot = outcome.ttft_met[start:], outcome.tpot_met[start:]
        met, shift = _binding(ttft & tpot, outcome, start)
        batches = min(_BATCHES, max(2, len(met) // 10))
        means = [float(part.mean()) for part in np.array_split(met, batches) if len(part)]
        error = float(np.std(means, ddof=1) / math.sqrt(len(means))) if len(means) > 1 else 0.5
        return Point(rate, float(met.mean()) + shift, error, float(ttft.mean()), float(tpot.mean()))


def _binding(met: NDArray[np.bool_], outcome: Outcome, start: int) -> tuple[NDArray[np.bool_], float]:
    """The requests of the class that misses its target most, and what its attainment is to be moved by."""
    if outcome.kinds is None:
        return met, 0.0
    kinds, least = outcome.kinds[start:], min(outcome.targets)
    parts = [(met[kinds == i], least - target) for i, target in enumerate(outcome.targets)]
    return min((part for part in parts if len(part[0])), key=lambda part: float(part[0].mean()) + part[1])


@dataclass(frozen=True, slots=True)
class Goodput:
    """``rate`` in requests a second, 0 where no rate met the target; ``low`` to ``high`` its 95 % interval.

    ``points``: every trial, ascending in rate. ``at_most``: true when the search stopped because it cannot beat
    another. ``beyond``: why it could not be judged, where a trial needed steps that no latency data cover.
    """

    rate: float
    low: float
    high: float
    points: tuple[Point, ...] = field(default=())
    at_most: bool = False
    beyond: str = ""

    @property
    def trials(self) -> int:
        return len(self.points)


def on_grid(rate: float) -> float:
    """The grid's rate next below."""
    return STEP ** math.floor(math.log(rate) / math.log(STEP) + 1e-9)


def goodput(
    trial: Callable[[float], Outcome], target: float, guess: float, beat: float = 0.0, least: float = 1e-3
) -> Goodput:
    """Where attainment falls below ``target``: between the last grid rate that meets it and the next, on a
    straight line. ``guess`` is where to look first.

    ``beat``: another candidate's rate; when this one misses the target just above it, the search stops there.
    Attainment is taken to fall with the rate (on the grid; the interval tells how sure that is).
    """
    points: dict[int, Point] = {}

    def met(step: int) -> bool:
        if step not in points:
            rate = STEP**step
            points[step] = Point.of(rate, trial(rate))
        return points[step].attainment >= target

    floor = round(math.log(least) / math.log(STEP))
    at = min(_step(guess), _step(MOST))
    if beat > 0:
        over = _step(beat) + 1
        if not met(over):
            return _found(points, None, target, at_most=True)
        at = max(at, over)
    low, high = _bracket(met, at, floor)
    if low is None:
        return _found(points, None, target)
    straight = True
    while high - low > 1:
        middle = _between(points, low, high, target) if straight else (low + high) // 2
        low, high = (middle, high) if met(middle) else (low, middle)
        straight = not straight
    return _found(points, low, target)


def _between(points: dict[int, Point], low: int, high: int, target: float) -> int:
    """Where a straight line between the two trials crosses the target; every other time the middle is taken."""
    above, below = points[low].attainment - target, target - points[high].attainment
    share = above / (above + below) if above + below > 0 else 0.5
    return min(high - 1, max(low + 1, low + round(share * (high - low))))


def _step(rate: float) -> int:
    return math.floor(math.log(rate) / math.log(STEP) + 1e-9)


def _bracket(met: Callable[[int], bool], at: int, floor: int) -> tuple[int | None, int]:
    """(a step that meets the target, a greater one that does not); strides double."""
    stride, ceiling = 6, _step(MOST)
    if met(at):
        low = at
        while met(high := min(low + stride, ceiling)):
            low = high
            stride *= 2
            if low == ceiling:
                return low, low + 1
        return low, high
    high = at
    while high > floor:
        if met(max(floor, high - stride)):
            return max(floor, high - stride), high
        high = max(floor, high - stride)
        stride *= 2
    return None, floor


def _found(points: dict[int, Point], best: int | None, target: float, at_most: bool = False) -> Goodput:
    tried = tuple(points[step] for step in sorted(points))
    rate = _crossing(tried, target, 0.0) if best is not None else 0.0
    low = _crossing(tried, target, -_Z)
    high = _crossing(tried, target, +_Z)
    return Goodput(rate, min(low, rate), max(high, rate), tried, at_most)


def _crossing(points: tuple[Point, ...], target: float, z: float) -> float:
    """Where attainment shifted by ``z`` standard errors crosses the target, between the trials that were made."""
    above = [p for p in points if p.attainment + z * p.error >= target]
    if not above:
        return _below(points, target, z)
    last = above[-1]
    beyond = [p for p in points if p.rate > last.rate]
    if not beyond:
        return last.rate
    after = beyond[0]
    a, b = last.attainment + z * last.error - target, after.attainment + z * after.error - target
    share = a / (a - b) if a > b else 1.0
    return last.rate * (after.rate / last.rate) ** share


def _below(points: tuple[Point, ...], target: float, z: float) -> float:
    """Where the shifted attainment would cross the target below the lowest trial, at the slope the trials show."""
    if len(points) < 2:
        return 0.0
    first, last = points[0], points[-1]
    fall = (first.attainment - last.attainment) / math.log(last.rate / first.rate)
    missing = target - (first.attainment + z * first.error)
    return first.rate * math.exp(-missing / fall) if fall > 0 else 0.0
