"""A forward pass over a plan: what the engine runs, whoever computes it; and the one in torch, for every device."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from distserve.core.types import StepPlan
from distserve.engine.inputs import KvLayout, begun_blocks, build_step
from distserve.engine.pool import KvPool
from distserve.engine.stopping import StepGivenUp, StopSign
from distserve.engine.tails import OpenTails
from distserve.models.registry import Model
from distserve_kernels.paged import LayerKv
from distserve_kernels.streams import settle

Forward = Callable[[StepPlan], Tensor | None]
"""Write the plan's KV; return logits [sampled, vocab] of the items that sample, in item order, None when none does.

One that is given a ``StopSign`` may raise StepGivenUp; nothing of the step is under way any more then.
"""


class TorchForward:
    """A model layer by layer, operation by operation; between two layers the step may be given up."""

    def __init__(
        self, model: Model, pool: KvPool, sign: StopSign | None = None, *, dtype: torch.dtype | None = None
    ) -> None:
        """``dtype``: what is computed in; None: what KV is kept in."""
        _, layers, _, kv_heads, block_size, _ = pool.tensor.shape
        self._model, self._pool = model, pool
        self._sign = sign if sign is not None else StopSign()
        self._layout = KvLayout(layers, kv_heads, block_size, dtype or pool.tensor.dtype, pool.tensor.device)
        self._tails = OpenTails(block_size)

    def __call__(self, plan: StepPlan) -> Tensor | None:
        self._tails.turn()
        clear_masked(plan, self._layout, self._pool, self._tails)
        try:
            return self._model(build_step(plan, self._layout), stoppable(self._pool, self._sign, plan.number))
        except StepGivenUp:
            settle(self._layout.device)  # what was launched still writes into the step's blocks
            raise


def stoppable(pool: KvPool, sign: StopSign, number: int) -> Iterator[LayerKv]:
    """The layers' KV; the model takes one as it comes to a layer, which is when the step may be given up."""
    for layer in pool.layers:
        sign.check(number)
        yield layer


def clear_masked(plan: StepPlan, layout: KvLayout, pool: KvPool, tails: OpenTails) -> None:
    """Zero what ``plan`` will read only through a mask: the rest of blocks that it begins, or finds half full."""
    begun = begun_blocks(plan, layout)
    if begun.numel():
        pool.clear(begun)
    for block, offset in tails.strange(plan):
        pool.clear_tail(block, offset)
