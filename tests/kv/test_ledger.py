"""The ledger against a model that knows, for every block, the tokens whose KV is in it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from distserve.kv.errors import LedgerError
from distserve.kv.ledger import MOVES, BlockLedger, BlockState

BS = 4
FILLING, OWNED, RESERVED, IN_TRANSIT = (
    BlockState.FILLING,
    BlockState.OWNED,
    BlockState.RESERVED,
    BlockState.IN_TRANSIT,
)


def ledger(blocks: int = 10, *, prefix_cache: bool = True) -> BlockLedger:
    return BlockLedger(blocks, BS, prefix_cache=prefix_cache)


def test_admit_publish_release_and_hit() -> None:
    led = ledger()
    prompt = list(range(10))
    assert led.admit("a", prompt, 10, FILLING, 9) == 0
    assert led.counts()[FILLING] == 3
    led.publish("a", prompt)
    assert (led.counts()[BlockState.SHARED], led.counts()[FILLING]) == (2, 1)
    assert led.writable_from("a") == 8
    led.release("a")
    assert (led.free, led.evictable, led.available) == (8, 2, 10)
    assert led.match(prompt, 9) == 8
    assert led.admit("b", prompt, 10, FILLING, 9) == 8
    assert led.evictable == 0
    led.check()


def test_a_limit_leaves_a_token_to_compute() -> None:
    led = ledger()
    led.admit("a", range(8), 8, OWNED, 0)
    led.publish("a", range(8))
    assert led.match(range(8), 7) == 4
    assert led.admit("b", range(8), 8, OWNED, 7) == 4
    assert led.table("b")[0] == led.table("a")[0]
    assert led.table("b")[1] != led.table("a")[1]
    led.publish("b", range(8))
    assert led.writable_from("b") == 4  # its copy of the second block stays its own
    led.release("a")
    assert led.evictable == 1  # b holds no block that it does not use
    led.publish("b", range(8))
    assert led.writable_from("b") == 8  # nobody held the other copy any more: it gave way
    assert (led.free, led.evictable) == (8, 0)
    led.check()
    led.release("b")
    assert (led.free, led.evictable) == (8, 2)
    led.check()


def test_what_follows_another_owners_copy_is_published_on_leaving() -> None:
    """Two prompts alike, computed at once: the second's continuation is found later all the same."""
    led = ledger()
    for owner in ("a", "b"):
        assert led.admit(owner, range(8), 8, FILLING, 7) == 0
    led.publish("a", range(8))
    led.publish("b", range(8))
    assert led.grow("b", 16)
    led.publish("b", range(16))
    assert led.match(range(16), 16) == 8
    led.release("b")
    led.check()
    assert led.match(range(16), 16) == 16
    assert (led.free, led.evictable, led.counts()[BlockState.SHARED]) == (6, 2, 4)
    led.release("a")
    assert [led.free, led.evictable, led.drop_cache()] == [6, 4, 4]


def test_an_owner_alone_can_use_the_whole_pool() -> None:
    """No copy of its tokens that another left behind may stand in its way."""
    led = ledger(4)
    led.admit("a", range(8), 8, OWNED, 0)
    led.admit("b", range(8), 8, OWNED, 0)
    led.publish("a", range(8))
    led.publish("b", range(8))
    led.release("a")
    assert led.grow("b", 16)
    led.check()


def test_no_room_changes_nothing() -> None:
    led = ledger(4)
    led.admit("a", range(9), 9, OWNED, 0)
    before = led.counts()
    assert not led.room_for([50, 51], 5, 1)
    assert led.admit("b", [50, 51], 5, FILLING, 1) is None
    assert not led.grow("a", 17)
    assert led.counts() == before
    assert led.owners() == ("a",)
    assert led.grow("a", 12)
    assert led.grow("a", 16)


