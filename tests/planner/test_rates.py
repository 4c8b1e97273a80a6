"""Goodput: bisection on a grid, its interval, and the paper's formulas against a queue that is computed stepwise."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from distserve_planner.selection.bounds import (
    Requests,
    rate_by_work,
    rate_md1,
    ttft_inter_op,
    ttft_intra_op,
    ttft_md1,
)
from distserve_planner.selection.rates import MOST, STEP, Outcome, goodput, on_grid


def falling(at: float, requests: int = 2000, steep: float = 6.0) -> Callable[[float], Outcome]:
    """Attainment 0.9 exactly at the rate ``at``; the same requests miss at every rate (common random numbers)."""
    order = np.random.default_rng(5).random(requests)

    def trial(rate: float) -> Outcome:
        share = 1 / (1 + (rate / at) ** steep / 9)
        return Outcome(order < share, np.ones(requests, dtype=bool))

    return trial


@pytest.mark.parametrize("at", [0.02, 0.7, 3.3, 41.0])
@pytest.mark.parametrize("guess", [0.01, 1.0, 300.0])
def test_the_goodput_is_found_wherever_the_search_starts(at, guess):
    found = goodput(falling(at), 0.9, guess)
    assert found.rate == pytest.approx(at, rel=0.06)  # sampling of 2000 requests, and the grid's 2 %
    assert found.low <= found.rate <= found.high
    assert found.low <= at <= found.high
    assert found.rate == goodput(falling(at), 0.9, 1.0).rate  # the same digits from another start


def test_the_interval_narrows_with_the_run():
    short, long = (goodput(falling(2.0, n), 0.9, 1.0) for n in (300, 30000))
    assert (long.high - long.low) < 0.4 * (short.high - short.low)


def test_a_rate_to_beat_stops_a_loser_after_one_trial():
    lost = goodput(falling(1.0), 0.9, 1.0, beat=3.0)
    assert lost.at_most and lost.rate == 0 and lost.trials == 1
    won = goodput(falling(5.0), 0.9, 1.0, beat=3.0)
    assert won.rate == goodput(falling(5.0), 0.9, 1.0).rate


def test_never_and_always_met_end_the_search():
    never = goodput(lambda _: Outcome(np.zeros(100, bool), np.ones(100, bool)), 0.9, 1.0)
    assert never.rate == 0 and never.trials < 20
    always = goodput(lambda _: Outcome(np.ones(100, bool), np.ones(100, bool)), 0.9, 1.0)
    assert always.rate == pytest.approx(MOST, rel=STEP - 1)


def test_both_limits_count_together():
    half = np.arange(1000) % 2 == 0
    found = goodput(lambda _: Outcome(half, ~half), 0.4, 1.0)
    assert found.rate == 0  # each is met by half of the requests, both by none


def test_the_grid_is_below_and_near():
    for rate in (0.013, 1.0, 7.7):
        assert rate / STEP < on_grid(rate) <= rate * (1 + 1e-9)


# ── the paper's formulas ─────────────────────────────────────────────────────────────────────────────────────────────


def mean_latency(rate: float, stages: list[float], requests: int = 200_000) -> tuple[float, float]:
    """Mean time and its standard error of Poisson arrivals through constant stages in a row, by Lindley's recursion."""
    gaps = np.random.default_rng(1).exponential(1 / rate, requests)
    arrivals = np.cumsum(gaps)
    times = arrivals.copy()
    for stage in stages:
        done, free = np.empty(requests), 0.0
        for i, t in enumerate(times.tolist()):
            free = max(free, t) + stage
            done[i] = free
        times = done
    spent = times - arrivals
    means = [part.mean() for part in np.array_split(spent, 40)]
    return float(spent.mean()), float(np.std(means, ddof=1) / math.sqrt(40))


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_the_formulas_are_those_of_the_queues(load):
    work = 0.2
    cases = [
        (load / work, [work], ttft_md1(load / work, work)),
        (load / work, [work / 2, work / 2], ttft_inter_op(load / work, work)),
        (load / work, [work / 1.6], ttft_intra_op(load / work, work, 1.6)),
    ]
    for rate, stages, expected in cases:
        mean, error = mean_latency(rate, stages)
        assert mean == pytest.approx(expected, abs=3 * error)


def test_the_formulas_turn_around():
    assert ttft_md1(rate_md1(0.1, 0.25), 0.1) == pytest.approx(0.25)
    assert rate_md1(0.3, 0.25) == 0
    assert ttft_md1(11, 0.1) == math.inf
    assert ttft_intra_op(1.0, 0.5, 1.0) == pytest.approx(ttft_md1(1.0, 0.5))


@pytest.mark.parametrize("seed", range(10))
def test_the_bound_by_work_holds_for_a_queue(seed):
    """FIFO on one server: no rate above the bound lets the share of the requests through in time."""
    rng = np.random.default_rng(seed)
    n, limit, share = 400, float(rng.uniform(0.3, 4.0)), 0.9
    work = rng.uniform(0.02, 0.4, n)
    arrivals = np.cumsum(rng.exponential(1.0, n))
    requests = Requests(np.ones(n, int), np.ones(n, int), arrivals)
    bound = rate_by_work(work, requests, share, 1, limit)

    def met(rate: float) -> float:
        free, fine = 0.0, 0
        for t, w in zip((arrivals / rate).tolist(), work.tolist(), strict=True):
            free = max(free, t) + w
            fine += free - t < limit
        return fine / n

    assert all(met(rate) < share for rate in np.geomspace(bound * 1.001, bound * 4, 8))
