"""The goodput of a plan both ways: told by simulation, and measured by running it, with the same requests and the same
judgement.

Knows no process: the measured side asks a client that is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from distserve.loadgen.client import Client, Record
from distserve.loadgen.goodput import Point as Try
from distserve.loadgen.goodput import search
from distserve.loadgen.run import open_loop
from distserve.loadgen.stats import Slo as LoadSlo
from distserve.loadgen.stats import summarize
from distserve.profiling.prompts import Prompts
from distserve_planner.selection.rates import WARM_UP, Outcome, Point, goodput
from distserve_planner.simulation.shared import Machine, simulate_shared
from distserve_planner.slo import SloClasses
from distserve_planner.workload import Workload

SECONDS, MOST = 30.0, 400  # of arrivals, and requests, of one rate that is tried
LEAST_RATE, MOST_RATE = 0.05, 100.0
_TRIES = 10  # about as many as a measured search takes
_TOLERANCE = 0.1
Say = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Question:
    """Which requests, at what limits. Rates are in requests a second."""

    workload: Workload
    classes: SloClasses

    def at(self, rate: float) -> Workload:
        """The requests at this rate, over and over for ``SECONDS`` of arrivals, at most ``MOST`` of them."""
        base = self.workload.at_rate(rate)
        count = min(MOST, max(2, math.ceil(rate * SECONDS)))
        period = base.span_s * len(base.jobs) / (len(base.jobs) - 1)
        laps = -(-count // len(base.jobs))
        jobs = [replace(j, arrival_s=j.arrival_s + lap * period) for lap in range(laps) for j in base.jobs]
        return replace(base, jobs=tuple(jobs[:count]))

    def passes(self, rate: float, asked: Workload, ttft: np.ndarray, tpot: np.ndarray) -> bool:
        """Whether requests with these seconds meet the targets, every class its own."""
        return Point.of(rate, self.outcome(asked, ttft, tpot)).attainment >= self.classes.loosest.attainment

    def outcome(self, asked: Workload, ttft: np.ndarray, tpot: np.ndarray) -> Outcome:
        kinds = self.classes.kinds(asked.jobs)
        most_ttft, most_tpot = self.classes.limits(kinds)
        met = ttft < most_ttft, tpot < most_tpot
        return Outcome(*met, kinds, tuple(c.slo.attainment for c in self.classes.classes))


def told(question: Question, machine: Machine) -> float:
    """The highest rate at which the simulation keeps to the targets."""

    def outcome(rate: float) -> Outcome:
        asked = question.at(rate)
        result = simulate_shared(machine, asked)
        return question.outcome(asked, result.ttft_s(), result.tpot_s())

    return goodput(outcome, question.classes.loosest.attainment, max(question.workload.rate, 0.1)).rate


async def measured(question: Question, client: Client, prompts: Prompts, say: Say) -> float:
    """The same by running. A rate is given up once it cannot pass any more."""
    slo = question.classes.loosest
    limit = LoadSlo(slo.ttft_s, slo.tpot_s, attainment=slo.attainment)

    async def attempt(rate: float, number: int) -> Try:
        say(f"goodput: {rate:.2f} req/s", min(0.99, 0.5 + 0.5 * number / _TRIES))
        asked = question.at(rate)
        most = (1 - slo.attainment + WARM_UP) * len(asked.jobs)

        def decided(ended: Sequence[Record]) -> bool:
            return sum(not limit.meets(record) for record in ended) > most

        asks = [prompts.ask(j.prompt, j.output, j.arrival_s) for j in asked.jobs]
        records, wall_s = await open_loop(client, asks, decided=decided)
        ttft, tpot = times(records)
        passed = question.passes(rate, asked, ttft, tpot)
        return Try(rate, passed, any(r.cut_off for r in records), summarize(records, limit, wall_s))

    start = min(max(question.workload.rate, 0.1), MOST_RATE)
    found = await search(attempt, start=start, least=LEAST_RATE, most=MOST_RATE, tolerance=_TOLERANCE)
    return found.rate


def times(records: Sequence[Record]) -> tuple[np.ndarray, np.ndarray]:
    """[n] TTFT and [n] TPOT in seconds, infinite where a request failed."""
    ttft = np.array([r.ttft_s if r.ok else math.inf for r in records])
    tpot = np.array([r.tpot_s if r.ok else math.inf for r in records])
    return ttft, tpot
