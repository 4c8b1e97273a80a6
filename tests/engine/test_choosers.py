"""Every chooser against the plain float64 reference, row by row; what degenerate rows give; that a row stands alone."""

from __future__ import annotations

import itertools
import logging
import math
import random
from dataclasses import replace

import pytest
import torch
from scipy.stats import chisquare

from distserve.core.types import Sampling, StepItem
from distserve.engine.config import EngineConfig
from distserve.engine.native_sampler import NativeChooser, chooser_of
from distserve.engine.sampler import choose_tokens, uniform
from distserve_kernels import paged_reference
from tests.engine.choosers import CHOOSERS, choose, ids, item, native

INFINITY, NAN = float("inf"), float("nan")
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(params=CHOOSERS)
def kind(request: pytest.FixtureRequest) -> str:
    """What chooses."""
    return str(request.param)


def mixed(count: int, seed: int) -> list[StepItem]:
    """Items of all kinds of draws, without history."""
    draw = random.Random(seed)
    items = []
    for _ in range(count):
        sampling = Sampling(
            temperature=draw.choice((0.0, 0.3, 0.8, 1.0, 2.0)),
            top_k=draw.choice((0, 0, 0, 1, 5, 50, 600, 100_000)),
            top_p=draw.choice((1.0, 1.0, 0.95, 0.5, 1e-9, 0.999)),
            min_p=draw.choice((0.0, 0.0, 0.02, 1.0)),
            seed=draw.getrandbits(64),
        )
        items.append(item(sampling, draw.randrange(1000)))
    return items


