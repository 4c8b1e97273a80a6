"""``search``: from model, cluster, workload and targets to a placed plan, with what it was compared to and why.

Memory decides what can be; ``explore`` ranks units by goodput for their cost; the finalists are measured again at
steady state; the best is replicated to the rate, trimmed, placed on GPUs and simulated on the links it got.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from distserve_planner.latency.base import LatencyModel
from distserve_planner.refusal import CannotPlan
from distserve_planner.selection.candidates import Shape, Unit, low_affinity_pairs, shapes
from distserve_planner.selection.explore import Entry, Explorer, Phases, Progress, Ranking, Value, free_ratios, gpus
from distserve_planner.selection.fleet import Fleet, size_fleet
from distserve_planner.selection.memo import Memo
from distserve_planner.selection.problem import Problem, shortened, trials_of
from distserve_planner.selection.rates import Goodput
from distserve_planner.selection.trials import SimulatedTrials

_NEAR = 0.1
"""Units within a tenth of the best while choosing may be the best at steady state: they are measured to the end."""


@dataclass(frozen=True, slots=True)
class SearchResult:
    """``fleet``: the best unit, replicated and placed. ``finalists`` and ``colocated`` were measured at steady
    state.
    """

    problem: Problem
    best: Entry
    fleet: Fleet
    finalists: tuple[Entry, ...]
    colocated: tuple[Entry, ...]
    ranking: Ranking
    phases: Phases | None
    notes: tuple[str, ...] = field(default=())

    def model(self, shape: Shape) -> LatencyModel:
        """The latencies that an instance of the plan was simulated with."""
        other = self.problem.mixed_latency if self.fleet.unit.colocated else None
        return (other or self.problem.latency).of(shape)

    def trials(self, scale: float = 1.0, longer: float = 1.0) -> SimulatedTrials:
        """New trials with all latency limits scaled, or with all lengths scaled and cut to what the model takes."""
        limit = self.problem.model.max_len - 1
        jobs = tuple(
            replace(
                j,
                prompt=(p := min(max(1, round(j.prompt * longer)), limit)),
                output=max(1, min(round(j.output * longer), limit - p)),
            )
            for j in self.problem.workload.jobs
        )
        problem, classes = self.problem, self.problem.classes
        problem = replace(
            problem,
            slo=problem.slo.scaled(scale),
            classes=classes.scaled(scale) if classes is not None else None,
            workload=replace(problem.workload, jobs=jobs),
        )
        return trials_of(problem, problem.effort.requests)


def search(
    problem: Problem,
    *,
    workers: int = 1,
    progress: Progress | None = None,
    resume: Path | None = None,
    exhaustive: bool = False,
) -> SearchResult:
    """The best plan for ``problem``. ``resume`` is a file that keeps measurements; the same question goes on from it.

    Raises CannotPlan when nothing fits, no configuration meets the targets, or the cluster is too small for the rate.
    """
    problem.check()
    problem, left_out = shortened(problem)
    trials = trials_of(problem, problem.effort.requests)
    memo = Memo(resume, problem.digest)
    pool = ProcessPoolExecutor(workers) if workers > 1 else None
    try:
        again = problem.effort.final_requests > problem.effort.requests
        margin = _NEAR if again else 0.0
        explorer = Explorer(trials, problem.slo.attainment, memo, pool, progress, exhaustive, margin=margin)
        return _Search(problem, explorer, left_out).run()
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)


class _Search:
    """One run; methods in the order they are called."""

    def __init__(self, problem: Problem, explorer: Explorer, note: str) -> None:
        self._problem, self._explorer, self._note = problem, explorer, note
        self._trials: SimulatedTrials = explorer.trials  # type: ignore[assignment]
        self._reason = ""
        self._cost: Value = (lambda unit: unit.price_per_hour) if problem.objective == "cost" else gpus

    def run(self) -> SearchResult:
        problem = self._problem
        found = self._shapes()
        ranking, phases = self._disaggregated(found)
        mixed = self._explorer.rank(self._mixed(found), self._cost, what="colocated")
        finalists = self._again(ranking.measured[: problem.effort.finalists])
        colocated = self._again(mixed.measured[:2])
        entries = [*finalists, *colocated]
        beyond = [*ranking.beyond, *mixed.beyond]
        if not entries:
            raise CannotPlan(beyond[0].found.beyond if beyond and beyond[0].found else self._why_none(found))
        best = max(entries, key=lambda e: (e.rate / self._cost(e.unit), -e.unit.gpus))
        fleet, chosen = self._fleet(entries, best)
        return SearchResult(problem, chosen, fleet, finalists, colocated, ranking, phases, self._notes(beyond))

    def _shapes(self) -> list[Shape]:
        """What fits and what the latency model knows."""
        longest = int(self._problem.workload.lengths().sum(axis=1).max())
        fitting = shapes(self._problem.model, self._problem.cluster, longest, self._problem.rule)
        known = [shape for shape in fitting if self._known(shape)]
        if not known:
            raise CannotPlan(f"no shape that fits has latency data: {self._reason}")
        return known

    def _disaggregated(self, found: list[Shape]) -> tuple[Ranking, Phases | None]:
        """Algorithm 2's pairs, Algorithm 1's ratios, or both in one ranking."""
        problem, phases = self._problem, None
        units: dict[Unit, float] = {}
        if problem.algorithm in ("auto", "low"):
            units |= dict.fromkeys(low_affinity_pairs(problem.cluster, found), math.inf)
        if problem.algorithm in ("auto", "high"):
            capacity = {gpu: problem.cluster.count_of(gpu) for gpu in problem.cluster.gpu_types}
            phases = self._explorer.phases(found, capacity)
            most = min(problem.cluster.gpus, max(problem.effort.unit_gpus, *(2 * s.gpus for s in found)))
            units |= free_ratios(phases, capacity, most)
        return self._explorer.rank(units, self._cost, units, "disaggregated"), phases

    def _mixed(self, found: list[Shape]) -> Iterable[Unit]:
        for policy in self._problem.mixed_policies:
            for shape in found:
                if self._known(shape, mixed=True):
                    yield Unit(mixed=shape, n_mixed=1, policy=policy)

    def _known(self, shape: Shape, mixed: bool = False) -> bool:
        """Whether there is latency data of the shape; why not is kept."""
        try:
            self._trials.model(shape, mixed)
        except ValueError as error:  # OutOfRange: no data for this degree or GPU; CannotPlan: none for this model
            self._reason = str(error)
            return False
        return True

    def _again(self, entries: Iterable[Entry]) -> tuple[Entry, ...]:
        """The finalists at steady state, best first."""
        effort = self._problem.effort
        if effort.final_requests <= effort.requests:
            return tuple(entries)
        longer = Explorer(
            trials_of(self._problem, effort.final_requests),
            self._problem.slo.attainment,
            Memo(),
            self._explorer.workers,
            self._explorer.progress,
            exhaustive=True,
            guesses={e.unit: 0.9 * e.rate for e in entries},  # a longer run serves a little less
        )
        return longer.rank([e.unit for e in entries], self._cost, what="at steady state").measured

    def _fleet(self, entries: list[Entry], best: Entry) -> tuple[Fleet, Entry]:
        """The first of the entries, best first, whose replicas fit the cluster; the fewest GPUs if that is the aim."""
        order = sorted(entries, key=lambda e: (e is not best, -e.rate / self._cost(e.unit)))
        fleets, reason = [], ""
        trials = trials_of(self._problem, max(self._problem.effort.requests, self._problem.effort.final_requests))
        for entry in order:
            try:
                fleets.append((size_fleet(self._problem, trials, entry), entry))
            except CannotPlan as error:
                reason = reason or str(error)
                continue
            if self._problem.objective != "fewest":
                break
        if not fleets:
            raise CannotPlan(reason)
        return min(fleets, key=lambda f: f[0].unit.gpus) if self._problem.objective == "fewest" else fleets[0]

    def _why_none(self, found: list[Shape]) -> str:
        """Which limit nothing meets, and the nearest that something does."""
        slo, share = self._problem.slo, self._problem.slo.attainment
        ttft = min(found, key=lambda s: self._trials.fastest_ttft(s, share))
        tpot = min(found, key=lambda s: self._trials.fastest_tpot(s, share))
        fastest = self._trials.fastest_ttft(ttft, share), self._trials.fastest_tpot(tpot, share)
        return (
            f"no configuration meets TTFT {slo.ttft_s:g} s and TPOT {slo.tpot_s:g} s for {share:.0%} of the requests; "
            f"with nobody else in the way the least are TTFT {fastest[0]:.3g} s ({ttft}) and TPOT {fastest[1]:.3g} s "
            f"({tpot})"
        )

    def _notes(self, beyond: list[Entry]) -> tuple[str, ...]:
        found = [self._note] if self._note else []
        for shape, model in self._trials.models.items():
            for what, asked in getattr(model, "beyond", {}).items():
                found.append(f"{shape}: {what} up to {asked:.0f} is beyond the measurements; its utilisation was held")
        found += [f"not judged: {e.unit}: {e.found.beyond}" for e in beyond if e.found is not None]
        return tuple(dict.fromkeys(found))


def interval(found: Goodput) -> str:
    """``4.1 (3.9 to 4.3)``."""
    return f"{found.rate:.2f} ({found.low:.2f} to {found.high:.2f})"
