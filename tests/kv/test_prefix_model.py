"""The prefix index against plain sets of published prefixes: any order of holding, publishing, leaving and evicting."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from distserve.kv.errors import LedgerError
from distserve.kv.prefix import Entry, PrefixIndex

BS = 2
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=9)


class IndexAgainstPrefixes(RuleBasedStateMachine):
    """Each block remembers the whole prefix whose KV is in it; each holder remembers the chain it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex(BS)
        self.prefix_of: dict[int, tuple[int, ...]] = {}  # cached block → the tokens up to its end
        self.holders: dict[int, tuple[list[Entry], list[int], list[int]]] = {}  # → chain, tokens, table
        self.idle: list[tuple[int, ...]] = []  # prefixes that nobody holds, longest at rest first
        self.made = 0
        self.blocks = 0

    @initialize(collide=st.booleans())
    def start(self, collide: bool) -> None:
        if collide:
            self.index = PrefixIndex(BS, link=lambda parent, tokens: (parent * 3 + sum(tokens)) % 5)

    @rule(tokens=TOKENS, limit=st.integers(0, 9))
    def hold(self, tokens: list[int], limit: int) -> None:
        """A match is exactly what was published of these tokens, within the limit; it is held from then on."""
        chain = self.index.match(tokens, limit)
        assert len(chain) * BS <= min(limit, len(tokens))
        for depth, entry in enumerate(chain, start=1):
            assert self.prefix_of[entry.block] == tuple(tokens[: depth * BS])
        if len(chain) < min(limit, len(tokens)) // BS:
            longer = tuple(tokens[: (len(chain) + 1) * BS])
            assert longer not in self.prefix_of.values(), "a cached prefix was not found"
        self.index.hold(chain)
        for entry in chain:
            if self.prefix_of[entry.block] in self.idle:
                self.idle.remove(self.prefix_of[entry.block])
        own = len(tokens) // BS - len(chain)
        table = [entry.block for entry in chain] + list(range(self.blocks, self.blocks + own))
        self.blocks += own
        self.made += 1
        self.holders[self.made] = (chain, tokens, table)

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), leaving=st.booleans())
    def publish(self, data: st.DataObject, leaving: bool) -> None:
        """A holder's own full blocks become findable; what gives way to them is named, and nothing else."""
        name = data.draw(st.sampled_from(sorted(self.holders)))
        chain, tokens, table = self.holders[name]
        before = len(chain)
        freed = self.index.extend(chain, tokens, table, leaving=leaving)
        for block in freed:
            prefix = self.prefix_of.pop(block)
            assert prefix in self.idle, "a block that somebody holds was given away"
            self.idle.remove(prefix)
        for depth, entry in enumerate(chain[before:], start=before + 1):
            prefix = tuple(tokens[: depth * BS])
            assert self.prefix_of.setdefault(entry.block, prefix) == prefix
            if prefix in self.idle:
                self.idle.remove(prefix)
        if leaving:
            self._leave(name)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self._leave(data.draw(st.sampled_from(sorted(self.holders))))

    def _leave(self, name: int) -> None:
        chain, _, _ = self.holders.pop(name)
        self.index.release(chain)
        held = {id(entry) for others, _, _ in self.holders.values() for entry in others}
        self.idle += [self.prefix_of[e.block] for e in reversed(chain) if id(e) not in held]

    @rule()
    def evict(self) -> None:
        """The prefix longest at rest goes, never one that is held or that others continue."""
        if not self.idle:
            with pytest.raises(LedgerError):
                self.index.evict()
            return
        gone = self.prefix_of.pop(self.index.evict())
        assert gone == self.idle.pop(0)
        assert not any(p[: len(gone)] == gone for p in self.prefix_of.values()), "a child outlives its parent"

    @invariant()
    def same(self) -> None:
        self.index.check()
        assert self.index.evictable == len(self.idle)
        assert len(self.index) == len(self.prefix_of) == len(set(self.prefix_of.values()))
        assert {e.block for e in self.index.entries()} == set(self.prefix_of)


IndexAgainstPrefixes.TestCase.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)
TestIndexAgainstPrefixes = IndexAgainstPrefixes.TestCase
