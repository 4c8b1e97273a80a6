"""The ledger: the only place where a block changes hands.

Owns, for one pool, the state and owner of every block. Does not know what is in a block, nor why an owner wants one.

    table of one owner     [ shared | shared | own | own | own ]        in token order
    chain it holds         [ entry  | entry  ]                          the published ones, always a beginning

Own blocks bear the owner's state; entries of the prefix cache are SHARED, and no owner holds one that is not in its
table. So sum over states = FREE + SHARED + every owner's own blocks = pool size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from distserve.kv.errors import LedgerError
from distserve.kv.groups import GroupAllocator
from distserve.kv.prefix import Entry, Link, PrefixIndex, link


class BlockState(StrEnum):
    """DESIGN §6. HOST_COPY is for host pools; nothing on a device pool bears it."""

    FREE = "free"
    FILLING = "filling"
    OWNED = "owned"
    SHARED = "shared"
    RESERVED = "reserved"
    IN_TRANSIT = "in_transit"
    HOST_COPY = "host_copy"


MOVES: dict[BlockState, tuple[BlockState, ...]] = {
    BlockState.FILLING: (BlockState.OWNED, BlockState.IN_TRANSIT),
    BlockState.OWNED: (BlockState.FILLING, BlockState.IN_TRANSIT),
    BlockState.RESERVED: (BlockState.FILLING, BlockState.OWNED),
    BlockState.IN_TRANSIT: (BlockState.FILLING, BlockState.OWNED),
    BlockState.HOST_COPY: (BlockState.IN_TRANSIT,),
}
"""State of an owner's own blocks -> what it may become. FREE and SHARED are entered by ``release`` and ``publish``."""


@dataclass(slots=True)
class _Holding:
    state: BlockState
    blocks: list[int]
    chain: list[Entry]
    table: tuple[int, ...] | None = None  # of ``blocks``, until they change
    will: tuple[int, ...] = ()  # tokens to publish when it leaves, where others stood in the way before

    def own(self) -> list[int]:
        """The blocks that are this owner's alone."""
        return self.blocks[len(self.chain) :]


