"""Arithmetic of KV: bytes of a token, a block, a range; where a range of tokens lies; which ranges have arrived.

Owns no state of the cluster. Sizes are of one whole instance (all its ranks together): key and value, all layers.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from distserve.core.types import ModelSpec

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8_e4m3": 1}


@dataclass(frozen=True, slots=True)
class KvShape:
    """How large the KV of one model is on one instance."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype_bytes: int
    block_size: int

    @classmethod
    def of(cls, spec: ModelSpec) -> KvShape:
        """Raises ``ValueError`` for a dtype that KV is not kept in."""
        if spec.kv_dtype not in DTYPE_BYTES:
            raise ValueError(f"KV cannot be kept as {spec.kv_dtype!r}; choose one of {', '.join(DTYPE_BYTES)}")
        return cls(spec.layers, spec.kv_heads, spec.head_dim, DTYPE_BYTES[spec.kv_dtype], spec.block_size)

    @property
    def token_bytes(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype_bytes

    @property
    def block_bytes(self) -> int:
        return self.token_bytes * self.block_size

    def range_bytes(self, start: int, end: int) -> int:
        """Bytes of the KV of tokens ``[start, end)``."""
        return max(0, end - start) * self.token_bytes

    def blocks_for(self, tokens: int) -> int:
        """Blocks that ``tokens`` positions need."""
        return -(-tokens // self.block_size)

    def blocks_in(self, pool_bytes: int) -> int:
        """Whole blocks that fit in ``pool_bytes``."""
        return pool_bytes // self.block_bytes


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens ``[start, start + tokens)`` lie side by side from pool slot ``slot`` (block x block size + offset)."""

    start: int
    slot: int
    tokens: int


def pieces(table: Sequence[int], block_size: int, start: int, end: int) -> Iterator[Piece]:
    """Where tokens ``[start, end)`` of a block table lie: maximal contiguous pieces, in token order.

    Raises ``ValueError`` when the table does not reach ``end``.
    """
    if not 0 <= start <= end <= len(table) * block_size:
        raise ValueError(f"tokens [{start}, {end}) are not in a table of {len(table)} blocks of {block_size}")
    while start < end:
        index, offset = divmod(start, block_size)
        last = index
        while (last + 1) * block_size < end and table[last + 1] == table[last] + 1:
            last += 1
        stop = min(end, (last + 1) * block_size)
        yield Piece(start, table[index] * block_size + offset, stop - start)
        start = stop


class Coverage:
    """Which token positions have arrived, as disjoint ascending intervals. Order and repeats do not matter."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def add(self, start: int, end: int) -> None:
        """``[start, end)`` arrived; an empty range is nothing."""
        if start >= end:
            return
        first = bisect_left(self._ends, start)
        last = bisect_right(self._starts, end)
        if first < last:
            start = min(start, self._starts[first])
            end = max(end, self._ends[last - 1])
        self._starts[first:last] = [start]
        self._ends[first:last] = [end]

    def covers(self, start: int, end: int) -> bool:
        """Whether all of ``[start, end)`` has arrived."""
        i = bisect_right(self._starts, start) - 1
        return start >= end or (i >= 0 and end <= self._ends[i])

    def gaps(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """What of ``[start, end)`` has not arrived."""
        for first, last in zip(self._starts, self._ends, strict=True):
            if last <= start:
                continue
            if first >= end:
                break
            if start < first:
                yield start, first
            start = last
        if start < end:
            yield start, end

    @property
    def tokens(self) -> int:
        """How many positions have arrived."""
        return sum(self._ends) - sum(self._starts)
