"""Algorithms 1 and 2 of DistServe, with free ratios and colocated alternatives, over any way to try a unit.

The order is best bound first; a unit whose bound does not beat the best found is not tried at all, and one that
misses the target just above the best's rate is tried once. Both rest on bounds that hold for every schedule, or on a
trial itself, so the optimum is never dropped; ``exhaustive=True`` measures everything, and a test compares. Knows no
simulator: ``Trials`` may be a closed form. Ties go to fewer GPUs, then to the unit's name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Protocol

from distserve_planner.hardware import Gpu
from distserve_planner.latency.base import OutOfRange
from distserve_planner.selection.candidates import Shape, Unit, ratios
from distserve_planner.selection.memo import Memo
from distserve_planner.selection.rates import Goodput, Outcome, goodput

POOL = 8
WAVE = 4
"""Units measured between two looks at the best found: fixed, so that the answer does not depend on the workers."""


class Trials(Protocol):
    """How a unit is tried. A unit with only prefill or only decode instances is that phase alone."""

    def trial(self, unit: Unit, rate: float) -> Outcome: ...

    def bound(self, unit: Unit) -> float:
        """No higher rate meets the target; 0 when none does, infinite when not known."""
        ...

    def guess(self, unit: Unit) -> float:
        """Where to look first: a rate above 0 that is probably near."""
        ...


Progress = Callable[[int, int, str], None]
Value = Callable[[Unit], float]
"""What a unit costs: GPUs, or dollars an hour. The best unit has the most goodput for its cost."""


def gpus(unit: Unit) -> float:
    return float(unit.gpus)


@dataclass(frozen=True, slots=True)
class Entry:
    """One unit and what was found out. ``bound``: the rate it cannot exceed. ``found`` None: the bound sufficed."""

    unit: Unit
    bound: float
    found: Goodput | None

    @property
    def rate(self) -> float:
        return self.found.rate if self.found is not None and not self.found.at_most else 0.0


@dataclass(frozen=True, slots=True)
class Ranking:
    """Entries, best first: measured ones by goodput for cost, then those that bounds ruled out."""

    entries: tuple[Entry, ...]

    @property
    def best(self) -> Entry | None:
        return self.entries[0] if self.entries and self.entries[0].rate > 0 else None

    @property
    def measured(self) -> tuple[Entry, ...]:
        return tuple(e for e in self.entries if e.rate > 0)

    @property
    def simulated(self) -> int:
        return sum(1 for e in self.entries if e.found is not None)

    @property
    def beyond(self) -> tuple[Entry, ...]:
        """Those that could not be judged for want of latency data."""
        return tuple(e for e in self.entries if e.found is not None and e.found.beyond)

    @property
    def trials(self) -> int:
        return sum(e.found.trials for e in self.entries if e.found is not None)


@dataclass(frozen=True, slots=True)
class PhaseRate:
    """One phase of one shape: goodput of one instance ``alone``, and the ``most`` an instance serves in any pool."""

    alone: Goodput
    most: float


@dataclass(frozen=True, slots=True)
class Phases:
    """What each shape serves of one phase, the other being free."""

    prefill: Mapping[Shape, PhaseRate]
    decode: Mapping[Shape, PhaseRate]


def measure(trials: Trials, unit: Unit, target: float, guess: float, beat: float) -> Goodput:
    """Goodput of one unit; a function of its arguments, so that another process may call it.

    A unit whose trials leave the latency data is not judged, and says so: one such candidate ends no search.
    """
    try:
        return goodput(lambda rate: trials.trial(unit, rate), target, guess, beat)
    except OutOfRange as error:
        return Goodput(0.0, 0.0, 0.0, beyond=str(error))


@dataclass(slots=True)
class Explorer:
    """Measures units: each once, from the memo if it was before, several at a time if there are workers."""

    trials: Trials
    target: float
    memo: Memo
    workers: Executor | None = None
    progress: Progress | None = None
    exhaustive: bool = False
    guesses: Mapping[Unit, float] = field(default_factory=dict)
    margin: float = 0.0  # units within this share of the best are measured too: a longer run may turn them round

    def phases(self, shapes: Sequence[Shape], capacity: Mapping[Gpu, int]) -> Phases:
        """Algorithm 1's first half: each phase of each shape alone, as one instance and as a pool of up to ``POOL``."""
        found: list[dict[Shape, PhaseRate]] = []
        for role in ("prefill", "decode"):
            alone = [_phase(role, s, 1) for s in shapes]
            pools = [_phase(role, s, max(1, min(POOL, capacity[s.gpu] // s.gpus))) for s in shapes]
            one = self._all([(u, self.trials.bound(u), 0.0) for u in alone], role)
            more = self._all([(u, self.trials.bound(u), 0.0) for u in pools], f"{role} pool")
            rates = zip(shapes, pools, one, more, strict=True)
            found.append({s: PhaseRate(a, max(a.high, m.high / (u.n_prefill + u.n_decode))) for s, u, a, m in rates})
        return Phases(*found)

    def rank(
        self, units: Iterable[Unit], cost: Value, bounds: Mapping[Unit, float] | None = None, what: str = ""
    ) -> Ranking:
        """Measures what may be best; see the module. ``bounds`` are rates that are known not to be exceeded."""
        bound = {u: min(self.trials.bound(u), (bounds or {}).get(u, math.inf)) for u in units}
        order = sorted(bound, key=lambda u: (-bound[u] / cost(u), u.gpus, u.key))
        best, entries = 0.0, []
        for start in range(0, len(order), WAVE):
            wave = order[start : start + WAVE]
            least = 0.0 if self.exhaustive else best * (1 - self.margin)
            tried = [u for u in wave if bound[u] > 0 and bound[u] / cost(u) > least]
            rates = self._all([(u, bound[u], least * cost(u)) for u in tried], what)
            found = dict(zip(tried, rates, strict=True))
            entries += [Entry(u, bound[u], found.get(u)) for u in wave]
            best = max([best, *(e.rate / cost(e.unit) for e in entries)])
        entries.sort(key=lambda e: (-e.rate / cost(e.unit), e.found is None, e.unit.gpus, e.unit.key))
        return Ranking(tuple(entries))

    def _all(self, asked: Sequence[tuple[Unit, float, float]], what: str) -> list[Goodput]:
        """Goodput of each (unit, bound, rate to beat), in order; bounds of 0 need no trial."""
        keys = [f"{unit.key} beat={beat:.6g}" for unit, _, beat in asked]
        todo = [i for i, key in enumerate(keys) if self.memo.get(key) is None]
        jobs = [
            (
                self.trials,
                asked[i][0],
                self.target,
                self.guesses.get(asked[i][0]) or self.trials.guess(asked[i][0]),
                asked[i][2],
            )
            for i in todo
        ]
        if self.workers is not None and len(jobs) > 1:
            results: Iterable[Goodput] = self.workers.map(measure, *zip(*jobs, strict=True))
        else:
            results = (measure(*job) for job in jobs)
        for done, (i, found) in enumerate(zip(todo, results, strict=True)):
            self.memo.put(keys[i], found)
            if self.progress is not None:
                self.progress(done + 1, len(todo), f"{what} {asked[i][0]}".strip())
        return [_known(self.memo.get(key)) for key in keys]


def _known(found: Goodput | None) -> Goodput:
    assert found is not None  # put just now
    return found


def _phase(role: str, shape: Shape, count: int) -> Unit:
    return Unit(prefill=shape, n_prefill=count) if role == "prefill" else Unit(decode=shape, n_decode=count)


def free_ratios(phases: Phases, capacity: Mapping[Gpu, int], most_gpus: int) -> dict[Unit, float]:
    """For every pair of shapes the ratios n:m around their balance, each with the rate that it cannot exceed.

    A unit serves no more than either of its phases alone, and an instance in a pool no more than in the largest pool.
    The balance lies between an instance's rate alone and in that pool, of either phase.
    """
    found: dict[Unit, float] = {}
    for p, prefill in phases.prefill.items():
        for d, decode in phases.decode.items():
            if prefill.alone.rate <= 0 or decode.alone.rate <= 0:
                continue
            few, many = prefill.alone.rate / decode.most, prefill.most / decode.alone.rate
            for unit in ratios(p, d, capacity, most_gpus):
                near = few * unit.n_prefill - 1 < unit.n_decode < many * unit.n_prefill + 1
                if near and math.gcd(unit.n_prefill, unit.n_decode) == 1:
                    found[unit] = min(unit.n_prefill * prefill.most, unit.n_decode * decode.most)
    return found
