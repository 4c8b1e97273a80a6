"""A model cut over ranks, as seen by the code of a model: what this rank keeps, and where ranks must agree.

Tensor parallel as in Megatron-LM (arXiv 1909.08053): Q, K, V, gate and up are cut by rows (each lane computes its heads
and its share of the wide layer), the output and down projections by columns, and one sum over the lanes follows each of
these. Their biases are added by lane 0 alone. Embedding and head are cut by vocabulary. Pipeline parallel: a stage
keeps adjacent layers; the first embeds, the last has the norm and the head (a tied weight is then at both).

A model asks for tensors of *its* (local) shapes; ``ShardWeights`` knows from a tensor's name which slice of the whole
that is, so that nothing else of it is read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from distserve.kv.shard import Parallel, lane_heads, stage_layers, why_not
from distserve.models.config import ModelConfig
from distserve.models.errors import UnsupportedModel
from distserve.models.weights import Cut, Weights
from distserve_kernels.linear import Linear


class Lanes(Protocol):
    """The ranks of one stage, all of which make the same calls in the same order."""

    def sum_(self, x: Tensor) -> Tensor:
        """The sum over all lanes, in place; returns ``x``."""
        ...

    def gather(self, x: Tensor) -> Tensor:
        """[rows, n] of each lane → [rows, tp * n], in the order of the lanes."""
        ...


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's share of a model. ``lanes`` is None where a stage is one rank."""

    parallel: Parallel
    rank: int
    lanes: Lanes | None

    @property
    def lane(self) -> int:
        return self.parallel.lane(self.rank)

    @property
    def first(self) -> bool:
        """Whether this rank's stage begins with token ids."""
        return self.parallel.stage(self.rank) == 0

    @property
    def last(self) -> bool:
        """Whether this rank's stage ends with logits."""
        return self.parallel.stage(self.rank) == self.parallel.pp - 1

    def layers(self, config: ModelConfig) -> range:
        """The layers of this rank, numbered as in the whole model."""
        return stage_layers(config.layers, self.parallel.pp)[self.parallel.stage(self.rank)]

    def check(self, config: ModelConfig) -> None:
        """Raise UnsupportedModel, with a sentence, when the model cannot be cut so."""
        why = why_not(self.parallel, layers=config.layers, heads=config.heads, kv_heads=config.kv_heads)
        if why:
            raise UnsupportedModel(why)

    def local(self, config: ModelConfig) -> ModelConfig:
        """The model as this rank sees it: its own heads and its own share of the wide layer."""
        tp = self.parallel.tp
        return replace(
            config,
            heads=config.heads // tp,
            kv_heads=len(lane_heads(config.kv_heads, tp, self.lane)),
            intermediate=len(_share(config.intermediate, tp, self.lane)),
        )

    def weights(self, weights: Weights, config: ModelConfig) -> Weights:
        """``weights`` for a model of the ``local`` configuration; ``config`` is the whole one."""
        return weights if self.parallel.tp == 1 else ShardWeights(weights, config, self.parallel.tp, self.lane)

    def reduced(self, linear: Linear) -> Callable[[Tensor], Tensor]:
        """A linear map cut by columns: the sum over the lanes completes it."""
        return linear if self.lanes is None else Reduced(linear, self.lanes)

    def embedding(self, table: Tensor) -> Callable[[Tensor], Tensor]:
        """Ids [tokens] to rows [tokens, hidden]; ``table`` holds this lane's rows of the vocabulary."""
        if self.lanes is None:
            return lambda ids: F.embedding(ids, table)
        return VocabEmbedding(table, self.lane * table.shape[0], self.lanes)

    def head(self, linear: Linear, vocab_size: int) -> Callable[[Tensor], Tensor]:
        """Hidden [rows, hidden] to logits [rows, vocab]; ``linear`` holds this lane's rows of the vocabulary."""
        return linear if self.lanes is None else VocabHead(linear, vocab_size, self.lanes)


WHOLE = Shard(Parallel(), 0, None)
"""A rank that is the whole instance."""


