"""What no schedule can beat: upper bounds on a candidate's goodput, and the paper's queueing formulas.

The bounds are by work, for the very requests of the trial: to meet the target, the cheapest share of them must have
been computed in the time there is, at the best efficiency any batch reaches. They hold for finite runs (a short run
may be overloaded and still meet its target), for any batching and any order. DISTSERVE §2.3 gives the M/D/1
formulas; their stability limit R·D < 1 is the same bound for an endless run without batching, and their mean is
where a search starts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distserve_planner.latency.base import LatencyModel, OutOfRange

_GRAIN = 16  # prompts are taken shorter, to a multiple of this many tokens, so that few differ
_SLACK = 0.9  # what a batch of the best size found may still miss of the best there is


# ── the paper's formulas (one server, Poisson arrivals, constant work) ───────────────────────────────────────────────


def ttft_md1(rate: float, work_s: float) -> float:
    """Mean TTFT on one device: D + R D² / (2 (1 - R D)). Infinite when overloaded."""
    return work_s + _wait(rate, work_s)


def ttft_inter_op(rate: float, work_s: float) -> float:
    """Mean TTFT on a two-stage pipeline: D + R D² / (4 (2 - R D)). Latency stays, a stage takes half."""
    return work_s + _wait(rate, work_s / 2)


def ttft_intra_op(rate: float, work_s: float, speedup: float) -> float:
    """Mean TTFT under two-way tensor parallelism: D/K + R D² / (2 K (K - R D)), 1 < K < 2."""
    return work_s / speedup + _wait(rate, work_s / speedup)


def _wait(rate: float, work_s: float) -> float:
    busy = rate * work_s
    return math.inf if busy >= 1 else rate * work_s**2 / (2 * (1 - busy))


def rate_md1(work_s: float, limit_s: float) -> float:
    """The rate at which one device's mean TTFT is ``limit_s``; 0 when the work alone takes longer."""
    if limit_s <= work_s:
        return 0.0
    waiting = limit_s - work_s
    return 2 * waiting / (work_s * (work_s + 2 * waiting))


# ── bounds by work ───────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Requests:
    """The trial's requests: lengths [n] and arrivals [n] at rate 1, in order of arrival."""

    prompt: NDArray[np.int64]
    output: NDArray[np.int64]
    arrival_s: NDArray[np.float64]

    @property
    def span_s(self) -> float:
        """From time 0 to the last arrival at rate 1."""
        return float(self.arrival_s[-1])


def prefill_work(model: LatencyModel, prompts: Sequence[int], batch_tokens: int) -> NDArray[np.float64]:
    """Seconds of one instance that each prompt takes at the least: its share of a full batch of its like."""
    memo: dict[int, float] = {}

    def of(length: int) -> float:
        count = max(1, batch_tokens // length)
        alone = model.step_s([(length, 0)], 0, 0)
        return min(alone, model.step_s([(length, 0)] * count, 0, 0) / count)

    lengths = [max(1, length // _GRAIN * _GRAIN) for length in prompts]  # shorter is cheaper: the bound still holds
    for length in lengths:
        if length not in memo:
            memo[length] = of(length)
    return np.array([memo[length] for length in lengths]) * _SLACK


def decode_work(
    model: LatencyModel, prompts: Sequence[int], outputs: Sequence[int], kv_tokens: int, sequences: int
) -> NDArray[np.float64]:
    """Seconds of one instance that each answer takes at the least: its tokens' share of the fullest batch that fits."""
    found = []
    memo: dict[tuple[int, int], float] = {}
    for prompt, output in zip(prompts, outputs, strict=True):
        context = max(1, (prompt + output // 2) // (4 * _GRAIN) * (4 * _GRAIN))
        batch = max(1, min(sequences, kv_tokens // context))
        key = (batch, context)
        if key not in memo:
            memo[key] = _least_share(model, batch, context)
        found.append((output - 1) * memo[key])
    return np.array(found) * _SLACK


def _least_share(model: LatencyModel, most: int, context: int) -> float:
    best, batch = math.inf, 1
    while True:
        try:
            best = min(best, model.decode_s(batch, batch * context) / batch)
        except OutOfRange:
            break
        if batch == most:
            break
        batch = min(most, batch * 2)
    return best


def rate_by_work(
    work_s: NDArray[np.float64], requests: Requests, share: float, instances: int, latest_s: float
) -> float:
    """No higher rate lets ``share`` of the requests through: the cheapest of them fill the instances from the first
    arrival to ``latest_s`` (their time limit) after the last. Infinite when the run is too short to tell.
    """
    needed = math.ceil(share * len(work_s) - 1e-9)
    window = float(np.sort(work_s)[:needed].sum()) / instances - latest_s
    return math.inf if window <= 0 else requests.span_s / window


def share_within(seconds: NDArray[np.float64], limit_s: float) -> float:
    """The share of requests whose least possible latency is below the limit: no load makes it greater."""
    return float((seconds < limit_s).mean())
