"""Hash chains over runs of tokens: which full blocks already hold a prefix, and which prompts begin alike.

Owns the index from a chain of full blocks to block ids, its counts and its order of eviction. Does not know who holds
an entry, nor what becomes of an evicted block: the ledger does.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from distserve.kv.errors import LedgerError

PREFIX_RUN = 64
"""Tokens a link of the chain that gateways and controllers compare for affinity; no block size of any instance."""

Link = Callable[[int, tuple[int, ...]], int]
"""(hash of the parent chain, tokens of the next block) -> hash of the longer chain."""


def chain_hashes(tokens: Sequence[int], run: int) -> tuple[int, ...]:
    """One hash for each full run of ``run`` tokens, each covering everything before it too.

    63-bit ints, equal in every process (BLAKE2b over little-endian 32-bit ids, chained). Token ids are
    ``0 <= id < 2**32``.
    """
    pack = struct.Struct(f"<{run}I").pack
    digest = b""
    hashes = []
    for start in range(0, len(tokens) - run + 1, run):
        digest = blake2b(digest + pack(*tokens[start : start + run]), digest_size=8).digest()
        hashes.append(int.from_bytes(digest, "little") >> 1)
    return tuple(hashes)


def link(parent: int, tokens: tuple[int, ...]) -> int:
    """The index's own chain hash. Of ints alone, so the same under every PYTHONHASHSEED; never leaves the process."""
    return hash((parent, tokens))


@dataclass(slots=True, eq=False)
class Entry:
    """One full block whose KV is that of ``tokens`` after everything its ancestors hold."""

    block: int
    tokens: tuple[int, ...]
    hash: int
    parent: Entry | None = field(repr=False)
    count: int = 0  # holders
    children: int = 0


class PrefixIndex:
    """Chains of full blocks, counted, evicted least recently used and leaf first.

    Who holds an entry holds its ancestors: ``hold`` and ``release`` take whole chains from the root. So among entries
    that nobody holds a child always came to rest before its parent, and the oldest is always a leaf.
    """

    def __init__(self, block_size: int, link: Link = link) -> None:
        if block_size < 1:
            raise LedgerError(f"a block cannot have {block_size} tokens")
        self._block_size = block_size
        self._link = link
        self._entries: dict[int, Entry] = {}  # chain hash -> entry
        self._idle: OrderedDict[int, Entry] = OrderedDict()  # count 0, longest at rest first

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def evictable(self) -> int:
        return len(self._idle)

    def entries(self) -> Iterable[Entry]:
        """All entries, oldest first; for checks."""
        return self._entries.values()

    def match(self, tokens: Sequence[int], limit: int) -> list[Entry]:
        """The longest known chain of full blocks that ``tokens`` begin with, within ``limit`` tokens."""
        chain: list[Entry] = []
        for index in range(min(len(tokens), limit) // self._block_size):
            entry = self.child(chain[-1] if chain else None, self._run(tokens, index))
            if entry is None:
                break
            chain.append(entry)
        return chain

    def child(self, parent: Entry | None, tokens: tuple[int, ...]) -> Entry | None:
        """The entry of exactly these tokens after exactly this parent; hashes find it, tokens decide."""
        entry = self._entries.get(self._chain_hash(parent, tokens))
        if entry is None or entry.parent is not parent or entry.tokens != tokens:
            return None
        return entry

    def hold(self, chain: Iterable[Entry]) -> None:
        for entry in chain:
            if entry.count == 0:
                del self._idle[entry.hash]
            entry.count += 1

    def release(self, chain: Sequence[Entry]) -> None:
        """One holder fewer, leaf first; what nobody holds stays, evictable."""
        for entry in reversed(chain):
            entry.count -= 1
            if entry.count == 0:
                self._idle[entry.hash] = entry

    def extend(self, chain: list[Entry], tokens: Sequence[int], table: Sequence[int], *, leaving: bool) -> list[int]:
        """Lengthen a held chain over the full blocks of ``tokens``, publishing ``table``'s blocks where none is known.

        An entry that nobody holds gives way to the holder's own copy; its block is returned. At an entry that others
        hold the chain ends, or else this holder would keep blocks from use that it does not use itself; only one that
        is ``leaving`` goes on through it, for the sake of what comes after. Ends at a colliding hash in any case: what
        cannot be told apart is not published.
        """
        freed: list[int] = []
        for index in range(len(chain), len(tokens) // self._block_size):
            parent = chain[-1] if chain else None
            run = self._run(tokens, index)
            entry = self.child(parent, run)
            if entry is None:
                if (entry := self._publish(parent, run, table[index])) is None:
                    break
            elif entry.count == 0 or leaving:
                if entry.count == 0:
                    freed.append(entry.block)
                    entry.block = table[index]
                self.hold((entry,))
            else:
                break
            chain.append(entry)
        return freed

    def evict(self) -> int:
        """Forget the entry longest at rest; its block is the caller's. Raises ``LedgerError`` when all are held."""
        if not self._idle:
            raise LedgerError("every cached block is held: nothing to evict")
        _, entry = self._idle.popitem(last=False)
        del self._entries[entry.hash]
        if entry.parent is not None:
            entry.parent.children -= 1
        return entry.block

    def check(self) -> None:
        """Raises ``LedgerError`` on a stranded child, a wrong count of children, or an idle list that lies."""
        children: dict[int, int] = {}
        for entry in self._entries.values():
            if entry.parent is not None:
                children[entry.parent.hash] = children.get(entry.parent.hash, 0) + 1
                if self._entries.get(entry.parent.hash) is not entry.parent:
                    raise LedgerError(f"cached block {entry.block} lost its parent block {entry.parent.block}")
                if entry.parent.count < entry.count:
                    raise LedgerError(f"cached block {entry.block} has more holders than its parent")
            if (entry.count == 0) != (entry.hash in self._idle) or entry.count < 0:
                raise LedgerError(f"cached block {entry.block} has {entry.count} holders but is in the wrong list")
        for entry in self._entries.values():
            if children.get(entry.hash, 0) != entry.children:
                raise LedgerError(f"cached block {entry.block} counts {entry.children} children")
        seen: set[int] = set()
        for entry in self._idle.values():
            if entry.parent is not None and entry.parent.hash in seen:
                raise LedgerError(f"cached block {entry.block} would be evicted after its parent")
            seen.add(entry.hash)
        if len({e.block for e in self._entries.values()}) != len(self._entries):
            raise LedgerError("a block is cached twice")

    def _publish(self, parent: Entry | None, tokens: tuple[int, ...], block: int) -> Entry | None:
        key = self._chain_hash(parent, tokens)
        if key in self._entries:
            return None
        entry = Entry(block, tokens, key, parent, count=1)
        self._entries[key] = entry
        if parent is not None:
            parent.children += 1
        return entry

    def _chain_hash(self, parent: Entry | None, tokens: tuple[int, ...]) -> int:
        return self._link(parent.hash if parent is not None else 0, tokens)

    def _run(self, tokens: Sequence[int], index: int) -> tuple[int, ...]:
        start = index * self._block_size
        return tuple(tokens[start : start + self._block_size])