class BlockLedger:
    """All blocks of one pool. Questions change nothing; commands are all or nothing.

    A full pool is answered with ``None`` or ``False``; ``LedgerError`` means that the caller has a bug.
    """

    def __init__(self, blocks: int, block_size: int, *, prefix_cache: bool = True, link: Link = link) -> None:
        self._blocks = blocks
        self._block_size = block_size
        self._prefix_cache = prefix_cache
        self._groups = GroupAllocator(blocks)
        self._index = PrefixIndex(block_size, link)
        self._holdings: dict[str, _Holding] = {}

    # ── questions ────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def total(self) -> int:
        return self._blocks

    @property
    def block_size(self) -> int:
        return self._block_size

    @property
    def free(self) -> int:
        """Blocks that hold nothing."""
        return self._groups.free

    @property
    def evictable(self) -> int:
        """Cached blocks that nobody holds."""
        return self._index.evictable

    @property
    def available(self) -> int:
        """Blocks to be had now: free or evictable."""
        return self.free + self.evictable

    def holds(self, owner: str) -> bool:
        return owner in self._holdings

    def owners(self) -> tuple[str, ...]:
        """In order of admission."""
        return tuple(self._holdings)

    def state(self, owner: str) -> BlockState:
        return self._holding(owner).state

    def table(self, owner: str) -> tuple[int, ...]:
        """Block table in token order; the same tuple object until it changes."""
        holding = self._holding(owner)
        if holding.table is None:
            holding.table = tuple(holding.blocks)
        return holding.table

    def capacity(self, owner: str) -> int:
        """Token positions that the owner's table has room for."""
        return len(self._holding(owner).blocks) * self._block_size

    def writable_from(self, owner: str) -> int:
        """The first position from which on every block is the owner's own: nothing before it may be written."""
        return len(self._holding(owner).chain) * self._block_size

    def match(self, tokens: Sequence[int], limit: int) -> int:
        """How many tokens ``admit`` would find cached: a multiple of the block size, at most ``limit``."""
        return len(self._match(tokens, limit)) * self._block_size

    def room_for(self, tokens: Sequence[int], need_tokens: int, limit: int) -> bool:
        """Whether ``admit`` with the same arguments would succeed now."""
        if self._blocks_for(need_tokens) <= self.available:
            return True
        return self._fits(self._match(tokens, limit), need_tokens)

    def counts(self) -> dict[BlockState, int]:
        """Blocks by state; the sum is ``total``."""
        counts = dict.fromkeys(BlockState, 0)
        counts[BlockState.FREE] = self.free
        counts[BlockState.SHARED] = len(self._index)
        for holding in self._holdings.values():
            counts[holding.state] += len(holding.own())
        return counts

    # ── commands ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def admit(self, owner: str, tokens: Sequence[int], need_tokens: int, state: BlockState, limit: int) -> int | None:
        """Give a new owner blocks for ``need_tokens`` positions, the first of them shared from the prefix cache.

        At most ``limit`` tokens are taken from the cache (callers leave at least one to compute). Returns how many
        were, or None, and nothing has changed, when there is no room.
        """
        if owner in self._holdings:
            raise LedgerError(f"{owner!r} already holds blocks")
        if state not in MOVES:
            raise LedgerError(f"blocks cannot be taken as {state}")
        chain = self._match(tokens, limit)
        if not self._fits(chain, need_tokens):
            return None
        self._index.hold(chain)
        blocks = [entry.block for entry in chain]
        blocks += self._take(max(0, self._blocks_for(need_tokens) - len(blocks)), blocks[-1] if blocks else None)
        self._holdings[owner] = _Holding(state, blocks, chain)
        return len(chain) * self._block_size

    def grow(self, owner: str, need_tokens: int) -> bool:
        """Extend the owner's table to ``need_tokens`` positions, adjacent if possible. False: no room, no change."""
        holding = self._holding(owner)
        if need_tokens <= len(holding.blocks) * self._block_size:
            return True
        more = self._blocks_for(need_tokens) - len(holding.blocks)
        if more > self.available:
            return False
        holding.blocks += self._take(more, holding.blocks[-1] if holding.blocks else None)
        holding.table = None
        return True

    def restate(self, owner: str, state: BlockState) -> None:
        """Change the state of the owner's own blocks, by the table ``MOVES``. To the same state: nothing."""
        holding = self._holding(owner)
        if state is holding.state:
            return
        if state not in MOVES[holding.state]:
            raise LedgerError(f"blocks of {owner!r} cannot go from {holding.state} to {state}")
        holding.state = state

    def rename(self, owner: str, new_owner: str) -> None:
        """The same blocks under another name: a ticket becomes a sequence."""
        if new_owner in self._holdings:
            raise LedgerError(f"{new_owner!r} already holds blocks")
        self._holding(owner)
        self._holdings[new_owner] = self._holdings.pop(owner)

    def publish(self, owner: str, tokens: Sequence[int]) -> None:
        """Let others share the full blocks that ``tokens``, whose KV is computed, cover from position 0.

        Blocks whose chain another has published already stay the owner's own; what follows them is published when
        the owner leaves.
        """
        holding = self._holding(owner)
        if not self._prefix_cache:
            return
        if len(tokens) > len(holding.blocks) * self._block_size:
            raise LedgerError(f"{owner!r} publishes {len(tokens)} tokens, more than its blocks hold")
        self._groups.give(self._index.extend(holding.chain, tokens, holding.blocks, leaving=False))
        complete = len(holding.chain) == len(tokens) // self._block_size
        holding.will = () if complete else tuple(tokens)

    def release(self, owner: str) -> None:
        """Take everything back: own blocks become free; shared ones are counted down and stay cached."""
        holding = self._holding(owner)
        del self._holdings[owner]
        freed = self._index.extend(holding.chain, holding.will, holding.blocks, leaving=True)
        kept = {entry.block for entry in holding.chain}
        self._groups.give([*freed, *(block for block in holding.blocks if block not in kept)])
        self._index.release(holding.chain)

    def drop_cache(self) -> int:
        """Free every cached block that nobody holds; returns how many."""
        dropped = [self._index.evict() for _ in range(self.evictable)]
        self._groups.give(dropped)
        return len(dropped)

    # ── check ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def check(self) -> None:
        """Raises ``LedgerError`` with an account unless every block is in one state, under one owner, once."""
        self._groups.check()
        self._index.check()
        keeper: dict[int, str] = dict.fromkeys(self._groups.free_blocks(), "the free pool")
        for entry in self._index.entries():
            self._keep(keeper, entry.block, "the prefix cache")
        holders: dict[int, int] = {}
        for owner, holding in self._holdings.items():
            for block in holding.own():
                self._keep(keeper, block, owner)
            if holding.table is not None and holding.table != tuple(holding.blocks):
                raise LedgerError(f"the table kept for {owner!r} is not that of its blocks")
            if [entry.block for entry in holding.chain] != holding.blocks[: len(holding.chain)]:
                raise LedgerError(f"{owner!r} holds cached blocks that are not in its table")
            for entry in holding.chain:
                holders[entry.hash] = holders.get(entry.hash, 0) + 1
        if len(keeper) != self._blocks or sum(self.counts().values()) != self._blocks:
            lost = [b for b in range(self._blocks) if b not in keeper]
            raise LedgerError(f"{self._blocks} blocks, {self._account()}; nobody can release {lost[:20]}")
        for entry in self._index.entries():
            if holders.get(entry.hash, 0) != entry.count:
                raise LedgerError(
                    f"cached block {entry.block} counts {entry.count} holders, has {holders.get(entry.hash, 0)}"
                )

    def _keep(self, keeper: dict[int, str], block: int, who: str) -> None:
        if block in keeper:
            raise LedgerError(f"block {block} is held by {keeper[block]} and by {who}; {self._account()}")
        keeper[block] = who

    def _account(self) -> str:
        return ", ".join(f"{state}: {n}" for state, n in self.counts().items() if n)

    # ── inside ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _holding(self, owner: str) -> _Holding:
        holding = self._holdings.get(owner)
        if holding is None:
            raise LedgerError(f"{owner!r} holds no blocks")
        return holding

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._block_size)

    def _match(self, tokens: Sequence[int], limit: int) -> list[Entry]:
        return self._index.match(tokens, limit) if self._prefix_cache else []

    def _fits(self, chain: list[Entry], need_tokens: int) -> bool:
        idle = sum(entry.count == 0 for entry in chain)
        return self._blocks_for(need_tokens) - len(chain) <= self.available - idle

    def _take(self, n: int, after: int | None) -> list[int]:
        """``n`` blocks; cached ones nobody holds give way, longest at rest first, when free ones are short."""
        if n > self.free:
            self._groups.give([self._index.evict() for _ in range(n - self.free)])
        return self._groups.take(n, after)
