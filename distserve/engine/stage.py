"""A rank's part of a forward pass: what ``ShardEngine`` runs, whoever computes it; and the one in torch.

A first stage begins with token ids, every other with what the stage before left; a last stage ends with logits.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from distserve.core.types import StepPlan
from distserve.engine.forward import clear_masked
from distserve.engine.inputs import KvLayout, build_step
from distserve.engine.paged_inputs import PagedInputs
from distserve.engine.pool import KvPool
from distserve.engine.tails import OpenTails
from distserve.models.registry import Model
from distserve.models.step import StepInput


class Stage(Protocol):
    """Runs the parts of a step in order; the parts are the same at every rank."""

    def begin(self) -> None:
        """A step begins."""
        ...

    def __call__(self, part: StepPlan, before: Tensor | None) -> Tensor | None:
        """Write the part's KV; return logits [sampled, vocab], or the residual stream [tokens, hidden] where another
        stage follows. None when no item samples. ``before``: the stream that the stage before left.

        Logits are valid until the next call, a stream as long as it is held. RuntimeError when another rank is gone.
        """
        ...


class TorchStage:
    """A rank's share of a model, operation by operation."""

    def __init__(self, model: Model, pool: KvPool, dtype: torch.dtype, paged: PagedInputs | None = None) -> None:
        """``dtype``: what is computed in; ``paged``: what builds steps over block tables; None: steps gather KV."""
        tensor = pool.tensor
        self._model, self._pool, self._paged = model, pool, paged
        self._layout = KvLayout(tensor.shape[1], tensor.shape[3], pool.block_size, dtype, tensor.device)
        self._tails = OpenTails(pool.block_size)

    def begin(self) -> None:
        self._tails.turn()

    def __call__(self, part: StepPlan, before: Tensor | None) -> Tensor | None:
        return self._model(self._input(part), self._pool.layers, before)

    def _input(self, part: StepPlan) -> StepInput:
        if self._paged is not None:
            return self._paged(part)
        clear_masked(part, self._layout, self._pool, self._tails)
        return build_step(part, self._layout)


class BothStages:
    """Short parts native, longer ones in torch."""

    def __init__(self, native: Stage, torch: Stage, most_rows: int) -> None:
        self._native, self._torch, self._most_rows = native, torch, most_rows

    def begin(self) -> None:
        self._native.begin()
        self._torch.begin()

    def __call__(self, part: StepPlan, before: Tensor | None) -> Tensor | None:
        return (self._native if part.tokens <= self._most_rows else self._torch)(part, before)
