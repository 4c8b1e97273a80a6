"""Paged attention for one new token a sequence: o = softmax(q·Kᵀ·scale + mask)·V over scattered blocks.

q, o: [sequences, heads, dim]   K, V: gathered from a layer's block rows as [sequences, kv_heads, length, dim]

One gather copies the blocks of a group's sequences, K and V together, into the layout that the matrix products want;
the query heads that share a KV head are the rows of one product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distserve_kernels.paged import DecodeGroup, LayerKv
from distserve_kernels.stored import take_rows

FUSED_SEQUENCES = 2
"""Up to here torch's fused kernel is faster (fewer calls), above it the batched products are (better arithmetic)."""


def decode_attention(q: Tensor, layer: LayerKv, groups: tuple[DecodeGroup, ...], scale: float) -> Tensor:
    """Attention of every row of ``q``; the rows of ``groups`` cover them in order."""
    if len(groups) == 1:
        return _group(q, layer, groups[0], scale)
    return torch.cat([_group(q[g.first : g.first + g.count], layer, g, scale) for g in groups])


def _group(q: Tensor, layer: LayerKv, group: DecodeGroup, scale: float) -> Tensor:
    """Attention of one group. q: [count, heads, dim]."""
    count, heads, dim = q.shape
    kv_heads = layer.kv_heads
    gathered = take_rows(layer.block_rows, group.gather, q.dtype).view(2, count * kv_heads, -1, dim)
    keys, values = gathered[0], gathered[1]
    rows = q.reshape(count * kv_heads, heads // kv_heads, dim)
    if count <= FUSED_SEQUENCES:
        out = F.scaled_dot_product_attention(
            rows[None], keys[None], values[None], attn_mask=group.mask[None], scale=scale
        )
    else:
        scores = torch.baddbmm(group.mask, rows, keys.transpose(1, 2), alpha=scale)
        out = torch.bmm(torch.softmax(scores, -1), values)
    return out.view(count, heads, dim)
