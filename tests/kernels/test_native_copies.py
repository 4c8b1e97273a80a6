"""Copies that sum up: the same bytes and the same checksums as two passes yield, and nothing else is written."""

from __future__ import annotations

import ctypes
import random

import numpy as np
import pytest
import torch
import xxhash

from distserve.engine.native import native_copies
from distserve_kernels.kv_copy import PagedBytes
from distserve_kernels.kv_part import StagedSlice

BLOCKS, BLOCK = 24, 16


@pytest.fixture(scope="module")
def native() -> ctypes.CDLL:
    library = native_copies("auto")
    if library is None:
        pytest.skip("no C++ compiler here: see the log")
    return library


def pool(seed: int, head_dim: int = 16) -> torch.Tensor:
    """Rows of 1 KiB (float32, 16 tokens of 16 numbers): six in a block."""
    made = torch.randint(0, 256, (BLOCKS * 6 * BLOCK * head_dim * 4,), generator=torch.Generator().manual_seed(seed))
    return made.to(torch.uint8).view(torch.float32).view(BLOCKS, 1, 2, 3, BLOCK, head_dim)


def room(nbytes: int, shift: int) -> np.ndarray:
    """Staging that does not begin where vectors like to."""
    return np.zeros(nbytes + shift, dtype=np.uint8)[shift:]


@pytest.mark.parametrize("shift", [0, 1, 24])
@pytest.mark.parametrize("blocks", [(3,), (3, 4, 5, 6), (9, 3, 4, 22, 23, 0)])
def test_gathering_sums_up_what_it_copies(native: ctypes.CDLL, blocks: tuple[int, ...], shift: int) -> None:
    memory = pool(1)
    fused, plain = PagedBytes(memory, native), PagedBytes(memory)
    seed = random.Random(shift).getrandbits(64)
    one, two = (room(len(blocks) * fused.block_bytes + 100, shift) for _ in range(2))
    assert fused.gather(blocks, one, seed=seed) == plain.gather(blocks, two, seed=seed)
    assert np.array_equal(one, two)  # and nothing was written behind them
    staged = one[: len(blocks) * fused.block_bytes]
    assert fused.gather(blocks, one, seed=seed) == xxhash.xxh3_64_intdigest(staged.tobytes(), seed)


@pytest.mark.parametrize("rows", [(0, 1), (2, 5), (0, 6)])
def test_gathering_some_rows_of_a_block(native: ctypes.CDLL, rows: tuple[int, int]) -> None:
    memory = pool(2)
    fused, plain = PagedBytes(memory, native), PagedBytes(memory)
    one, two = (room(fused.block_bytes, 0) for _ in range(2))
    assert fused.gather((7,), one, rows, 99) == plain.gather((7,), two, rows, 99)
    assert np.array_equal(one, two)


@pytest.mark.parametrize("ahead_bytes", [0, 241, 1023, 1024, 1025, 3000, 6 * 1024, 50_001])
def test_scattering_sums_up_what_comes_next(native: ctypes.CDLL, ahead_bytes: int) -> None:
    """Less, as much and more is ahead than is written; the pool is changed where it should be and nowhere else."""
    draw = np.random.default_rng(3)
    staged = draw.integers(0, 256, 3 * 6 * 1024, dtype=np.uint8)
    coming = draw.integers(0, 256, ahead_bytes + 1, dtype=np.uint8)[1:]
    ahead = StagedSlice(coming, 1 << 63 | 5) if ahead_bytes else None
    one, two = pool(4), pool(4)
    place = (BLOCK, 2 * BLOCK, 2 * BLOCK, 5 * BLOCK)
    table = (0, 0, 11, 12, 4)
    found = PagedBytes(one, native).scatter(table, staged, *place, ahead=ahead)
    assert found == PagedBytes(two).scatter(table, staged, *place, ahead=ahead)
    assert found == (xxhash.xxh3_64_intdigest(coming.tobytes(), 1 << 63 | 5) if ahead_bytes else 0)
    assert torch.equal(one.view(torch.uint8), two.view(torch.uint8))


def test_a_last_block_that_is_not_full_is_written_token_by_token(native: ctypes.CDLL) -> None:
    staged = np.random.default_rng(5).integers(0, 256, 2 * 6 * 1024, dtype=np.uint8)
    one, two = pool(6), pool(6)
    ahead = StagedSlice(staged[:2000], 7)
    sums = [
        PagedBytes(p, n).scatter((9, 1), staged, BLOCK, 0, 0, 21, ahead=ahead) for p, n in ((one, native), (two, None))
    ]
    assert sums[0] == sums[1] == ahead.digest()
    assert torch.equal(one.view(torch.uint8), two.view(torch.uint8))


def test_blocks_that_are_not_of_whole_kibibytes_go_the_plain_way(native: ctypes.CDLL) -> None:
    memory = pool(7, head_dim=12)
    one, two = PagedBytes(memory, native), PagedBytes(memory)
    first, second = (room(2 * one.block_bytes, 0) for _ in range(2))
    assert one.gather((1, 5), first, seed=1) == two.gather((1, 5), second, seed=1)
    assert np.array_equal(first, second)


def test_staging_that_is_too_small_is_refused(native: ctypes.CDLL) -> None:
    """Never written beyond: the native copy knows no bounds of its own."""
    paged = PagedBytes(pool(8), native)
    with pytest.raises(ValueError, match="do not fit"):
        paged.gather((1, 2), room(paged.block_bytes, 0), seed=1)
    with pytest.raises(ValueError, match="are not tokens"):
        paged.scatter((1, 2), room(paged.block_bytes, 0), BLOCK, 0, 0, 2 * BLOCK)


def test_fewer_bytes_than_the_native_sum_takes_go_the_plain_way(native: ctypes.CDLL) -> None:
    """Rows of 128 bytes in blocks of whole kibibytes: a slice of one row."""
    memory = torch.arange(4 * 16 * 32, dtype=torch.float32).view(4, 2, 2, 4, 1, 32)
    fused, plain = PagedBytes(memory, native), PagedBytes(memory)
    assert fused.row_bytes == 128 and fused.block_bytes % 1024 == 0
    for rows in ((0, 1), (3, 4), (0, 2), (5, 16)):
        one, two = (room(fused.block_bytes, 0) for _ in range(2))
        assert fused.gather((2,), one, rows, 3) == plain.gather((2,), two, rows, 3)
        assert np.array_equal(one, two)


def test_every_changed_byte_changes_the_sum(native: ctypes.CDLL) -> None:
    """All of them, at the source's end and at the destination's."""
    draw = np.random.default_rng(9)
    memory, staged = pool(10), draw.integers(0, 256, 6 * 1024, dtype=np.uint8)
    paged, target = PagedBytes(memory, native), PagedBytes(pool(11), native)
    out, place = room(paged.block_bytes, 0), (BLOCK, 0, 0, BLOCK)
    flat = memory.view(torch.uint8)[3].view(-1).numpy()
    sound = paged.gather((3,), out, seed=1)
    expected = target.scatter((5,), out, *place, ahead=StagedSlice(staged, 2))
    for at in range(len(staged)):
        flip = np.uint8(1 << at % 8)
        flat[at] ^= flip
        staged[at] ^= flip
        assert paged.gather((3,), out, seed=1) != sound
        assert target.scatter((5,), out, *place, ahead=StagedSlice(staged, 2)) != expected
        flat[at] ^= flip
        staged[at] ^= flip
    assert paged.gather((3,), out, seed=1) == sound