class Reduced:
    """Partial products of every lane, summed."""

    def __init__(self, linear: Linear, lanes: Lanes) -> None:
        self.linear, self._lanes = linear, lanes

    def __call__(self, x: Tensor) -> Tensor:
        return self._lanes.sum_(self.linear(x))


class VocabEmbedding:
    """Ids that other lanes hold give zeros here; the sum over the lanes is exact."""

    def __init__(self, table: Tensor, first: int, lanes: Lanes) -> None:
        self._table, self._first, self._lanes = table, first, lanes

    def __call__(self, ids: Tensor) -> Tensor:
        local = ids - self._first
        elsewhere = (local < 0) | (local >= self._table.shape[0])
        rows = F.embedding(local.masked_fill(elsewhere, 0), self._table)
        return self._lanes.sum_(rows.masked_fill_(elsewhere.unsqueeze(1), 0))


class VocabHead:
    """Logits of every lane's part of the vocabulary, side by side, without the rows that only fill it up."""

    def __init__(self, linear: Linear, vocab_size: int, lanes: Lanes) -> None:
        self.linear, self._vocab_size, self._lanes = linear, vocab_size, lanes

    def __call__(self, x: Tensor) -> Tensor:
        return self._lanes.gather(self.linear(x))[:, : self._vocab_size]


class ShardWeights:
    """One lane's slices of a whole model's tensors; see the module."""

    def __init__(self, whole: Weights, config: ModelConfig, tp: int, lane: int) -> None:
        self._whole, self._config, self._tp, self._lane = whole, config, tp, lane
        dim = config.head_dim
        each = config.heads // tp
        heads = range(lane * each * dim, (lane + 1) * each * dim)
        kv = lane_heads(config.kv_heads, tp, lane)
        self._spans = {
            "heads": (heads, config.heads * dim),
            "kv": (range(kv.start * dim, kv.stop * dim), config.kv_heads * dim),
            "wide": (_share(config.intermediate, tp, lane), config.intermediate),
        }

    def has(self, name: str) -> bool:
        return self._whole.has(name)

    def take(self, name: str, shape: tuple[int, ...], cut: Cut | None = None) -> Tensor:
        """The lane's slice of the named tensor; ``shape`` is the slice's own, but for a vocabulary: that is whole."""
        module, _, kind = name.rpartition(".")
        layer = module.rpartition(".")[2]
        if layer in _VOCABULARY:
            return self._rows_of_vocabulary(name, shape)
        if layer in _BY_ROWS:
            span, total = self._spans[_BY_ROWS[layer]]
            return self._whole.take(name, (total, *shape[1:]), Cut(0, span))
        if layer in _BY_COLUMNS:
            if kind == "bias":
                bias = self._whole.take(name, shape)
                return bias if self._lane == 0 else bias.zero_()
            span, total = self._spans[_BY_COLUMNS[layer]]
            return self._whole.take(name, (shape[0], total), Cut(1, span))
        return self._whole.take(name, shape)

    def _rows_of_vocabulary(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Equal parts for all lanes, the last ones filled up with zeros."""
        rows, width = shape
        each = -(-rows // self._tp)
        span = range(min(rows, self._lane * each), min(rows, (self._lane + 1) * each))
        part = self._whole.take(name, shape, Cut(0, span))
        return part if len(span) == each else torch.cat((part, part.new_zeros(each - len(span), width)))


_BY_ROWS = {
    "q_proj": "heads",
    "k_proj": "kv",
    "v_proj": "kv",
    "gate_proj": "wide",
    "up_proj": "wide",
    "fc1": "wide",
}
_BY_COLUMNS = {"o_proj": "heads", "out_proj": "heads", "down_proj": "wide", "fc2": "wide"}
_VOCABULARY = ("embed_tokens", "lm_head")


def _share(total: int, tp: int, lane: int) -> range:
    """A lane's share of ``total`` columns; shares differ by one at most."""
    return range(total * lane // tp, total * (lane + 1) // tp)
