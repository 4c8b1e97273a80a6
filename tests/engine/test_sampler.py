"""The sampler: distributions, limits, penalties, logprobs; a draw depends on (logits, seed, index) and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from distserve.core.types import Sampling
from distserve.engine.sampler import uniform
from tests.engine.choosers import CHOOSERS, choose, item

VOCAB = 40
DRAWS = 6000
PINNED = [0.6524484863740322, 0.7347204584623639]


@pytest.fixture(params=CHOOSERS)
def kind(request: pytest.FixtureRequest) -> str:
    """What chooses."""
    return str(request.param)


def logits(rows: int = 1, vocab: int = VOCAB, seed: int = 0) -> torch.Tensor:
    return 2.0 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def frequencies(kind: str, row: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """How often each id is drawn over DRAWS seeds."""
    items = [item(replace(sampling, seed=seed)) for seed in range(DRAWS)]
    drawn = [token.id for token in choose(kind, row.expand(DRAWS, -1), items)]
    return torch.bincount(torch.tensor(drawn), minlength=row.numel()) / DRAWS


WARPED = [
    (Sampling(), []),
    (Sampling(temperature=0.5), []),
    (Sampling(top_k=5), [TopKLogitsWarper(5)]),
    (Sampling(top_p=0.7), [TopPLogitsWarper(0.7)]),
    (Sampling(min_p=0.1), [MinPLogitsWarper(0.1)]),
    (Sampling(temperature=1.5, top_k=12, top_p=0.8), [TopKLogitsWarper(12), TopPLogitsWarper(0.8)]),
]


@pytest.mark.parametrize(("sampling", "warpers"), WARPED)
def test_draws_follow_the_truncated_distribution(kind, sampling, warpers):
    row = logits()
    scores = row / sampling.temperature
    for warper in warpers:
        scores = warper(None, scores)
    expected = torch.softmax(scores, -1)[0]
    found = frequencies(kind, row, sampling)
    assert found[expected == 0].sum() == 0
    sigma = (expected * (1 - expected) / DRAWS).sqrt()
    assert ((found - expected).abs() <= 5 * sigma + 2 / DRAWS).all()


@pytest.mark.parametrize("spread", [0.01, 6.0])
def test_top_p_over_a_large_vocabulary(kind, spread):
    """Flat (needs a full sort) and peaked (the first candidates suffice): only ids of the nucleus are drawn."""
    row = spread * torch.randn(1, 3000, generator=torch.Generator().manual_seed(3))
    kept = torch.isfinite(TopPLogitsWarper(0.6)(None, row)[0])
    assert kept.sum() > 1
    items = [item(Sampling(top_p=0.6, seed=seed)) for seed in range(300)]
    drawn = {token.id for token in choose(kind, row.expand(300, -1), items)}
    assert kept[list(drawn)].all()
    assert len(drawn) > 1


def test_top_p_zero_and_top_k_one_are_greedy(kind):
    row = logits(seed=5)
    best = int(row.argmax())
    for sampling in (Sampling(top_p=0.0, seed=9), Sampling(top_k=1, seed=9), Sampling(min_p=1.0, seed=9)):
        assert choose(kind, row, [item(sampling)])[0].id == best


def test_repetition_penalty_as_transformers(kind):
    row, prompt, output = logits(seed=2), (3, 4, 4, 9), (11, 3)
    sampling = Sampling(temperature=0.0, repetition_penalty=1.7)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([[*prompt, *output]]), row.clone())
    for id in range(VOCAB):  # the order of all ids, one by one, by banning the better ones
        better = tuple((expected[0] > expected[0, id]).nonzero().flatten().tolist())
        found = choose(kind, row, [item(sampling, prompt=prompt, output=output, banned=better)])
        assert found[0].id == id


def test_presence_and_frequency_penalties_over_output_only(kind):
    row = torch.zeros(1, 8)
    row[0, 5] = 1.0
    sampling = Sampling(temperature=0.0, presence_penalty=0.3, frequency_penalty=0.4)
    assert choose(kind, row, [item(sampling, prompt=(5, 5, 5), output=(5,))])[0].id == 5  # 1 - 0.3 - 0.4 > 0
    assert choose(kind, row, [item(sampling, prompt=(), output=(5, 5))])[0].id == 0  # 1 - 0.3 - 0.8 < 0


def test_bias_and_banned_ids(kind):
    row = logits(seed=4)
    best = int(row.argmax())
    assert choose(kind, row, [item(Sampling(temperature=0.0), banned=(best,))])[0].id != best
    biased = Sampling(temperature=0.0, logit_bias=((7, 100.0), (best, -100.0)))
    assert choose(kind, row, [item(biased)])[0].id == 7
    banned = frequencies(kind, row, Sampling(logit_bias=((best, -float("inf")),)))
    assert banned[best] == 0


def test_logprobs_are_of_raw_logits(kind):
    row = logits(seed=6)
    table = torch.log_softmax(row, -1)[0]
    sampling = Sampling(temperature=0.3, top_k=2, logprobs=3, seed=1, logit_bias=((0, 5.0),))
    token = choose(kind, row, [item(sampling)])[0]
    assert token.logprob == pytest.approx(float(table[token.id]), abs=1e-6)
    assert [id for id, _ in token.top] == table.topk(3).indices.tolist()
    assert [p for _, p in token.top] == pytest.approx(table.topk(3).values.tolist(), abs=1e-6)
    assert choose(kind, row, [item(replace(sampling, logprobs=0))])[0].top == ()
    assert choose(kind, row, [item(replace(sampling, logprobs=-1))])[0].logprob is None


@pytest.mark.parametrize(
    "sampling",
    [Sampling(seed=11), Sampling(seed=11, top_p=0.8), Sampling(seed=11, top_k=4), Sampling(seed=11, min_p=0.02)],
)
def test_a_draw_does_not_depend_on_its_batch(kind, sampling):
    rows = logits(9, vocab=5000, seed=8)
    others = [Sampling(seed=3), Sampling(temperature=0.0), Sampling(seed=5, top_p=0.4, logprobs=2), Sampling(seed=8)]
    for index in range(12):
        alone = choose(kind, rows[4:5], [item(sampling, index)])[0].id
        mates = [item(others[i % 4], index + i) for i in range(8)]
        together = choose(kind, rows, [*mates[:4], item(sampling, index), *mates[4:]])
        assert together[4].id == alone


def test_uniform_is_pure_spread_and_in_range():
    values = [uniform(seed, index) for seed in (0, 1, 2**64 - 1) for index in range(4000)]
    assert values == [uniform(seed, index) for seed in (0, 1, 2**64 - 1) for index in range(4000)]
    assert all(0.0 <= value < 1.0 for value in values)
    assert len(set(values)) == len(values)
    counts = torch.histc(torch.tensor(values, dtype=torch.float64), 20, 0, 1)
    assert (counts - 600).abs().max() < 5 * 600**0.5


def test_uniform_is_pinned():
    """A change of the generator would change every seeded answer: it must be deliberate."""
    assert [uniform(0, 0), uniform(42, 7)] == PINNED
