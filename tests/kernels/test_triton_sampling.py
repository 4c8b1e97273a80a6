"""Sampling in Triton against the torch reference, and both against the engine's sampler, draw for draw."""

from __future__ import annotations

import pytest
import torch

from distserve.core.types import Sampling, StepItem
from distserve.engine.sampler import choose_tokens, uniform
from distserve_kernels import batch_sampling
from distserve_kernels import paged_reference as reference
from tests.kernels.interpreted import DEVICE, modules, random

KINDS = [
    Sampling(temperature=0.0),
    Sampling(temperature=1.0),
    Sampling(temperature=0.7, top_k=1),
    Sampling(temperature=0.7, top_k=5),
    Sampling(temperature=1.3, top_p=0.9),
    Sampling(temperature=1.0, top_p=0.05),
    Sampling(temperature=1.0, min_p=0.2),
    Sampling(temperature=0.9, top_k=20, top_p=0.8, min_p=0.02),
    Sampling(temperature=2.0, top_k=100_000, top_p=0.999),
]


def drawn(sample: object, scores: torch.Tensor, kinds: list[Sampling], points: list[float]) -> list[int]:
    def column(values: list[float], dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=DEVICE)

    found = sample(  # type: ignore[operator]
        scores,
        column([k.temperature for k in kinds]),
        column([k.top_k for k in kinds], torch.int32),
        column([k.top_p for k in kinds]),
        column([k.min_p for k in kinds]),
        column(points),
    )
    assert found.dtype == torch.int64
    return [int(i) for i in found.tolist()]


def as_the_engine(scores: torch.Tensor, kinds: list[Sampling], seeds: list[int]) -> list[int]:
    items = [
        StepItem("r", 0, (1,), (0,), True, 3, Sampling(k.temperature, k.top_k, k.top_p, k.min_p, seed=s))
        for k, s in zip(kinds, seeds, strict=True)
    ]
    return [token.id for token in choose_tokens(scores, items)]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("vocab", [7, 1000])
def test_the_engine_the_reference_and_the_kernel_draw_alike(kind: Sampling, vocab: int) -> None:
    seeds = list(range(40 if DEVICE.type == "cuda" else 1 + (vocab > 100)))  # the interpreter takes a third of a second
    scores = random(len(seeds), vocab, seed=vocab) * 3
    points = [uniform(seed, 3) for seed in seeds]
    kinds = [kind] * len(seeds)
    wanted = as_the_engine(scores.cpu(), kinds, seeds)
    assert drawn(reference.sample, scores, kinds, points) == wanted
    assert drawn(modules["sampling"].sample, scores, kinds, points) == wanted


def test_every_row_has_its_own_settings() -> None:
    scores = random(len(KINDS), 300, seed=4) * 2
    seeds = [100 + i for i in range(len(KINDS))]
    points = [uniform(seed, 3) for seed in seeds]
    wanted = as_the_engine(scores.cpu(), KINDS, seeds)
    assert drawn(modules["sampling"].sample, scores, KINDS, points) == wanted


def test_banned_ids_are_never_drawn_and_ties_go_by_id() -> None:
    scores = torch.full((3, 50), float("-inf"), device=DEVICE)
    scores[:, [4, 9, 30]] = 1.0
    sample = modules["sampling"].sample
    for point, wanted in ((0.4, 9), (0.999999, 30)):
        kinds = [Sampling(temperature=1.0), Sampling(temperature=1.0, top_p=0.99), Sampling(temperature=0.5, top_k=3)]
        assert drawn(sample, scores, kinds, [point] * 3) == [wanted] * 3
        assert drawn(reference.sample, scores, kinds, [point] * 3) == [wanted] * 3
    two = [Sampling(temperature=1.0, top_k=2)] * 3
    assert (
        drawn(sample, scores, two, [0.0, 0.6, 0.99])
        == [4, 9, 9]
        == drawn(reference.sample, scores, two, [0.0, 0.6, 0.99])
    )


def test_infinite_scores() -> None:
    """Nothing is possible; one is; one or two are all."""
    infinity = float("inf")
    scores = torch.full((5, 60), -infinity, device=DEVICE)
    scores[1, 7], scores[2, 7] = 2.0, 1e30
    scores[3:] = 1.0
    scores[3, 7] = scores[4, 7] = scores[4, 50] = infinity
    ranked = Sampling(temperature=0.5, top_k=3, top_p=0.9)
    for kind, point, last in ((KINDS[0], 0.5, 7), (KINDS[1], 0.0, 7), (KINDS[1], 0.999, 50), (ranked, 0.999, 50)):
        for sample in (reference.sample, batch_sampling.sample, modules["sampling"].sample):
            assert drawn(sample, scores, [kind] * 5, [point] * 5) == [0, 7, 7, 7, last]


def test_the_shares_of_many_draws_are_the_probabilities() -> None:
    """Even points over [0, 1) hit each id as often as its share says, within one."""
    scores = random(1, 12, seed=8)
    n = 200 if DEVICE.type == "cuda" else 10
    points = [(i + 0.5) / n for i in range(n)]
    kinds = [Sampling(temperature=0.8, top_p=0.95)] * n
    ids = torch.tensor(drawn(modules["sampling"].sample, scores.expand(n, -1).contiguous(), kinds, points))
    weights = torch.softmax(scores[0].double().cpu() / 0.8, -1)
    order = weights.argsort(descending=True)
    kept = order[(weights[order].cumsum(0) - weights[order]) < 0.95]
    shares = weights[kept] / weights[kept].sum()
    counts = torch.tensor([(ids == i).sum() for i in kept])
    assert int(counts.sum()) == n and ((counts - shares * n).abs() <= 1).all()


@pytest.mark.gpu
def test_a_large_vocabulary() -> None:
    scores = random(64, 151_936, seed=1) * 4
    kinds = [KINDS[i % len(KINDS)] for i in range(64)]
    points = [uniform(i, 3) for i in range(64)]
    wanted = as_the_engine(scores.cpu(), kinds, list(range(64)))
    assert drawn(batch_sampling.sample, scores, kinds, points) == wanted
    assert drawn(modules["sampling"].sample, scores, kinds, points) == wanted
