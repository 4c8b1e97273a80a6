"""The prefix index: exact whatever the hashes say, counted, evicted oldest and leaf first."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from distserve.kv.errors import LedgerError
from distserve.kv.prefix import PREFIX_RUN, PrefixIndex, chain_hashes

BS = 4


def published(index: PrefixIndex, tokens: list[int], table: list[int]) -> list:  # type: ignore[type-arg]
    chain = index.match(tokens, len(tokens))
    index.hold(chain)
    index.extend(chain, tokens, table, leaving=False)
    return chain


def blocks(chain: list) -> list[int]:  # type: ignore[type-arg]
    return [entry.block for entry in chain]


def test_chain_hashes_cover_full_runs_and_everything_before() -> None:
    tokens = list(range(3 * PREFIX_RUN + 5))
    hashes = chain_hashes(tokens, PREFIX_RUN)
    assert len(hashes) == 3
    assert all(0 <= h < 2**63 for h in hashes)
    assert chain_hashes(tokens[: 2 * PREFIX_RUN], PREFIX_RUN) == hashes[:2]
    other = [99, *tokens[1:]]
    assert not set(chain_hashes(other, PREFIX_RUN)) & set(hashes)
    assert chain_hashes(tokens[: PREFIX_RUN - 1], PREFIX_RUN) == ()


def test_chain_hashes_are_equal_in_every_process() -> None:
    code = "from distserve.kv.prefix import chain_hashes, link; print(chain_hashes(range(40), 16), link(7, (1, 2)))"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "4242")
    }
    assert len(outputs) == 1
    assert chain_hashes(range(40), 16) == (1751322468366644755, 6198839623249867782)


def test_matches_full_blocks_within_the_limit() -> None:
    index = PrefixIndex(BS)
    published(index, list(range(10)), [5, 6, 7])
    assert blocks(index.match(list(range(10)), 10)) == [5, 6]
    assert blocks(index.match(list(range(10)), 7)) == [5]
    assert blocks(index.match([0, 1, 2, 3, 9, 9, 9, 9], 8)) == [5]
    assert index.match([4, 5, 6, 7], 4) == []  # a block is known by all that precedes it


@pytest.mark.parametrize("constant", [True, False])
def test_colliding_hashes_cannot_lie(constant: bool) -> None:
    """Every hash equal, or equal by depth alone: what is found is still exactly what was published."""
    index = PrefixIndex(BS, link=lambda parent, tokens: 1 if constant else parent + 1)
    held = published(index, [1, 1, 1, 1, 2, 2, 2, 2], [0, 1])
    assert blocks(held) == ([0] if constant else [0, 1])
    assert index.match([9, 9, 9, 9, 2, 2, 2, 2], 8) == []
    assert blocks(index.match([1, 1, 1, 1, 3, 3, 3, 3], 8)) == [0]
    other = published(index, [9, 9, 9, 9, 2, 2, 2, 2], [2, 3])
    assert other == []  # cannot be told from what is there: not published
    assert index.match([9, 9, 9, 9, 2, 2, 2, 2], 8) == []
    index.check()


def test_evicts_the_oldest_and_the_leaf_first() -> None:
    index = PrefixIndex(BS)
    old = published(index, [1] * 12, [0, 1, 2])
    new = published(index, [1] * 4 + [2] * 4, [9, 3])
    assert blocks(new) == [0, 3]
    index.release(old)
    index.release(new)
    assert [index.evict() for _ in range(4)] == [2, 1, 3, 0]
    with pytest.raises(LedgerError):
        index.evict()


def test_a_hit_makes_a_chain_young_again() -> None:
    index = PrefixIndex(BS)
    a = published(index, [1] * 8, [0, 1])
    b = published(index, [2] * 8, [2, 3])
    index.release(a)
    index.release(b)
    hit = index.match([1] * 8, 8)
    index.hold(hit)
    index.release(hit)
    assert [index.evict() for _ in range(4)] == [3, 2, 1, 0]


def test_what_is_held_is_never_evicted() -> None:
    index = PrefixIndex(BS)
    held = published(index, [1] * 8, [0, 1])
    gone = published(index, [1] * 8 + [2] * 4, [8, 9, 2])
    assert blocks(gone) == [0, 1, 2]
    index.release(gone)
    assert index.evictable == 1
    assert index.evict() == 2
    with pytest.raises(LedgerError):
        index.evict()
    assert blocks(held) == blocks(index.match([1] * 12, 12)) == [0, 1]
    index.check()
