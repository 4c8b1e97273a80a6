"""Paged decode attention, split over the context (flash-decoding): one new token a sequence over scattered blocks.
Meaning: ``paged_reference.paged_decode_attention``.

First launch, grid [sequences, kv_heads, splits]: the query heads that share a KV head are the rows of one product, so
that K and V are read once; each split leaves its mixed values, sum and maximum in float32. Second launch, grid
[sequences, heads]: the splits become one. The number of splits depends on the shapes and ``longest`` alone, not on what
is in ``lengths``: nothing is read back, and a CUDA graph may hold both launches.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from distserve_kernels.triton.attention import precision, take_tile, widened
from distserve_kernels.triton.tuning import interpreted, tuned

MOST_SPLITS = 64
LEAST_SPLIT_TOKENS = 256
PROGRAMS_A_PROCESSOR = 4
_CONFIGS = [
    triton.Config({"BLOCK_N": n}, num_warps=warps, num_stages=stages)
    for n, warps, stages in ((64, 4, 3), (128, 4, 2), (32, 2, 4), (128, 8, 3))
]
_SMALL = [triton.Config({"BLOCK_N": 32})]


@tuned(_SMALL if interpreted() else _CONFIGS, ["kv_heads", "group", "dim", "size", "splits"])
@triton.jit
def _decode(
    q_ptr, kv_ptr, tables_ptr, lengths_ptr, mixed_ptr, stats_ptr, scale_log2,
    q_row, q_head, kv_block, kv_pair, kv_head, kv_token, table_row,
    kv_heads, group, dim, size, splits,
    DIM: tl.constexpr, GROUP: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    sequence, kv_at, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths_ptr + sequence)
    share = tl.cdiv(tl.cdiv(length, splits), BLOCK_N) * BLOCK_N
    low, end = split * share, tl.minimum(length, (split + 1) * share)
    member, lanes = tl.arange(0, GROUP), tl.arange(0, DIM)
    inside = (member < group)[:, None] & (lanes < dim)[None, :]
    head = kv_at * group + member
    q = tl.load(q_ptr + sequence * q_row + head[:, None] * q_head + lanes[None, :], mask=inside, other=0.0)
    if WIDEN:
        q = q.to(tl.float32)
    kv_ptr += kv_at * kv_head
    table_ptr = tables_ptr + sequence * table_row
    mixed = tl.zeros([GROUP, DIM], tl.float32)
    total = tl.zeros([GROUP], tl.float32)
    best = tl.full([GROUP], float("-inf"), tl.float32)
    last = tl.zeros([GROUP], tl.int32) + (length - 1)
    for n in range(low, end, BLOCK_N):
        mixed, total, best = take_tile(
            q, mixed, total, best, kv_ptr, table_ptr, n, end, last, scale_log2,
            kv_block, kv_pair, kv_token, dim, size, DIM, BLOCK_N, True, WIDEN, PRECISION,
        )  # fmt: skip
    place = (sequence * kv_heads * group + head) * splits + split
    tl.store(mixed_ptr + place[:, None] * dim + lanes[None, :], mixed, mask=inside)
    tl.store(stats_ptr + place * 2, best, mask=member < group)
    tl.store(stats_ptr + place * 2 + 1, total, mask=member < group)


@triton.jit
def _reduce(mixed_ptr, stats_ptr, out_ptr, heads, dim, splits, DIM: tl.constexpr, SPLITS: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * heads + tl.program_id(1)
    split, lanes = tl.arange(0, SPLITS), tl.arange(0, DIM)
    there = split < splits
    best = tl.load(stats_ptr + (place * splits + split) * 2, mask=there, other=float("-inf"))
    total = tl.load(stats_ptr + (place * splits + split) * 2 + 1, mask=there, other=0.0)
    # A split with nothing in it has best -inf and total 0; with no split at all (a padding row) everything is 0.
    highest = tl.maximum(tl.max(best, 0), -1e30)
    weight = tl.exp2(best - highest)
    inside = there[:, None] & (lanes < dim)[None, :]
    mixed = tl.load(mixed_ptr + (place * splits + split)[:, None] * dim + lanes[None, :], mask=inside, other=0.0)
    whole = tl.sum(total * weight, 0)
    out = tl.sum(mixed * weight[:, None], 0) / tl.where(whole > 0, whole, 1.0)
    tl.store(out_ptr + place * dim + lanes, out.to(out_ptr.dtype.element_ty), mask=lanes < dim)


def paged_decode_attention(
    q: Tensor, kv: Tensor, tables: Tensor, lengths: Tensor, scale: float, longest: int
) -> Tensor:
    """As the reference; the last dimension of each tensor is contiguous."""
    sequences, heads, dim = q.shape
    kv_heads, size = kv.shape[2], kv.shape[3]
    out = torch.empty(sequences, heads, dim, dtype=q.dtype, device=q.device)
    if not sequences:
        return out
    splits = split_count(sequences * kv_heads, longest, q.device)
    mixed = torch.empty(sequences, heads, splits, dim, dtype=torch.float32, device=q.device)
    stats = torch.empty(sequences, heads, splits, 2, dtype=torch.float32, device=q.device)
    wide = max(16, triton.next_power_of_2(dim))
    group = heads // kv_heads
    _decode[(sequences, kv_heads, splits)](
        q, kv, tables, lengths, mixed, stats, scale * math.log2(math.e),
        q.stride(0), q.stride(1), *kv.stride()[:4], tables.stride(0), kv_heads, group, dim, size, splits,
        DIM=wide, GROUP=max(16, triton.next_power_of_2(group)), WIDEN=widened(q.dtype), PRECISION=precision(q.dtype),
    )  # fmt: skip
    _reduce[(sequences, heads)](mixed, stats, out, heads, dim, splits, DIM=wide, SPLITS=triton.next_power_of_2(splits))
    return out


def split_count(programs: int, longest: int, device: torch.device) -> int:
    """Into how many parts to cut a context so that every processor has work, and no part is too small for one.

    A power of two: every number of splits is a case that the tuner measures, and must not be met first while serving.
    """
    wanted = triton.cdiv(PROGRAMS_A_PROCESSOR * _processors(device), programs)
    return int(triton.next_power_of_2(max(1, min(wanted, MOST_SPLITS, longest // LEAST_SPLIT_TOKENS))))


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
