"""What the two attentions share: one tile of keys and values, found through the block table and taken into the running
softmax (FlashAttention-2, arXiv 2307.08691): maximum, sum and mixed values of each row, in float32, exponents base 2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from distserve_kernels.triton.tuning import interpreted


def precision(dtype: torch.dtype) -> str:
    """How ``tl.dot`` multiplies: float32 exactly, whatever the tensor cores would rather do."""
    return "ieee" if dtype == torch.float32 else "tf32"


def widened(dtype: torch.dtype) -> bool:
    """Whether products are made in float32: Triton's interpreter multiplies the bits of bfloat16 as whole numbers."""
    return interpreted() and dtype == torch.bfloat16


@triton.jit
def take_tile(
    q, mixed, total, best, kv_ptr, table_ptr, low, end, rows, scale_log2, kv_block, kv_pair, kv_token, dim, size,
    DIM: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Take positions [low, low + BLOCK_N) below ``end`` into (mixed [M, DIM], total [M], best [M]).

    rows [M]: the last position each row sees, looked at only when MASKED. ``kv_ptr`` points at the KV head's K. WIDEN:
    multiply in float32 (see ``widened``); ``q`` is float32 then.
    """
    positions = low + tl.arange(0, BLOCK_N)
    lanes = tl.arange(0, DIM)
    there = positions < end
    block = tl.load(table_ptr + positions // size, mask=there, other=0).to(tl.int64)
    at = block * kv_block + (positions % size) * kv_token
    k = tl.load(kv_ptr + at[None, :] + lanes[:, None], mask=there[None, :] & (lanes < dim)[:, None], other=0.0)
    if WIDEN:
        k = k.to(tl.float32)
    scores = tl.dot(q, k, input_precision=PRECISION) * scale_log2
    if MASKED:
        seen = (positions[None, :] <= rows[:, None]) & there[None, :]
        scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(best, tl.max(scores, 1))
    p = tl.exp2(scores - higher[:, None])
    shrink = tl.exp2(best - higher)
    v_at = kv_ptr + kv_pair + at[:, None] + lanes[None, :]
    v = tl.load(v_at, mask=there[:, None] & (lanes < dim)[None, :], other=0.0)
    if WIDEN:
        v = v.to(tl.float32)
    mixed = mixed * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    return mixed, total * shrink + tl.sum(p, 1), higher
