"""The destination's open tickets, and the one door through which moved bytes enter the pool.

A grant is checked under its own lock, once when a stage begins and again for every piece, and the piece is written
under that lock: after ``close`` returns nothing of the move will be written any more, and it waited for one piece at
most. At any time one stage at most may write for a grant: the one that began last, of whichever link.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from distserve.core.types import Ticket
from distserve.transfer.layout import PieceSpan
from distserve.transfer.stage import StageHead
from distserve_kernels.kv_copy import Bytes, PagedBytes


@dataclass(slots=True, eq=False)
class Grant:
    """An open ticket with the blocks it may write. ``filled`` is the first position not stored yet."""

    ticket: Ticket
    blocks: tuple[int, ...]
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


class Grants:
    """All open tickets of one destination pool. Thread-safe."""

    def __init__(self, pool: PagedBytes) -> None:
        self._pool = pool
        self._open: dict[str, Grant] = {}
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
            self._open[ticket.move_id] = Grant(ticket, blocks, filled=ticket.have_tokens)

    def close(self, move_id: str) -> None:
        """The fence: when it returns nothing of the move will be written any more."""
        with self._lock:
            grant = self._open.pop(move_id, None)
        if grant is not None:
            with grant.lock:
                grant.closed = True
                grant.writer = None

    def close_all(self) -> None:
        """Close every ticket."""
        with self._lock:
            moves = list(self._open)
        for move_id in moves:
            self.close(move_id)

    def begin(self, head: StageHead) -> Grant | str:
        """The grant under which the stage may write from now on, or the sentence that refuses it."""
        with self._lock:
            grant = self._open.get(head.move_id)
        if grant is None:
            return f"no ticket is open for move {head.move_id}"
        with grant.lock:
            if why := grant.misfit(head):
                return why
            grant.writer = head
        return grant

    def write(self, grant: Grant, head: StageHead, span: PieceSpan, staged: Bytes) -> str:
        """Write one verified piece into the pool, or say why it may not be."""
        with grant.lock:
            if grant.writer is not head:
                return "the ticket was closed meanwhile" if grant.closed else "a later stage took the ticket over"
            self._pool.scatter(grant.blocks, staged, head.block_size, span.first_token, span.start, span.end, span.rows)
        return ""

    def finish(self, grant: Grant, head: StageHead) -> str:
        """All pieces of the stage are written: the next stage starts at its end. Or why it does not count."""
        with grant.lock:
            if grant.writer is not head:
                return "the ticket was closed meanwhile" if grant.closed else "a later stage took the ticket over"
            grant.writer = None
            grant.filled = head.end
            grant.complete = head.final
        return ""
