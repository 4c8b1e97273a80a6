"""A forward pass over a plan: what the engine runs, whoever computes it; and the one in torch, for every device."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from distserve.core.types import StepPlan
from distserve.engine.inputs import KvLayout, begun_blocks, build_step
from distserve.engine.pool import KvPool
from distserve.models.registry import Model

Forward = Callable[[StepPlan], Tensor | None]
"""Write the plan's KV; return logits [sampled, vocab] of the items that sample, in item order, None when none does."""


class TorchForward:
    """A model layer by layer, operation by operation."""

    def __init__(self, model: Model, pool: KvPool) -> None:
        _, layers, _, kv_heads, block_size, _ = pool.tensor.shape
        self._model, self._pool = model, pool
        self._layout = KvLayout(layers, kv_heads, block_size, pool.tensor.dtype, pool.tensor.device)

    def __call__(self, plan: StepPlan) -> Tensor | None:
        begun = begun_blocks(plan, self._layout)
        if begun.numel():
            self._pool.clear(begun)
        return self._model(build_step(plan, self._layout), self._pool.layers)
