"""Attention of a whole step over paged KV: what every model does between its QKV and its output projection."""

from __future__ import annotations

import torch
from torch import Tensor

from distserve.models.step import StepInput
from distserve_kernels.ops import Ops
from distserve_kernels.paged import LayerKv, PrefillChunk


def paged_attention(ops: Ops, q: Tensor, kv: Tensor, step: StepInput, layer: LayerKv, scale: float) -> Tensor:
    """Write the step's KV, then attend. q: [tokens, heads, dim]; kv: [tokens, 2 * kv_heads, dim] → like q."""
    ops.kv_write(layer, step.write_rows, kv)
    parts = []
    for chunk in step.prefill:
        rows = slice(chunk.first, chunk.first + chunk.length)
        k, v = _keys_and_values(kv[rows], chunk, layer)
        parts.append(ops.prefill_attention(q[rows], k, v, chunk.start, scale))
    if step.decode:
        parts.append(ops.decode_attention(q[step.prefill_tokens :], layer, step.decode, scale))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _keys_and_values(fresh: Tensor, chunk: PrefillChunk, layer: LayerKv) -> tuple[Tensor, Tensor]:
    """[kv_heads, start + length, dim] each: the chunk's own when nothing precedes it, else gathered from the pool."""
    heads = layer.kv_heads
    if chunk.gather is None:
        both = fresh.transpose(0, 1).contiguous()
        return both[:heads], both[heads:]
    both = layer.block_rows.index_select(0, chunk.gather).view(2 * heads, -1, layer.head_dim)
    seen = chunk.start + chunk.length
    return both[:heads, :seen], both[heads:, :seen]