def rows(count: int, vocab: int, seed: int) -> torch.Tensor:
    """From flat to peaked, a quarter of them with many equal values."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.tensor([0.01, 1.0, 3.0, 8.0])[torch.arange(count) % 4].unsqueeze(1)
    scores = torch.randn(count, vocab, generator=generator) * spread
    scores[count // 4 : count // 2] = (scores[count // 4 : count // 2] * 2).round() / 2
    return scores


def reference(scores: torch.Tensor, sampling: Sampling, index: int, nudge: tuple[float, float, float]) -> int:
    """What the plain float64 draw gives when its point, top-p and min-p are nudged."""

    def one(value: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.tensor([value], dtype=dtype)

    top_p = sampling.top_p if sampling.top_p == 1.0 else min(max(sampling.top_p + nudge[1], 0.0), 1 - 1e-12)
    found = paged_reference.sample(
        scores.unsqueeze(0),
        one(sampling.temperature),
        one(sampling.top_k, torch.int32),
        one(top_p),
        one(sampling.min_p * (1 + nudge[2])),
        one(min(max(uniform(sampling.seed, index) + nudge[0], 0.0), 1 - 2**-53)),
    )
    return int(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 17, 123, 640, 5000])
def test_draws_are_those_of_the_reference_but_where_rounding_decides(kind: str, vocab: int, dtype: torch.dtype) -> None:
    logits, items = rows(200, vocab, seed=vocab).to(dtype), mixed(200, seed=vocab)
    nudges = list(itertools.product((0.0, -2e-6, 2e-6), repeat=3))
    for row, asked, found in zip(logits.float(), items, ids(kind, logits, items), strict=True):
        wanted = (reference(row, asked.sampling, asked.output_index, nudge) for nudge in nudges)  # the true one first
        assert any(found == one for one in wanted), asked.sampling


def test_both_choose_alike_with_bans_biases_and_penalties() -> None:
    draw = random.Random(5)
    logits, items = rows(120, 700, seed=6), []
    for plain in mixed(120, seed=7):
        history = tuple(draw.choices(range(700), k=draw.randrange(60)))
        sampling = replace(
            plain.sampling,
            repetition_penalty=draw.choice((1.0, 1.3, 0.7)),
            presence_penalty=draw.choice((0.0, 0.5, -0.5)),
            frequency_penalty=draw.choice((0.0, 0.25)),
            logit_bias=tuple((id, draw.uniform(-9, 9)) for id in draw.sample(range(700), draw.choice((0, 3)))),
        )
        output = history[: len(history) // 2]
        banned = tuple(draw.sample(range(700), draw.choice((0, 2))))
        items.append(replace(plain, sampling=sampling, prompt=history, output=output, banned=banned))
    before = logits.clone()
    assert ids("native", logits, items) == ids("torch", logits, items)
    assert torch.equal(logits, before)


def test_histories_that_grow_are_seen_from_step_to_step(kind: str) -> None:
    """The prompt stays the same tuple while the output grows: each step penalises all of both, and nothing else."""
    logits, prompt = rows(2, 300, seed=31)[1:], tuple(range(0, 300, 3))
    sampling, output = Sampling(temperature=0.0, repetition_penalty=1.9, frequency_penalty=2.0), []
    for step in range(30):
        found = choose(kind, logits, [item(sampling, step, prompt=prompt, output=tuple(output))])[0].id
        scores = logits[0].clone()
        seen = torch.tensor(sorted({*prompt, *output}))
        scores[seen] = torch.where(scores[seen] > 0, scores[seen] / 1.9, scores[seen] * 1.9)
        for id in output:
            scores[id] -= 2.0
        assert found == int(scores.argmax())
        output.append(found)
    assert len(set(output)) > 5


def test_logprobs_of_some_rows_among_others(kind: str) -> None:
    logits, vocab = rows(12, 90, seed=8), 90
    asked = [-1, 0, 5, vocab, -1, vocab + 7] * 2
    items = [item(Sampling(seed=i, logprobs=n, logit_bias=((3, 2.0),))) for i, n in enumerate(asked)]
    for row, token, n in zip(logits, choose(kind, logits, items), asked, strict=True):
        table = torch.log_softmax(row.double(), -1)
        if n < 0:
            assert token.logprob is None and token.top == ()
            continue
        assert token.logprob == pytest.approx(float(table[token.id]), abs=1e-5)
        assert len(token.top) == min(n, vocab)
        assert [p for _, p in token.top] == pytest.approx(table.topk(min(n, vocab)).values.tolist(), abs=1e-5)
        assert all(p == pytest.approx(float(table[id]), abs=1e-5) for id, p in token.top)
        assert len({id for id, _ in token.top}) == len(token.top)


# ── degenerate rows ──────────────────────────────────────────────────────────────────────────────────────────────────

DRAWS = [
    GREEDY,
    Sampling(),
    Sampling(top_p=0.9),
    Sampling(top_p=0.0),
    Sampling(top_k=3),
    Sampling(top_k=1),
    Sampling(min_p=1.0),
    Sampling(temperature=1e-30, top_k=9, top_p=0.5, min_p=0.1),
    Sampling(temperature=1e-300),
    Sampling(temperature=1e30, top_k=2),
]


def row(values: dict[int, float], rest: float, vocab: int = 200) -> torch.Tensor:
    made = torch.full((vocab,), rest)
    for id, value in values.items():
        made[id] = value
    return made


DEGENERATE = [
    (row({}, -INFINITY), {0}),  # nothing is possible
    (row({}, NAN), {0}),
    (row({7: 1.0}, -INFINITY), {7}),
    (row({7: 1.0}, NAN), {7}),
    (row({7: 1.0, 3: NAN}, -INFINITY), {7}),
    (row({7: INFINITY}, 3.0), {7}),
    (row({7: INFINITY, 9: INFINITY, 3: NAN}, 3.0), {7, 9}),
    (row({150: 1e30}, 0.0), {150}),
    (row({150: 3e38}, -3e38), {150}),
]


@pytest.mark.parametrize("sampling", DRAWS, ids=lambda s: f"T{s.temperature:g}-k{s.top_k}-p{s.top_p:g}-min{s.min_p:g}")
def test_what_degenerate_rows_give(kind: str, sampling: Sampling) -> None:
    for scores, possible in DEGENERATE:
        if sampling.temperature > 1e9 and scores.isfinite().sum() > 1:
            possible = set(range(200))  # hot enough to level all that is finite
        items = [item(replace(sampling, seed=seed, logprobs=seed % 3)) for seed in range(20)]
        found = choose(kind, scores.expand(20, -1), items)
        assert {token.id for token in found} <= possible, (scores, sampling)
        assert all(p > -INFINITY for token in found for _, p in token.top)
        assert not any(math.isnan(token.logprob) for token in found if token.logprob is not None)


@pytest.mark.parametrize("vocab", [1, 40, 3000])
def test_equal_scores_are_taken_by_the_lowest_id(kind: str, vocab: int) -> None:
    flat = torch.full((1, vocab), 2.5)
    for sampling in (GREEDY, Sampling(top_k=1, seed=5), Sampling(top_p=0.0, seed=5)):
        assert ids(kind, flat, [item(sampling)]) == [0]
    some = max(1, vocab // 10)
    items = [item(Sampling(top_k=some, seed=seed)) for seed in range(200)]
    drawn = ids(kind, flat.expand(200, -1), items)
    assert max(drawn) < some
    halves = [item(Sampling(top_p=0.5, seed=seed)) for seed in range(200)]
    assert max(ids(kind, flat.expand(200, -1), halves)) < -(-vocab // 2)


def seed_before(mixed: int) -> int:
    """What one round of splitmix64 makes ``mixed`` of."""

    def unfold(z: int, shift: int) -> int:
        found = z
        for _ in range(64 // shift):
            found = z ^ (found >> shift)
        return found

    z = unfold(mixed, 31) * pow(0x94D049BB133111EB, -1, 1 << 64) % (1 << 64)
    z = unfold(z, 27) * pow(0xBF58476D1CE4E5B9, -1, 1 << 64) % (1 << 64)
    return (unfold(z, 30) - 0x9E3779B97F4A7C15) % (1 << 64)


def test_the_largest_point_stays_within_what_is_kept(kind: str) -> None:
    """It draws the last one kept, never one behind."""
    seed = seed_before(seed_before((1 << 64) - 1))
    assert uniform(seed, 0) == 1 - 2**-53
    scores = torch.zeros(1, 64)
    assert ids(kind, scores, [item(Sampling(top_p=0.5, seed=seed))]) == [31]
    assert ids(kind, scores, [item(Sampling(top_k=10, seed=seed))]) == [9]
    scores[0, 40:] = -INFINITY
    assert ids(kind, scores, [item(Sampling(seed=seed))]) == [39]


@pytest.mark.parametrize("fields", [{"banned": (200,)}, {"banned": (-1,)}, {"output": (5, 10**12)}])
def test_ids_that_are_none_of_the_vocabulary_are_refused(kind: str, fields: dict[str, tuple[int, ...]]) -> None:
    sampling = Sampling(repetition_penalty=1.5, frequency_penalty=0.1)
    with pytest.raises(IndexError, match="none of the 200"):
        choose(kind, rows(2, 200, seed=1), [item(sampling), item(sampling, 0, **fields)])


# ── a row stands alone ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_row_does_not_depend_on_mates_place_or_memory(kind: str) -> None:
    logits, items = rows(64, 3000, seed=11), mixed(64, seed=12)
    items = [replace(i, sampling=replace(i.sampling, logprobs=n % 3 - 1)) for n, i in enumerate(items)]
    together = choose(kind, logits, items)
    assert [choose(kind, logits[i : i + 1], items[i : i + 1])[0] for i in range(64)] == together
    order = random.Random(13).sample(range(64), 64)
    assert choose(kind, logits[order], [items[i] for i in order]) == [together[i] for i in order]
    apart = torch.cat((torch.zeros(64, 5), logits, torch.zeros(64, 8)), 1)[:, 5:-8]  # rows begin anywhere
    assert choose(kind, apart, items) == together
    assert choose(kind, logits.t().contiguous().t(), items) == together  # ids lie apart


def test_the_number_of_threads_changes_nothing() -> None:
    logits, items = rows(40, 30_000, seed=14), mixed(40, seed=15)
    alone = native(30_000, 1)(logits, items)
    assert native(30_000, 3)(logits, items) == alone  # enough work for the team
    threads = torch.get_num_threads()
    plain = choose_tokens(logits, items)
    try:
        torch.set_num_threads(threads + 2)
        assert choose_tokens(logits, items) == plain
        assert [choose_tokens(logits[i : i + 1], items[i : i + 1])[0] for i in range(40)] == plain
    finally:
        torch.set_num_threads(threads)


def test_seeds_repeat_and_differ(kind: str) -> None:
    logits = rows(1, 2000, seed=16).expand(50, -1)
    once, again, others = (
        ids(kind, logits, [item(Sampling(top_p=0.9, seed=seed), i) for i in range(50)]) for seed in (3, 3, 4)
    )
    assert once == again != others
    assert len(set(once)) > 10


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.7), Sampling(top_k=30, top_p=0.9), Sampling(min_p=0.05)])
def test_draws_are_spread_as_the_probabilities(kind: str, sampling: Sampling) -> None:
    draws, scores = 20_000, rows(2, 400, seed=17)[1]
    found = torch.tensor(ids(kind, scores.expand(draws, -1), [item(replace(sampling, seed=s)) for s in range(draws)]))
    weights = torch.softmax(scores.double() / sampling.temperature, -1)
    order = weights.argsort(descending=True)
    kept = order[weights[order] >= sampling.min_p * weights.max()][: sampling.top_k or None]
    before = weights[kept].cumsum(0) - weights[kept]
    kept = kept[before < sampling.top_p * weights[kept].sum()] if sampling.top_p < 1 else kept
    expected = draws * weights[kept] / weights[kept].sum()
    counts = torch.bincount(found, minlength=400)
    assert int(counts[kept].sum()) == draws
    often = expected >= 5
    seen, wanted = counts[kept][often].tolist(), expected[often].tolist()
    if not bool(often.all()):
        seen, wanted = [*seen, draws - sum(seen)], [*wanted, draws - sum(wanted)]
    assert chisquare(seen, wanted).pvalue > 1e-4


# ── which one an engine takes ────────────────────────────────────────────────────────────────────────────────────────


def test_without_a_compiler_torch_chooses_and_the_log_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with caplog.at_level(logging.INFO):
        assert chooser_of(EngineConfig("m"), 100) is choose_tokens
    assert "sampling in torch: CXX names no-such-compiler, which is not installed" in caplog.messages


def test_native_is_taken_where_it_can_be_built(caplog: pytest.LogCaptureFixture) -> None:
    native(50)
    with caplog.at_level(logging.INFO):
        assert isinstance(chooser_of(EngineConfig("m", threads=1), 50), NativeChooser)
    assert "native sampling, 1 threads" in caplog.messages
    assert chooser_of(EngineConfig("m", kernels="torch"), 50) is choose_tokens
