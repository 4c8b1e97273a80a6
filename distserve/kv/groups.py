"""Free blocks, handed out as contiguous groups (FastSwitch, dynamic block group manager).

Owns which block ids are free and how they lie side by side; does not know who holds the others or why. Everything is
deterministic: of equally good places the lowest block id wins.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

from distserve.kv.errors import LedgerError


class GroupAllocator:
    """A pool of block ids ``0 .. blocks - 1``, kept as maximal free runs.

    Three views of the same runs: by first block, by the block after the last, and sorted by (length, first block).
    ``take`` and ``give`` find their runs by look-up or bisection.
    """

    def __init__(self, blocks: int) -> None:
        if blocks < 1:
            raise LedgerError(f"a pool cannot have {blocks} blocks")
        self._blocks = blocks
        self._free = 0
        self._length: dict[int, int] = {}  # first block -> length of the free run
        self._first: dict[int, int] = {}  # block after the last -> first block of the free run
        self._by_size: list[tuple[int, int]] = []  # (length, first block), ascending
        self._is_free = bytearray(b"\1" * blocks)  # catches a block that is given back twice
        self._add(0, blocks)

    @property
    def free(self) -> int:
        return self._free

    @property
    def runs(self) -> int:
        """How many separate runs the free blocks form: 1 is unfragmented."""
        return len(self._by_size)

    def take(self, n: int, after: int | None = None) -> list[int]:
        """``n`` free blocks in table order, in as few runs as can be had.

        First what lies directly after block ``after``; then the smallest run that holds the rest; failing that, the
        largest runs until one does. Raises ``LedgerError`` when fewer than ``n`` are free (ask ``free`` first).
        """
        if not 0 <= n <= self._free:
            raise LedgerError(f"{n} blocks asked of a pool with {self._free} free")
        taken: list[int] = []
        if after is not None and after + 1 in self._length:
            taken += self._cut(after + 1, min(n, self._length[after + 1]))
        while len(taken) < n:
            length, first = self._place(n - len(taken))
            taken += self._cut(first, min(n - len(taken), length))
        return taken

    def give(self, ids: Iterable[int]) -> None:
        """Blocks come back, in any order; runs that touch become one. Raises on a block that is free already."""
        ordered = sorted(ids)
        start = 0
        for i in range(1, len(ordered) + 1):
            if i == len(ordered) or ordered[i] != ordered[i - 1] + 1:
                self._give_run(ordered[start], i - start)
                start = i

    def check(self) -> None:
        """Raises ``LedgerError`` if the three views disagree, runs touch or overlap, or the count is off."""
        end = -1
        for first in sorted(self._length):
            length = self._length[first]
            if length < 1 or first <= end or first + length > self._blocks:
                raise LedgerError(f"free run [{first}, {first + length}) is empty, touches another or leaves the pool")
            if self._first.get(first + length) != first:
                raise LedgerError(f"free run [{first}, {first + length}) is not known by its end")
            end = first + length
        if self._by_size != sorted((length, first) for first, length in self._length.items()):
            raise LedgerError("free runs by size differ from free runs by place")
        if len(self._first) != len(self._length) or self._free != sum(self._length.values()):
            raise LedgerError(f"{self._free} blocks counted free, runs hold {sum(self._length.values())}")
        if any(not all(self._is_free[f : f + n]) for f, n in self._length.items()) or sum(self._is_free) != self._free:
            raise LedgerError("the free flags differ from the free runs")

    def free_blocks(self) -> set[int]:
        """Every free block id; for checks."""
        return {b for first, length in self._length.items() for b in range(first, first + length)}

    def _place(self, n: int) -> tuple[int, int]:
        """(length, first) of the smallest run of at least ``n``, else of the largest; lowest block id first."""
        i = bisect_left(self._by_size, (n, -1))
        if i == len(self._by_size):
            i = bisect_left(self._by_size, (self._by_size[-1][0], -1))
        return self._by_size[i]

    def _cut(self, first: int, n: int) -> range:
        length = self._remove(first)
        self._is_free[first : first + n] = bytes(n)
        if n < length:
            self._add(first + n, length - n)
        return range(first, first + n)

    def _give_run(self, first: int, length: int) -> None:
        end = first + length
        if first < 0 or end > self._blocks:
            raise LedgerError(f"blocks [{first}, {end}) are not of this pool of {self._blocks}")
        if any(self._is_free[first:end]):
            raise LedgerError(f"one of the blocks [{first}, {end}) is given back twice")
        self._is_free[first:end] = b"\1" * length
        if first in self._first:
            first = self._first[first]
            self._remove(first)
        if end in self._length:
            end += self._remove(end)
        self._add(first, end - first)

    def _add(self, first: int, length: int) -> None:
        self._length[first] = length
        self._first[first + length] = first
        insort(self._by_size, (length, first))
        self._free += length

    def _remove(self, first: int) -> int:
        length = self._length.pop(first)
        del self._first[first + length]
        del self._by_size[bisect_left(self._by_size, (length, first))]
        self._free -= length
        return length
