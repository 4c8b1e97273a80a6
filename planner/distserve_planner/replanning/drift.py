"""Drift: whether recorded traffic is still the traffic that a plan was made for.

Knows the plan's few numbers and a workload; what drift costs is the simulation's to say.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from distserve_planner.plan import Load
from distserve_planner.refusal import CannotPlan
from distserve_planner.workload import Workload

TOLERANCE = 0.1
"""A difference of less than this share changes no plan, however surely it is seen."""

WINDOWS = 20
FEWEST = 40
_SIGMAS = 1.96


@dataclass(frozen=True, slots=True)
class Shift:
    """One figure of the traffic: planned for, seen, and the 95 % interval of what was seen."""

    what: str
    planned: float
    seen: float
    low: float
    high: float
    tolerance: float = TOLERANCE

    @property
    def change(self) -> float:
        """Relative to what was planned for."""
        return self.seen / self.planned - 1 if self.planned else math.inf

    @property
    def drifted(self) -> bool:
        """Surely another, and by more than matters."""
        return not self.low <= self.planned <= self.high and abs(self.change) > self.tolerance


def drift(load: Load, seen: Workload, tolerance: float = TOLERANCE) -> tuple[Shift, ...]:
    """Rate and mean lengths. Raises CannotPlan for a recording too short to tell."""
    if len(seen.jobs) < FEWEST or not seen.span_s:
        raise CannotPlan(
            f"{len(seen.jobs)} requests over {seen.span_s:.0f} s are too few to tell drift from chance; "
            f"record at least {FEWEST}"
        )
    return tuple(_shifts(load, seen, tolerance))


def _shifts(load: Load, seen: Workload, tolerance: float) -> Iterator[Shift]:
    yield Shift("requests a second", load.rate, seen.rate, *_around(seen.rate, _rate_error(seen)), tolerance)
    lengths = seen.lengths()
    planned = (load.prompt_tokens, load.output_tokens)
    for column, (what, value) in enumerate(zip(("prompt tokens", "output tokens"), planned, strict=True)):
        values = lengths[:, column]
        error = float(values.std(ddof=1)) / math.sqrt(len(values))
        yield Shift(what, value, float(values.mean()), *_around(float(values.mean()), error), tolerance)


def _around(value: float, error: float) -> tuple[float, float]:
    return value - _SIGMAS * error, value + _SIGMAS * error


def _rate_error(seen: Workload) -> float:
    """Standard error of the rate, from counts in windows: bursts make it wider than Poisson's."""
    times = np.array([job.arrival_s for job in seen.jobs])
    counts, _ = np.histogram(times, bins=WINDOWS)
    return float(counts.std(ddof=1)) / math.sqrt(WINDOWS) / (seen.span_s / WINDOWS)
