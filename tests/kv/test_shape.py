"""Bytes, pieces and coverage."""

from __future__ import annotations

import random

import pytest

from distserve.core.types import ModelSpec
from distserve.kv.shape import Coverage, KvShape, Piece, pieces


def spec(dtype: str = "bfloat16") -> ModelSpec:
    return ModelSpec("m", "f", 100, 4096, (2,), 32, 8, 128, kv_dtype=dtype, block_size=16, pool_blocks=10)


def test_llama_3_8b_is_128_kib_a_token_and_2_mib_a_block() -> None:
    shape = KvShape.of(spec())
    assert shape.token_bytes == 128 * 1024
    assert shape.block_bytes == 2 * 1024 * 1024
    assert shape.range_bytes(10, 1010) == 1000 * 128 * 1024
    assert shape.range_bytes(5, 5) == 0
    assert shape.blocks_for(17) == 2
    assert shape.blocks_in(5 * 2**20) == 2
    assert KvShape.of(spec("float32")).token_bytes == 2 * shape.token_bytes


def test_unknown_dtype_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="int3"):
        KvShape.of(spec("int3"))


def test_pieces_join_adjacent_blocks() -> None:
    assert list(pieces([4, 5, 9, 2, 3], 4, 2, 19)) == [Piece(2, 18, 6), Piece(8, 36, 4), Piece(12, 8, 7)]
    assert list(pieces([4], 4, 1, 3)) == [Piece(1, 17, 2)]
    assert list(pieces([4], 4, 3, 3)) == []
    with pytest.raises(ValueError, match="table"):
        list(pieces([4], 4, 3, 5))


def test_pieces_against_one_slot_at_a_time() -> None:
    rng = random.Random(3)
    for _ in range(200):
        table = rng.sample(range(12), rng.randint(1, 8))
        start = rng.randint(0, len(table) * 4)
        end = rng.randint(start, len(table) * 4)
        slots = [p.slot + i for p in pieces(table, 4, start, end) for i in range(p.tokens)]
        assert slots == [table[t // 4] * 4 + t % 4 for t in range(start, end)]


def test_coverage_against_a_set() -> None:
    rng = random.Random(5)
    for _ in range(200):
        coverage, seen = Coverage(), set[int]()
        for _ in range(rng.randint(1, 12)):
            start = rng.randint(0, 30)
            end = rng.randint(start, 32)
            coverage.add(start, end)
            seen |= set(range(start, end))
            low = rng.randint(0, 32)
            high = rng.randint(low, 32)
            missing = [t for a, b in coverage.gaps(low, high) for t in range(a, b)]
            assert missing == [t for t in range(low, high) if t not in seen]
            assert coverage.covers(low, high) == (not missing)
            assert coverage.tokens == len(seen)
