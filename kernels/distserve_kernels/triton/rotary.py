"""Rotary positions and the KV write in one pass over a step's QKV; and the write alone, for models without them.
Meaning: ``paged_reference.rotary_kv_write``, ``paged_kv_write``.

A program takes one token and some of its heads; each is rotated in registers and stored once, where it belongs: Q in
place, K and V in the pool. Angles and products in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from distserve_kernels.triton.tuning import tuned

_CONFIGS = [triton.Config({"HEADS": heads}, num_warps=warps) for heads, warps in ((8, 4), (16, 4), (4, 2))]


@tuned(_CONFIGS, ["heads", "kv_heads", "dim"], restore=["qkv_ptr"])
@triton.jit
def _rotary_kv_write(
    qkv_ptr, cos_ptr, sin_ptr, positions_ptr, kv_ptr, slots_ptr,
    qkv_token, qkv_head, angle_row, kv_block, kv_pair, kv_head, kv_token,
    heads, kv_heads, dim, size,
    HALF: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    half = dim // 2
    lane = tl.arange(0, HALF)
    inside = (head < heads + 2 * kv_heads)[:, None] & (lane < half)[None, :]
    position = tl.load(positions_ptr + token)
    angles = position * angle_row + lane
    cos1 = tl.load(cos_ptr + angles, mask=lane < half, other=0.0).to(tl.float32)[None, :]
    cos2 = tl.load(cos_ptr + angles + half, mask=lane < half, other=0.0).to(tl.float32)[None, :]
    sin1 = tl.load(sin_ptr + angles, mask=lane < half, other=0.0).to(tl.float32)[None, :]
    sin2 = tl.load(sin_ptr + angles + half, mask=lane < half, other=0.0).to(tl.float32)[None, :]
    at = qkv_ptr + token * qkv_token + head[:, None] * qkv_head + lane[None, :]
    x1 = tl.load(at, mask=inside, other=0.0)
    x2 = tl.load(at + half, mask=inside, other=0.0)
    wide1, wide2 = x1.to(tl.float32), x2.to(tl.float32)
    turned = (head < heads + kv_heads)[:, None]
    y1 = tl.where(turned, (wide1 * cos1 + wide2 * sin1).to(x1.dtype), x1)
    y2 = tl.where(turned, (wide2 * cos2 + wide1 * sin2).to(x2.dtype), x2)
    is_query = inside & (head < heads)[:, None]
    tl.store(at, y1, mask=is_query)
    tl.store(at + half, y2, mask=is_query)
    slot = tl.load(slots_ptr + token)
    own = head - heads  # K heads, then V heads
    pair = tl.where(own >= kv_heads, 1, 0)
    target = kv_ptr + (slot // size) * kv_block + (slot % size) * kv_token + pair * kv_pair + (own % kv_heads) * kv_head
    is_kv = inside & ((head >= heads) & (slot >= 0))[:, None]
    tl.store(target[:, None] + lane[None, :], y1, mask=is_kv)
    tl.store(target[:, None] + lane[None, :] + half, y2, mask=is_kv)


def rotary_kv_write(qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, kv: Tensor, slots: Tensor) -> None:
    """As the reference; the last dimension of each tensor is contiguous."""
    tokens, total, dim = qkv.shape
    kv_heads = kv.shape[2]
    if not tokens:
        return
    _rotary_kv_write[lambda meta: (tokens, triton.cdiv(total, meta["HEADS"]))](
        qkv, cos, sin, positions, kv, slots,
        qkv.stride(0), qkv.stride(1), cos.stride(0), *kv.stride()[:4],
        total - 2 * kv_heads, kv_heads, dim, kv.shape[3], HALF=triton.next_power_of_2(dim // 2),
    )  # fmt: skip


@triton.jit
def _kv_write(
    new_ptr, kv_ptr, slots_ptr, new_token, new_head, kv_block, kv_pair, kv_head, kv_token, kv_heads, dim, size,
    HEADS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head, lane = tl.arange(0, HEADS), tl.arange(0, DIM)
    slot = tl.load(slots_ptr + token)
    inside = ((head < 2 * kv_heads) & (slot >= 0))[:, None] & (lane < dim)[None, :]
    words = tl.load(new_ptr + token * new_token + head[:, None] * new_head + lane[None, :], mask=inside, other=0.0)
    row = tl.where(head >= kv_heads, 1, 0) * kv_pair + (head % kv_heads) * kv_head
    target = kv_ptr + (slot // size) * kv_block + (slot % size) * kv_token + row
    tl.store(target[:, None] + lane[None, :], words, mask=inside)


def paged_kv_write(new: Tensor, kv: Tensor, slots: Tensor) -> None:
    """As the reference; the last dimension of each tensor is contiguous."""
    tokens, total, dim = new.shape
    if not tokens:
        return
    _kv_write[(tokens,)](
        new, kv, slots, new.stride(0), new.stride(1), *kv.stride()[:4], total // 2, dim, kv.shape[3],
        HEADS=triton.next_power_of_2(total), DIM=triton.next_power_of_2(dim),
    )  # fmt: skip
