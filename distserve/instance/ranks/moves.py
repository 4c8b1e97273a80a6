"""The data plane of an instance of several ranks: every rank's mover moves its own share, and what they tell becomes
what one mover would have told: a stage is sent when every rank has sent its part, stored when every rank has stored it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from distserve.core.effects import AbortSend, CloseTicket, OpenTicket, SendStage
from distserve.core.types import InstanceRef, Ticket
from distserve.instance.ranks.crew import Crew
from distserve.transfer import Mover, MoverEvent, StageCorrupt, StageStored
from distserve.transfer.tally import SendTally


@dataclass(slots=True)
class _Storing:
    """One move at its destination: how far each rank has come."""

    ends: dict[int, int] = field(default_factory=dict)
    told: int = -1  # up to which token the instance was told
    nbytes: int = 0


class Tally:
    """Makes one event of the events of all ranks. Thread-safe; ``report`` is called under a lock and must be quick."""

    def __init__(self, ranks: int, report: Callable[[MoverEvent], None]) -> None:
        self._ranks = ranks
        self._report = report
        self._lock = threading.Lock()
        self._sent = SendTally(report)
        self._storing: dict[str, _Storing] = {}

    def sending(self, move_id: str, start: int, end: int) -> None:
        """A stage is about to be sent."""
        self._sent.expect(move_id, start, end, self._ranks)

    def storing(self, ticket: Ticket) -> None:
        """A ticket is about to be opened."""
        with self._lock:
            self._storing[ticket.move_id] = _Storing(told=ticket.have_tokens)

    def forget_sending(self, move_id: str) -> None:
        """The move is over at its source: nothing is told of it any more."""
        self._sent.forget(move_id)

    def forget_storing(self, move_id: str) -> None:
        """The same at its destination."""
        with self._lock:
            self._storing.pop(move_id, None)

    def take(self, rank: int, event: MoverEvent) -> None:
        """What the mover of a rank tells."""
        match event:
            case StageStored():
                with self._lock:
                    self._stored(rank, event)
            case StageCorrupt():
                with self._lock:
                    if self._storing.pop(event.move_id, None) is not None:
                        self._report(event)
            case _:
                self._sent.take(event)

    def _stored(self, rank: int, event: StageStored) -> None:
        move = self._storing.get(event.move_id)
        if move is None:
            return
        move.ends[rank] = max(event.end, move.ends.get(rank, 0))
        move.nbytes += event.nbytes
        everywhere = min(move.ends.values()) if len(move.ends) == self._ranks else move.told
        if everywhere > move.told:
            start, move.told = move.told, everywhere
            nbytes, move.nbytes = move.nbytes, 0
            self._report(StageStored(event.move_id, event.nonce, start, everywhere, nbytes))


class RankedDataPlane:
    """Rank 0's own mover and those of its crew, as one (``instance.ports.DataPlane``). ``address`` names them all."""

    def __init__(self, own: Mover, crew: Crew, tally: Tally, address: str, part_with_ranks: Callable[[], None]) -> None:
        self.address = address
        self._part_with_ranks = part_with_ranks
        self._own = own
        self._crew = crew
        self._tally = tally

    def open_ticket(self, ticket: Ticket, blocks: tuple[int, ...]) -> None:
        """At every rank; returns when all would let the holder write. ValueError as ``Mover.open_ticket``."""
        self._tally.storing(ticket)
        self._own.open_ticket(ticket, blocks)
        self._crew.order(OpenTicket(ticket, blocks), wait=True)

    def close_ticket(self, move_id: str) -> None:
        """Fence, at every rank."""
        self._tally.forget_storing(move_id)
        self._own.close_ticket(move_id)
        self._crew.order(CloseTicket(move_id), wait=True)

    def send_stage(
        self, ticket: Ticket, destination_address: str, start: int, end: int, blocks: tuple[int, ...], final: bool
    ) -> None:
        """Every rank queues its part. ValueError as ``Mover.send_stage``."""
        self._tally.sending(ticket.move_id, start, end)
        self._own.send_stage(ticket, destination_address, start, end, blocks, final)
        self._crew.order(SendStage(ticket, destination_address, start, end, blocks, final), wait=False)

    def abort_send(self, move_id: str) -> None:
        """Fence, at every rank."""
        self._tally.forget_sending(move_id)
        self._own.abort_send(move_id)
        self._crew.order(AbortSend(move_id), wait=True)

    def peer_lost(self, peer: InstanceRef) -> None:
        """Every rank drops its links with this life of an instance."""
        self._own.peer_lost(peer)
        self._crew.order(peer, wait=False)

    def counts(self) -> dict[str, int]:
        """Of rank 0's own mover."""
        return self._own.counts()

    def close(self) -> None:
        """Release rank 0's own; the others' go with their ranks, which end here."""
        self._own.close()
        self._part_with_ranks()
