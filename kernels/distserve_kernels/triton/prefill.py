"""Paged prefill attention: chunks of unequal length of many sequences in one launch. Meaning:
``paged_reference.paged_prefill_attention``.

Grid: [tiles of the longest chunk, heads, sequences]; a tile beyond its sequence's end leaves at once. Tiles of keys
that all rows of the tile see need no mask; only the last few, across the diagonal, have one. Tiles of one sequence
that have most to do come first, so that the last wave is short.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from distserve_kernels.triton.attention import precision, take_tile, widened
from distserve_kernels.triton.tuning import interpreted, tuned

_CONFIGS = [
    triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=warps, num_stages=stages)
    for m, n, warps, stages in ((64, 64, 4, 2), (128, 64, 8, 3), (128, 128, 8, 2), (64, 32, 4, 3))
]
_SMALL = [triton.Config({"BLOCK_M": 16, "BLOCK_N": 32})]


@tuned(_SMALL if interpreted() else _CONFIGS, ["heads", "group", "dim", "size", "wide"])
@triton.jit
def _prefill(
    q_ptr, kv_ptr, tables_ptr, firsts_ptr, starts_ptr, out_ptr, scale_log2,
    q_row, q_head, out_row, out_head, kv_block, kv_pair, kv_head, kv_token, table_row,
    heads, group, dim, size, wide,
    DIM: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    head, sequence = tl.program_id(1), tl.program_id(2)
    first = tl.load(firsts_ptr + sequence)
    count = tl.load(firsts_ptr + sequence + 1) - first
    tile = tl.cdiv(count, BLOCK_M) - 1 - tl.program_id(0)
    if tile >= 0:
        start = tl.load(starts_ptr + sequence)
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        lanes = tl.arange(0, DIM)
        inside = (rows < count)[:, None] & (lanes < dim)[None, :]
        token = (first + rows).to(tl.int64)
        q = tl.load(q_ptr + token[:, None] * q_row + head * q_head + lanes[None, :], mask=inside, other=0.0)
        if WIDEN:
            q = q.to(tl.float32)
        kv_ptr += (head // group) * kv_head
        table_ptr = tables_ptr + sequence.to(tl.int64) * table_row
        end = start + tl.minimum(count, (tile + 1) * BLOCK_M)
        unmasked = (start + tile * BLOCK_M + 1) // BLOCK_N * BLOCK_N  # positions that every row of the tile sees
        mixed = tl.zeros([BLOCK_M, DIM], tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        best = tl.full([BLOCK_M], float("-inf"), tl.float32)
        for low in range(0, unmasked, BLOCK_N):
            mixed, total, best = take_tile(
                q, mixed, total, best, kv_ptr, table_ptr, low, end, start + rows, scale_log2,
                kv_block, kv_pair, kv_token, dim, size, DIM, BLOCK_N, False, WIDEN, PRECISION,
            )  # fmt: skip
        for low in range(unmasked, end, BLOCK_N):
            mixed, total, best = take_tile(
                q, mixed, total, best, kv_ptr, table_ptr, low, end, start + rows, scale_log2,
                kv_block, kv_pair, kv_token, dim, size, DIM, BLOCK_N, True, WIDEN, PRECISION,
            )  # fmt: skip
        out = (mixed / total[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + token[:, None] * out_row + head * out_head + lanes[None, :], out, mask=inside)


def paged_prefill_attention(
    q: Tensor, kv: Tensor, tables: Tensor, firsts: Tensor, starts: Tensor, scale: float, longest: int
) -> Tensor:
    """As the reference; the last dimension of each tensor is contiguous."""
    tokens, heads, dim = q.shape
    sequences = starts.shape[0]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not tokens:
        return out
    _prefill[lambda meta: (triton.cdiv(longest, meta["BLOCK_M"]), heads, sequences)](
        q, kv, tables, firsts, starts, out, scale * math.log2(math.e),
        q.stride(0), q.stride(1), out.stride(0), out.stride(1), *kv.stride()[:4], tables.stride(0),
        heads, heads // kv.shape[2], dim, kv.shape[3], int(longest > 512),
        DIM=max(16, triton.next_power_of_2(dim)), WIDEN=widened(q.dtype), PRECISION=precision(q.dtype),
    )  # fmt: skip
    return out
