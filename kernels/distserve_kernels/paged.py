"""How attention finds its KV: views of one layer of the paged pool, and which rows of them a step reads and writes.

The pool of a rank is one tensor ``[blocks, layers, 2, kv_heads, block_size, head_dim]``. Seen as rows, layer 0's K of
head h of block b is block row ``b * layers * 2 * kv_heads + h``, its V ``kv_heads`` rows further; layer l starts
``l * 2 * kv_heads`` rows later. A view that begins at the layer's offset lets every layer use the *same* row numbers,
so that they are computed once a step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LayerKv:
    """One layer's KV in the pool: views of the same memory; the rows begin at the layer's first."""

    block_rows: Tensor  # [rows, block_size * head_dim]
    token_rows: Tensor  # [rows * block_size, head_dim]
    kv_heads: int
    head_dim: int
    blocks: Tensor  # [blocks, 2 (K, V), kv_heads, block_size, head_dim], for operations that take block tables


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Adjacent tokens of one sequence, rows ``first .. first + length`` of the step's token matrix.

    They attend to themselves, causally, and to the ``start`` positions before them. ``gather`` lists the block rows of
    all ``start + length`` positions, as [2, kv_heads, blocks] flattened; None when nothing is cached (start == 0).
    """

    first: int
    length: int
    start: int
    gather: Tensor | None


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Sequences of similar length that compute one token each, rows ``first .. first + count``.

    ``gather`` lists block rows as [2, count, kv_heads, blocks] flattened, shorter sequences padded with a block of
    their own. ``mask`` [count * kv_heads, 1, blocks * block_size] is 0 at valid positions and -inf elsewhere.
    """

    first: int
    count: int
    gather: Tensor
    mask: Tensor


def layer_views(pool: Tensor) -> tuple[LayerKv, ...]:
    """The views of every layer of ``pool`` [blocks, layers, 2, kv_heads, block_size, head_dim], contiguous."""
    _, layers, _, kv_heads, block_size, head_dim = pool.shape
    blocks = pool.view(-1, block_size * head_dim)
    tokens = pool.view(-1, head_dim)
    per_layer = 2 * kv_heads
    return tuple(
        LayerKv(blocks[i * per_layer :], tokens[i * per_layer * block_size :], kv_heads, head_dim, pool[:, i])
        for i in range(layers)
    )


def block_rows(blocks: Tensor, layers: int, kv_heads: int) -> Tensor:
    """Block rows of K and V of every head, [2, kv_heads, *blocks.shape], for block numbers ``blocks`` (int64)."""
    part = torch.arange(2 * kv_heads, device=blocks.device).view(2, kv_heads, *(1,) * blocks.dim())
    return part + blocks * (layers * 2 * kv_heads)


def token_rows(blocks: Tensor, offsets: Tensor, layers: int, kv_heads: int, block_size: int) -> Tensor:
    """Token rows of K and V of every head, [tokens * 2 * kv_heads], from each token's block and offset in it."""
    part = torch.arange(2 * kv_heads, device=blocks.device)
    rows = (blocks * (layers * 2 * kv_heads)).unsqueeze(1) + part
    return (rows * block_size + offsets.unsqueeze(1)).flatten()