def test_cached_blocks_it_would_share_do_not_count_as_room() -> None:
    led = ledger(4)
    led.admit("a", range(12), 12, OWNED, 0)
    led.publish("a", range(12))
    led.release("a")
    assert (led.free, led.evictable) == (1, 3)
    assert led.admit("x", [99], 1, OWNED, 0) == 0
    assert led.room_for(range(13), 12, 12)
    assert not led.room_for(range(13), 13, 12)
    assert led.admit("b", range(13), 13, OWNED, 12) is None
    assert led.admit("b", range(13), 12, OWNED, 12) == 12
    led.check()


def test_table_keeps_its_identity_until_it_changes() -> None:
    led = ledger()
    led.admit("a", range(6), 6, FILLING, 5)
    table = led.table("a")
    assert led.grow("a", 8)
    led.publish("a", range(6))
    led.restate("a", OWNED)
    led.rename("a", "b")
    assert led.table("b") is table
    assert led.grow("b", 9)
    assert led.table("b")[:2] == table
    assert led.table("b") is not table


def test_legal_states_only() -> None:
    led = ledger()
    led.admit("a", [], 4, RESERVED, 0)
    with pytest.raises(LedgerError, match="cannot go"):
        led.restate("a", IN_TRANSIT)
    led.restate("a", OWNED)
    led.restate("a", IN_TRANSIT)
    led.restate("a", IN_TRANSIT)
    led.restate("a", OWNED)
    for state in (BlockState.FREE, BlockState.SHARED):
        with pytest.raises(LedgerError):
            led.restate("a", state)
        with pytest.raises(LedgerError):
            led.admit("b", [], 4, state, 0)


def test_strangers_and_namesakes_are_errors() -> None:
    led = ledger()
    led.admit("a", [], 4, OWNED, 0)
    led.admit("b", [], 4, OWNED, 0)
    for act in (
        lambda: led.release("c"),
        lambda: led.table("c"),
        lambda: led.grow("c", 1),
        lambda: led.publish("c", []),
        lambda: led.rename("c", "d"),
        lambda: led.rename("a", "b"),
        lambda: led.admit("a", [], 4, OWNED, 0),
        lambda: led.publish("a", range(5)),
    ):
        with pytest.raises(LedgerError):
            act()
    led.release("a")
    with pytest.raises(LedgerError):
        led.release("a")
    assert led.owners() == ("b",)


def test_cache_can_be_off() -> None:
    led = ledger(prefix_cache=False)
    led.admit("a", range(8), 8, OWNED, 7)
    led.publish("a", range(8))
    led.release("a")
    assert (led.free, led.evictable, led.match(range(8), 8)) == (10, 0, 0)


def test_colliding_hashes_share_nothing_wrong() -> None:
    led = BlockLedger(10, BS, link=lambda parent, tokens: 7)
    led.admit("a", [1] * 8, 8, OWNED, 7)
    led.publish("a", [1] * 8)
    assert led.admit("b", [2] * 8, 8, OWNED, 7) == 0
    led.publish("b", [2] * 8)
    led.check()
    led.release("a")
    led.release("b")
    led.check()
    assert (led.free, led.evictable) == (9, 1)


@pytest.mark.parametrize(
    "damage",
    [
        lambda led: led._holdings.pop("a"),
        lambda led: led._holdings["a"].blocks.append(led._holdings["b"].blocks[0]),
        lambda led: led._holdings["a"].chain[0].__setattr__("count", 5),
        lambda led: led._groups.take(1),
        lambda led: led._holdings["b"].blocks.pop(),
        lambda led: led.table("a") and led._holdings["a"].blocks.reverse(),
    ],
)
def test_check_notices(damage) -> None:  # type: ignore[no-untyped-def]
    led = ledger()
    led.admit("a", range(10), 10, OWNED, 0)
    led.publish("a", range(10))
    led.admit("b", range(50, 55), 5, OWNED, 0)
    led.check()
    damage(led)
    with pytest.raises(LedgerError):
        led.check()


