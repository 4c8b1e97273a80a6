"""KV between the pool and contiguous staging, some layers and heads of each block, with the checksum on the way; and
the checksum alone. Meaning: ``paged_reference.kv_gather``, ``kv_scatter``, ``staging_checksum``.

In the pool the chosen heads of one block, layer and K-or-V are one run of words, and in staging the next run follows.
Grid: [blocks, layers * 2, parts of a run]. Each program also leaves its share of the sum, of which nothing depends on
the order; the rest is one small sum.

The tile follows from the run and is not tuned: a plain copy is as fast with any large one, and tuning would let the
first hand-off of every shape wait.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

GOLDEN: tl.constexpr = tl.constexpr(-7046029254386353131)
MIX: tl.constexpr = tl.constexpr(-4658895280553007687)
LEAST_BLOCK, MOST_BLOCK = 256, 4096
WARPS = 8


@triton.jit
def _mixed(words, places):
    """What each 32-bit word adds to the checksum: a bijection of it, another one for each place."""
    mixed = (words.to(tl.int64) ^ ((places + 1) * GOLDEN)) * MIX
    mixed = mixed ^ ((mixed >> 29) & 0x7FFFFFFFF)
    return mixed * GOLDEN


@triton.jit
def _move(
    pool_ptr, staging_ptr, blocks_ptr, sums_ptr, block_words, pair_words, first_word, run_words, pairs,
    INTO_POOL: tl.constexpr, SUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at, pair, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    word = part * BLOCK + tl.arange(0, BLOCK)
    inside = word < run_words
    block = tl.load(blocks_ptr + at).to(tl.int64)
    there = pool_ptr + block * block_words + first_word + pair.to(tl.int64) * pair_words + word
    place = (at * pairs + pair) * run_words + word
    if INTO_POOL:
        words = tl.load(staging_ptr + place, mask=inside, other=0)
        tl.store(there, words, mask=inside)
    else:
        words = tl.load(there, mask=inside, other=0)
        tl.store(staging_ptr + place, words, mask=inside)
    if SUM:
        share = tl.sum(tl.where(inside, _mixed(words, place), 0), 0)
        program = (at * pairs + pair) * tl.num_programs(2) + part
        tl.store(sums_ptr + program, share)


@triton.jit
def _checksum(staging_ptr, sums_ptr, count, BLOCK: tl.constexpr):
    part = tl.program_id(0)
    place = part.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    words = tl.load(staging_ptr + place, mask=inside, other=0)
    tl.store(sums_ptr + part, tl.sum(tl.where(inside, _mixed(words, place), 0), 0))


def kv_gather(pool: Tensor, blocks: Tensor, layers: range, heads: range, staging: Tensor, checksum: bool) -> Tensor:
    """As the reference. A run (chosen heads * block_size * dim elements) must be whole 32-bit words."""
    return _launch(pool, blocks, layers, heads, staging, checksum, into_pool=False)


def kv_scatter(pool: Tensor, blocks: Tensor, layers: range, heads: range, staging: Tensor, checksum: bool) -> Tensor:
    """As the reference."""
    return _launch(pool, blocks, layers, heads, staging, checksum, into_pool=True)


def staging_checksum(staging: Tensor) -> Tensor:
    """As the reference."""
    words = staging.reshape(-1).view(torch.int32)
    sums = torch.empty(triton.cdiv(len(words), MOST_BLOCK), dtype=torch.int64, device=words.device)
    if len(words):
        _checksum[(len(sums),)](words, sums, len(words), BLOCK=MOST_BLOCK, num_warps=WARPS)
    return sums.sum().reshape(1)


def _launch(
    pool: Tensor, blocks: Tensor, layers: range, heads: range, staging: Tensor, checksum: bool, into_pool: bool
) -> Tensor:
    words = pool.element_size() * pool.shape[4] * pool.shape[5]  # bytes of one head's rows
    if words * len(heads) % 4 or words * heads.start % 4 or words * pool.shape[3] % 4:
        raise ValueError(f"{len(heads)} heads of {words} bytes are no whole 32-bit words")
    pair_words, run_words = words * pool.shape[3] // 4, words * len(heads) // 4
    first = layers.start * 2 * pair_words + words * heads.start // 4
    if not len(blocks) or not run_words or not layers:
        return torch.zeros(1, dtype=torch.int64, device=pool.device)
    tile = min(MOST_BLOCK, max(LEAST_BLOCK, triton.next_power_of_2(run_words)))
    grid = len(blocks), 2 * len(layers), triton.cdiv(run_words, tile)
    shares = grid[0] * grid[1] * grid[2] if checksum else 1
    sums = torch.empty(shares, dtype=torch.int64, device=pool.device)
    _move[grid](
        pool.view(-1).view(torch.int32),
        staging.view(-1).view(torch.int32), blocks, sums,
        pool.stride(0) * pool.element_size() // 4, pair_words, first, run_words, 2 * len(layers),
        INTO_POOL=into_pool, SUM=checksum, BLOCK=tile, num_warps=WARPS,
    )  # fmt: skip
    return sums.sum().reshape(1) if checksum else torch.zeros(1, dtype=torch.int64, device=pool.device)
