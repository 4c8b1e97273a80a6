"""The next token from logits: what it means, and choosing it in torch.

A token is a function of (its own logits, sampling, history, seed, output index) alone: neither batch mates nor the
place where it is computed matter. Every operation here works on rows one by one or along a row's own elements.

Order, as in vLLM: logprobs of the raw logits; banned ids, bias, penalties; greedy or temperature; min-p, top-k, top-p;
draw by the inverse of the cumulated probabilities, most likely first (by rising id where neither top-k nor top-p
truncates), equal ones by the lowest id. Logits are float32 from the first step on, masses that are summed up float64.
A logit that is not a number counts as minus infinity; where nothing is possible, id 0 is chosen; what is infinitely
likely leaves nothing to others.

``native_sampler`` chooses by the same rules, and where rounding does not decide, the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from distserve.core.types import StepItem, Token
from distserve.engine.penalties import constrain
from distserve_kernels import batch_sampling

ROWS_TOGETHER = 1 << 20
"""On a CPU so many logits are worked on at a time: they and what is made of them stay in the cache."""

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15

Draw = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""One token id a row, [rows] int64, of (scores, temperature, top_k, top_p, min_p, points): ``PagedOps.sample``."""

Choose = Callable[[Tensor, Sequence[StepItem]], list[Token]]
"""One token for each row of logits [items, vocab], which stay as they are; row i belongs to item i."""


def choose_tokens(logits: Tensor, items: Sequence[StepItem], draw: Draw | None = None) -> list[Token]:
    """One token for each row of ``logits`` [items, vocab]; row i belongs to ``items[i]``.

    Every draw goes through ``draw``, whoever the mates are; None: torch draws.
    """
    if all(is_plain_greedy(item) for item in items):
        return [Token(int(id)) for id in batch_sampling.first_of_largest(logits).tolist()]
    rows = max(1, ROWS_TOGETHER // logits.shape[1]) if logits.device.type == "cpu" else len(items)
    tokens: list[Token] = []
    for at in range(0, len(items), rows):
        tokens += _choose(logits[at : at + rows], items[at : at + rows], draw or batch_sampling.sample)
    return tokens


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) with 53 random bits, a pure function of (seed, index): two rounds of splitmix64."""
    mixed = _splitmix64((_splitmix64(seed & _MASK64) + index * _GOLDEN) & _MASK64)
    return (mixed >> 11) * 2.0**-53


def _splitmix64(state: int) -> int:
    """Steele, Lea, Flood: Fast splittable pseudorandom number generators (OOPSLA 2014)."""
    z = (state + _GOLDEN) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


def is_plain_greedy(item: StepItem) -> bool:
    """Whether the item asks for the most likely token as it is, and for no more."""
    s = item.sampling
    return s.temperature == 0 and s.logprobs < 0 and not (s.logit_bias or item.banned or s.needs_history)


def _choose(logits: Tensor, items: Sequence[StepItem], draw: Draw) -> list[Token]:
    raw = logits.float()
    scores = batch_sampling.without_nan(raw).contiguous()
    told = _logprobs(scores, items)
    constrain(scores, items)
    ids = _drawn(scores, items, draw)
    return [
        Token(id) if item.sampling.logprobs < 0 else Token(id, *_looked_up(*told[i], id, item.sampling.logprobs))
        for i, (id, item) in enumerate(zip(ids, items, strict=True))
    ]


def _drawn(scores: Tensor, items: Sequence[StepItem], draw: Draw) -> list[int]:
    """The id of every row of constrained ``scores``. ``draw`` takes the first of the largest at temperature 0."""
    asked = [item.sampling for item in items]

    def column(values: Iterable[float], dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.tensor(list(values), dtype=dtype).to(scores.device)

    chosen = draw(
        scores,
        column(s.temperature for s in asked),
        column((s.top_k for s in asked), torch.int32),
        column(s.top_p for s in asked),
        column(s.min_p for s in asked),
        column(uniform(item.sampling.seed, item.output_index) for item in items),
    )
    return [int(i) for i in chosen.tolist()]


def _logprobs(raw: Tensor, items: Sequence[StepItem]) -> dict[int, tuple[Tensor, list[int], list[float]]]:
    """For each row that asks: log-softmax [vocab], and the ids and values of its most likely."""
    told = {}
    for count in sorted({item.sampling.logprobs for item in items} - {-1}):
        own = [i for i, item in enumerate(items) if item.sampling.logprobs == count]
        tables = torch.log_softmax(raw[own], -1)
        values, ids = tables.topk(min(count, tables.shape[1]))
        if bool((odd := tables.isnan()).any()):  # nothing is possible, or something infinitely likely
            tables = torch.where(odd, torch.where(raw[own] == float("inf"), 0.0, -float("inf")), tables)
        told.update({i: (tables[n], ids[n].tolist(), values[n].tolist()) for n, i in enumerate(own)})
    return told


def _looked_up(
    table: Tensor, ids: list[int], values: list[float], id: int, logprobs: int
) -> tuple[float, tuple[tuple[int, float], ...]]:
    """The chosen id's log-probability, and the most likely ones that are possible at all."""
    top = zip(ids, values, strict=True) if logprobs else ()
    return float(table[id]), tuple((i, p) for i, p in top if p > -float("inf"))
