"""Attention of a whole step over paged KV: what every model does between its QKV and its output projection."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distserve.models.step import GatheredKv, PagedKv, StepInput
from distserve_kernels.ops import Ops
from distserve_kernels.paged import LayerKv, PrefillChunk
from distserve_kernels.stored import rounded, take_rows


@dataclass(frozen=True, slots=True)
class Angles:
    """Rotary angles of one step: of its tokens [tokens, 1, dim], or of all positions [length, dim] for paged kernels,
    which look up their own. ``sin`` carries the sign, see ``distserve_kernels.rotary``.
    """

    cos: Tensor
    sin: Tensor


def angles_of(step: StepInput, cos: Tensor, sin: Tensor) -> Angles:
    """The angles that ``attention`` wants; cos, sin: [length, 1, dim] of all positions."""
    if isinstance(step.kv, PagedKv):
        return Angles(cos.squeeze(1), sin.squeeze(1))
    return Angles(cos.index_select(0, step.positions), sin.index_select(0, step.positions))


def attention(ops: Ops, qkv: Tensor, angles: Angles | None, step: StepInput, layer: LayerKv, scale: float) -> Tensor:
    """Rotate Q and K where there are angles, write the step's KV, then attend.

    qkv: [tokens, heads + 2 * kv_heads, dim], Q before K before V; scratch afterwards. Returns [tokens, heads, dim].
    """
    if isinstance(step.kv, PagedKv):
        return _paged(ops, qkv, angles, step.positions, step.kv, layer, scale)
    heads = qkv.shape[1] - 2 * layer.kv_heads
    if angles is not None:
        ops.rotary_(qkv[:, : heads + layer.kv_heads], angles.cos, angles.sin)
    return _gathered(ops, qkv[:, :heads], qkv[:, heads:], step.kv, layer, scale)


def _paged(
    ops: Ops, qkv: Tensor, angles: Angles | None, positions: Tensor, kv: PagedKv, layer: LayerKv, scale: float
) -> Tensor:
    """No shape and no launch depends on what is in a tensor: a CUDA graph may hold all of it."""
    heads = qkv.shape[1] - 2 * layer.kv_heads
    if angles is None:
        ops.paged.kv_write(qkv[:, heads:], layer.blocks, kv.slots)
    else:
        ops.paged.rotary_kv_write(qkv, angles.cos, angles.sin, positions, layer.blocks, kv.slots)
    q, parts = qkv[:, :heads], []
    if (chunks := kv.prefill) is not None:
        rows = q[: kv.prefill_tokens]
        parts.append(
            ops.paged.prefill_attention(
                rows, layer.blocks, chunks.tables, chunks.firsts, chunks.starts, scale, chunks.longest
            )
        )
    if (singles := kv.decode) is not None:
        rows = q[kv.prefill_tokens :]
        parts.append(
            ops.paged.decode_attention(rows, layer.blocks, singles.tables, singles.lengths, scale, singles.longest)
        )
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _gathered(ops: Ops, q: Tensor, new: Tensor, kv: GatheredKv, layer: LayerKv, scale: float) -> Tensor:
    new = rounded(new, layer.block_rows.dtype)  # a chunk sees its own KV as later steps will: chunks change no token
    ops.kv_write(layer, kv.write_rows, new)
    parts = []
    for chunk in kv.prefill:
        rows = slice(chunk.first, chunk.first + chunk.length)
        k, v = _keys_and_values(new[rows], chunk, layer)
        parts.append(ops.prefill_attention(q[rows], k, v, chunk.start, scale))
    if kv.decode:
        parts.append(ops.decode_attention(q[kv.prefill_tokens :], layer, kv.decode, scale))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _keys_and_values(fresh: Tensor, chunk: PrefillChunk, layer: LayerKv) -> tuple[Tensor, Tensor]:
    """[kv_heads, start + length, dim] each: the chunk's own when nothing precedes it, else gathered from the pool."""
    heads = layer.kv_heads
    if chunk.gather is None:
        both = fresh.transpose(0, 1).contiguous()
        return both[:heads], both[heads:]
    both = take_rows(layer.block_rows, chunk.gather, fresh.dtype).view(2 * heads, -1, layer.head_dim)
    seen = chunk.start + chunk.length
    return both[:heads, :seen], both[heads:, :seen]
