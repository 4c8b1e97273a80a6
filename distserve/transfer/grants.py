"""The destination's open tickets, and the one door through which moved bytes enter the pool.

A grant is checked under its own lock, once when a stage begins and again for every slice, and the slice is written
under that lock: after ``close`` returns nothing of the move will be written any more, and it waited for one slice at
most. At any time one stage at most may write for a grant: the one that began last, of whichever link.

A ticket has one grant for each part (layers and heads) that comes over a link of its own, from a rank of the source.
Tokens are stored when every part of this pool has them.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from distserve.core.types import Ticket
from distserve.kv.shard import KvPart
from distserve.transfer.layout import Slice
from distserve.transfer.stage import StageHead
from distserve_kernels.checksum import Bytes
from distserve_kernels.kv_part import PagedPart, StagedSlice


@dataclass(slots=True, eq=False)
class Grant:
    """One part of an open ticket with the blocks it may write. ``filled`` is the first position not stored yet."""

    ticket: Ticket
    blocks: tuple[int, ...]
    pool: PagedPart  # of the part
    filled: int
    complete: bool = False  # the final stage is stored
    closed: bool = False
    writer: StageHead | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def misfit(self, head: StageHead) -> str:
        """Why the stage may not write here, as a sentence; empty if it may."""
        ticket = self.ticket
        for name in ("request_id", "epoch", "source", "destination", "fingerprint"):
            if getattr(head, name) != getattr(ticket, name):
                return f"{name} {getattr(head, name)} is not the ticket's"
        if head.nonce != ticket.nonce:
            return "the nonce is not the ticket's"
        if self.closed:
            return "the ticket is closed"
        if self.complete:
            return "the final stage is stored already"
        if not ticket.have_tokens <= head.start < head.end <= ticket.total_tokens:
            return (
                f"tokens {head.start} to {head.end} are outside of the granted {ticket.have_tokens} "
                f"to {ticket.total_tokens}"
            )
        if head.start != self.filled:
            return f"the stage starts at token {head.start}, but {self.filled} is next"
        return ""


@dataclass(slots=True, eq=False)
class _Open:
    """An open ticket, all parts of it. ``told`` is the first position not known to be stored in all of them."""

    ticket: Ticket
    blocks: tuple[int, ...]
    told: int
    parts: dict[KvPart, Grant] = field(default_factory=dict)
    nbytes: int = 0  # stored since ``told`` moved


@dataclass(frozen=True, slots=True)
class Stored:
    """Tokens ``[start, end)`` are stored, all of this pool's part of them; none when the two are equal."""

    start: int
    end: int
    nbytes: int


class Grants:
    """All open tickets of one destination pool, which holds ``whole`` of the model's KV. Thread-safe."""

    def __init__(self, pool: PagedPart, whole: KvPart) -> None:
        self._pool = pool
        self._whole = whole
        self._open: dict[str, _Open] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._open)

    def open(self, ticket: Ticket, blocks: tuple[int, ...]) -> None:
        """Let the ticket's holder write; ValueError if it is open already or ``blocks`` cannot hold it."""
        pool = self._pool
        if len(blocks) * pool.block_size < ticket.total_tokens:
            raise ValueError(
                f"{len(blocks)} blocks of {pool.block_size} tokens cannot hold the ticket's {ticket.total_tokens}"
            )
        if blocks and (min(blocks) < 0 or max(blocks) >= pool.num_blocks):
            raise ValueError(f"a block id of ticket {ticket.move_id} is outside of the pool")
        with self._lock:
            if ticket.move_id in self._open:
                raise ValueError(f"ticket {ticket.move_id} is open already")
            self._open[ticket.move_id] = _Open(ticket, blocks, told=ticket.have_tokens)

    def ticket(self, move_id: str) -> Ticket | None:
        """The open ticket of a move."""
        with self._lock:
            opened = self._open.get(move_id)
        return opened.ticket if opened is not None else None

    def close(self, move_id: str) -> None:
        """The fence: when it returns nothing of the move will be written any more."""
        with self._lock:
            opened = self._open.pop(move_id, None)
        for grant in opened.parts.values() if opened is not None else ():
            with grant.lock:
                grant.closed = True
                grant.writer = None

    def close_all(self) -> None:
        """Close every ticket."""
        with self._lock:
            moves = list(self._open)
        for move_id in moves:
            self.close(move_id)

    def begin(self, head: StageHead, part: KvPart, pool: PagedPart) -> Grant | str:
        """The grant under which the stage may write ``part`` from now on, or the sentence that refuses it."""
        with self._lock:
            opened = self._open.get(head.move_id)
            if opened is None:
                return f"no ticket is open for move {head.move_id}"
            grant = opened.parts.get(part)
            if grant is None:
                if any(part.shared(other).area for other in opened.parts):
                    return f"another part of the move has {part} already"
                grant = Grant(opened.ticket, opened.blocks, pool, filled=opened.ticket.have_tokens)
                opened.parts[part] = grant
        with grant.lock:
            if why := grant.misfit(head):
                return why
            grant.writer = head
        return grant

    def write(self, grant: Grant, head: StageHead, span: Slice, staged: Bytes, ahead: StagedSlice | None) -> int | str:
        """Write one verified slice into the pool; returns the checksum of the one ``ahead``. Or why it may not be."""
        with grant.lock:
            if grant.writer is not head:
                return "the ticket was closed meanwhile" if grant.closed else "a later stage took the ticket over"
            place = (head.block_size, span.first_token, span.start, span.end, span.rows)
            return grant.pool.scatter(grant.blocks, staged, *place, ahead)

    def finish(self, grant: Grant, head: StageHead, nbytes: int) -> Stored | str:
        """All slices of the stage are written: the next stage starts at its end. Or why it does not count."""
        with grant.lock:
            if grant.writer is not head:
                return "the ticket was closed meanwhile" if grant.closed else "a later stage took the ticket over"
            grant.writer = None
            grant.filled = head.end
            grant.complete = head.final
        with self._lock:
            opened = self._open.get(head.move_id)
            return "the ticket was closed meanwhile" if opened is None else self._advance(opened, nbytes)

    def _advance(self, opened: _Open, nbytes: int) -> Stored:
        opened.nbytes += nbytes
        come = sum(part.area for part in opened.parts) == self._whole.area
        end = min(grant.filled for grant in opened.parts.values()) if come else opened.told
        if end <= opened.told:
            return Stored(opened.told, opened.told, 0)
        start, opened.told = opened.told, end
        stored, opened.nbytes = opened.nbytes, 0
        return Stored(start, end, stored)
