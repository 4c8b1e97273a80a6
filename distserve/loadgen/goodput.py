"""The highest request rate at which the targets still hold: growing steps until one fails, then halving the gap.

Goodput as in DistServe (OSDI '24), §2: the largest rate whose SLO attainment is at least the target.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from distserve.loadgen.stats import Summary

GROWTH = 1.6


@dataclass(frozen=True, slots=True)
class Point:
    """One rate that was tried. ``decided_early``: it was stopped once it could not pass any more, and its figures are
    those of the requests that ended before."""

    rate: float
    passed: bool
    decided_early: bool
    summary: Summary


@dataclass(frozen=True, slots=True)
class Goodput:
    """``rate`` passed and ``fails_at`` (None: nothing failed up to the limit) did not; 0 when no rate passed."""

    rate: float
    fails_at: float | None
    curve: list[Point] = field(default_factory=list)


async def search(
    measure: Callable[[float, int], Awaitable[Point]],
    *,
    start: float,
    least: float,
    most: float,
    tolerance: float,
) -> Goodput:
    """Try rates with ``measure(rate, try number)`` until the best that passed and the least that failed are near."""
    curve: list[Point] = []

    async def passes(rate: float) -> bool:
        curve.append(await measure(rate, len(curve)))
        return curve[-1].passed

    good, bad, rate = 0.0, None, min(start, most)
    while bad is None or good == 0.0:
        if await passes(rate):
            good = rate
            if bad is not None or rate >= most:
                break
            rate = min(rate * GROWTH, most)
        else:
            bad = rate
            if good or rate <= least:
                break
            rate = max(rate / GROWTH, least)
    while bad is not None and good and bad / good > 1 + tolerance:
        middle = (good + bad) / 2
        if await passes(middle):
            good = middle
        else:
            bad = middle
    return Goodput(good, bad, curve)
