"""The group allocator against a plain set of free blocks."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from distserve.kv.errors import LedgerError
from distserve.kv.groups import GroupAllocator


def runs_of(blocks: list[int]) -> int:
    return sum(i == 0 or blocks[i] != blocks[i - 1] + 1 for i in range(len(blocks)))


def test_extends_directly_after_the_last_block() -> None:
    groups = GroupAllocator(10)
    first = groups.take(3)
    assert first == [0, 1, 2]
    other = groups.take(2)
    groups.give(other)
    assert groups.take(4, after=first[-1]) == [3, 4, 5, 6]


def test_extends_as_far_as_it_can_then_goes_elsewhere() -> None:
    groups = GroupAllocator(10)
    groups.take(10)
    groups.give([3, 4, 7, 8, 9])
    assert groups.take(4, after=2) == [3, 4, 7, 8]
    assert groups.free_blocks() == {9}


def test_best_fit_then_lowest_block() -> None:
    groups = GroupAllocator(20)
    groups.take(20)
    groups.give([0, 1, 2, 3, 5, 6, 10, 11, 15, 16, 17])
    assert groups.take(2) == [5, 6]
    assert groups.take(2) == [10, 11]
    assert groups.take(3) == [15, 16, 17]
    assert groups.take(1) == [0]


def test_fewest_largest_runs_when_none_fits() -> None:
    groups = GroupAllocator(20)
    groups.take(20)
    groups.give([0, 2, 3, 4, 8, 9, 10, 15])
    assert groups.take(7) == [2, 3, 4, 8, 9, 10, 0]
    assert groups.free_blocks() == {15}


def test_coalesces_in_any_order() -> None:
    groups = GroupAllocator(64)
    taken = groups.take(64)
    random.Random(1).shuffle(taken)
    for block in taken:
        groups.give([block])
        groups.check()
    assert groups.runs == 1
    assert groups.take(64) == list(range(64))


@pytest.mark.parametrize("ids", [[2], [7], [-1], [1, 1]])
def test_refuses_what_was_not_taken(ids: list[int]) -> None:
    groups = GroupAllocator(4)
    groups.take(2)
    with pytest.raises(LedgerError):
        groups.give(ids)
    with pytest.raises(LedgerError):
        groups.take(99)


class AllocatorAgainstSet(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.groups = GroupAllocator(40)
        self.free = set(range(40))
        self.taken: list[int] = []

    @rule(n=st.integers(0, 15), after=st.none() | st.integers(0, 39))
    def take(self, n: int, after: int | None) -> None:
        if n > len(self.free):
            with pytest.raises(LedgerError):
                self.groups.take(n, after)
            return
        expected = self.expected(n, after)
        got = self.groups.take(n, after)
        assert got == expected
        self.free -= set(got)
        self.taken += got

    @rule(data=st.data())
    def give(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(0, len(self.taken)))
        self.taken = data.draw(st.permutations(self.taken))
        back, self.taken = self.taken[:count], self.taken[count:]
        self.groups.give(back)
        self.free |= set(back)

    @invariant()
    def same(self) -> None:
        self.groups.check()
        assert self.groups.free == len(self.free)
        assert self.groups.free_blocks() == self.free

    def expected(self, n: int, after: int | None) -> list[int]:
        """The rule of ``take``, by scanning."""
        free = set(self.free)
        got: list[int] = []
        if after is not None and after not in free:
            while after + 1 in free and len(got) < n:
                after += 1
                got.append(after)
                free.remove(after)
        while len(got) < n:
            runs = [
                (length, first)
                for first in sorted(free)
                if first - 1 not in free
                for length in [next(k for k in range(1, 42) if first + k not in free)]
            ]
            fitting = [r for r in runs if r[0] >= n - len(got)]
            length, first = min(fitting) if fitting else min(runs, key=lambda r: (-r[0], r[1]))
            piece = list(range(first, first + min(length, n - len(got))))
            got += piece
            free -= set(piece)
        return got


AllocatorAgainstSet.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestAllocatorAgainstSet = AllocatorAgainstSet.TestCase


def test_groups_stay_long_with_slack() -> None:
    """Sequences that come, grow and go in a pool one fifth free stay in a few runs each."""
    rng = random.Random(7)
    groups = GroupAllocator(1000)
    held: dict[int, list[int]] = {}
    for step in range(3000):
        if sum(map(len, held.values())) < 780:
            held[step] = groups.take(rng.randint(10, 30))
        grower = rng.choice(list(held))
        if groups.free > 200:
            held[grower] += groups.take(1, after=held[grower][-1])
        if len(held) > 25:
            groups.give(held.pop(rng.choice(list(held))))
    assert sum(len(b) for b in held.values()) / sum(runs_of(b) for b in held.values()) > 4
    groups.check()