class LedgerAgainstContents(RuleBasedStateMachine):
    """Each block remembers the token prefix whose KV it holds; nobody may find anything else in its table."""

    def __init__(self) -> None:
        super().__init__()
        self.contents: dict[int, tuple[int, ...]] = {}  # block -> all tokens up to its end
        self.tokens: dict[str, list[int]] = {}  # owner -> tokens whose KV is computed
        self.made = 0

    @initialize(blocks=st.integers(3, 14), cache=st.sampled_from([True, True, False]), collide=st.booleans())
    def start(self, blocks: int, cache: bool, collide: bool) -> None:
        chain = {"link": lambda parent, tokens: sum(tokens) % 3} if collide else {}
        self.led = BlockLedger(blocks, BS, prefix_cache=cache, **chain)  # type: ignore[arg-type]

    @rule(
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=22),
        more=st.integers(0, 5),
        state=st.sampled_from([FILLING, OWNED, RESERVED]),
    )
    def admit(self, tokens: list[int], more: int, state: BlockState) -> None:
        self.made += 1
        owner = f"o{self.made}"
        need, limit = len(tokens) + more, len(tokens) - 1
        matched, room, before = self.led.match(tokens, limit), self.led.room_for(tokens, need, limit), self.led.counts()
        cached = self.led.admit(owner, tokens, need, state, limit)
        assert (cached is not None) == room
        if cached is None:
            assert self.led.counts() == before
            assert not self.led.holds(owner)
            assert -(-need // BS) > self.led.available
            return
        assert cached == matched <= limit
        assert len(self.led.table(owner)) == -(-need // BS)
        for i in range(cached // BS):
            assert self.contents[self.led.table(owner)[i]] == tuple(tokens[: (i + 1) * BS])
        self.tokens[owner] = tokens[:cached]
        self.compute(owner, tokens[cached:])

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9))
    def grow(self, data: st.DataObject, tokens: list[int]) -> None:
        owner = data.draw(st.sampled_from(sorted(self.tokens)))
        need = len(self.tokens[owner]) + len(tokens)
        table, available = self.led.table(owner), self.led.available
        more = max(0, -(-need // BS) - len(table))
        assert self.led.grow(owner, need) == (more <= available)
        assert self.led.table(owner)[: len(table)] == table
        if more <= available:
            self.compute(owner, tokens)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted(self.tokens)))
        table = self.led.table(owner)
        self.led.publish(owner, self.tokens[owner])
        assert self.led.table(owner) is table

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def restate_and_rename(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted(self.tokens)))
        self.led.restate(owner, data.draw(st.sampled_from(MOVES[self.led.state(owner)])))
        self.led.rename(owner, owner + "'")
        self.tokens[owner + "'"] = self.tokens.pop(owner)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted(self.tokens)))
        self.led.release(owner)
        del self.tokens[owner]

    @rule()
    def drop_cache(self) -> None:
        evictable, free = self.led.evictable, self.led.free
        assert self.led.drop_cache() == evictable
        assert (self.led.free, self.led.evictable) == (free + evictable, 0)

    @invariant()
    def adds_up(self) -> None:
        if not hasattr(self, "led"):
            return
        self.led.check()
        assert sum(self.led.counts().values()) == self.led.total
        assert sorted(self.led.owners()) == sorted(self.tokens)
        used = {block for owner in self.tokens for block in self.led.table(owner)}
        assert len(used) == self.led.total - self.led.available, "blocks are kept from use that nobody uses"
        for owner, tokens in self.tokens.items():
            for i, block in enumerate(self.led.table(owner)[: -(-len(tokens) // BS)]):
                assert self.contents[block] == tuple(tokens[: (i + 1) * BS]), f"{owner} reads another's KV in {block}"

    def compute(self, owner: str, tokens: Sequence[int]) -> None:
        """Write KV as a step would: only into own blocks."""
        known = self.tokens[owner]
        assert self.led.writable_from(owner) <= len(known) or not tokens
        table = self.led.table(owner)
        for token in tokens:
            known.append(token)
            self.contents[table[(len(known) - 1) // BS]] = tuple(known)

    def teardown(self) -> None:
        for owner in list(self.tokens):
            self.led.release(owner)
        if hasattr(self, "led"):
            self.led.check()
            self.led.drop_cache()
            assert self.led.free == self.led.total


LedgerAgainstContents.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestLedgerAgainstContents = LedgerAgainstContents.TestCase
