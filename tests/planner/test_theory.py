"""The paper's queueing formulas (DistServe §3.1, M/D/1): the simulator meets them with equal prompts, one a batch."""

from __future__ import annotations

import math

import numpy as np
import pytest

from distserve.core.types import Role
from distserve_planner.simulation.deployment import on_ports
from distserve_planner.simulation.run import simulate
from distserve_planner.workload import Constant, poisson, synthetic
from tests.planner.arrange import StraightLinear, spec

PROMPT, D = 100, 0.1
N, BATCHES = 6000, 20
STUDENT = 3.88  # 99.9 % of Student's t with 19 degrees of freedom


def ttft(rate: float, model: StraightLinear, seed: int) -> tuple[float, float]:
    """Mean time to first token and the half-width of its interval, by batch means after a warm-up."""
    prefill = spec(Role.PREFILL, kv_tokens=1 << 20, model=model, max_batch_tokens=PROMPT)
    deployment = on_ports([prefill, spec(Role.DECODE, kv_tokens=1 << 20)], 1e12)
    result = simulate(deployment, synthetic(Constant(PROMPT, 1), poisson(rate), N + N // 10, seed))
    means = result.ttft_s()[N // 10 :].reshape(BATCHES, -1).mean(axis=1)
    return float(means.mean()), STUDENT * float(means.std(ddof=1)) / math.sqrt(BATCHES)


def service(seconds: float, stages: int = 1) -> StraightLinear:
    return StraightLinear(base=seconds, per_token=0.0, stages=stages)


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_one_device(load: float) -> None:
    rate = load / D
    mean, half = ttft(rate, service(D), seed=1)
    assert abs(mean - (D + rate * D**2 / (2 * (1 - rate * D)))) < half


@pytest.mark.parametrize("load", [0.6, 1.4])
def test_two_stages(load: float) -> None:
    """Inter-op: a request still takes D, but the next one enters after D / 2."""
    rate = load / D
    mean, half = ttft(rate, service(D, stages=2), seed=2)
    assert abs(mean - (D + rate * D**2 / (4 * (2 - rate * D)))) < half


@pytest.mark.parametrize("load", [0.5, 1.1])
def test_two_ways_tensor_parallel(load: float) -> None:
    """Intra-op with a speed-up of K = 1.6: everything takes D / K."""
    rate, k = load / D, 1.6
    mean, half = ttft(rate, service(D / k), seed=3)
    assert abs(mean - (D / k + rate * D**2 / (2 * k * (k - rate * D)))) < half


def test_the_interval_is_narrow_enough_to_tell_the_formulas_apart() -> None:
    rate = 0.7 / D
    _, half = ttft(rate, service(D), seed=1)
    one, two = D + rate * D**2 / (2 * (1 - rate * D)), D + rate * D**2 / (4 * (2 - rate * D))
    assert half < 0.5 * abs(one - two)


def test_replicas_share_the_rate() -> None:
    """Two instances, each request to the shorter queue, do at least as well as two queues of half the rate."""
    rate = 1.2 / D
    prefills = [spec(Role.PREFILL, kv_tokens=1 << 20, model=service(D), max_batch_tokens=PROMPT) for _ in range(2)]
    deployment = on_ports([*prefills, spec(Role.DECODE, kv_tokens=1 << 20)], 1e12)
    result = simulate(deployment, synthetic(Constant(PROMPT, 1), poisson(rate), N, 4))
    half_rate = rate / 2
    assert np.mean(result.ttft_s()) < D + half_rate * D**2 / (2 * (1 - half_rate * D))
    counts = np.bincount([t.prefill for t in result.trails])
    assert counts.min() > 0.4 * N
