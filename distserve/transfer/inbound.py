"""The destination's end of one link: a thread that verifies what arrives in staging and lets the grants write it.

Payload is trusted with nothing until its piece is verified: a wrong length, checksum, ticket or order ends the stage,
not the link; bytes that are no protocol end the link. While no stage is under way the thread waits without a deadline
and costs nothing; within a stage silence ends the link.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from distserve.core.types import InstanceRef
from distserve.transfer.checksum import digest, seed_of
from distserve.transfer.config import TransferConfig
from distserve.transfer.counts import Counts
from distserve.transfer.errors import Garbled, TransferError
from distserve.transfer.events import MoverEvent, Reason, StageCorrupt, StageStored
from distserve.transfer.grants import Grant, Grants
from distserve.transfer.handshake import Identity, Link, accept
from distserve.transfer.layout import PieceSpan, cut
from distserve.transfer.stage import StageHead
from distserve.v1 import transfer_pb2 as pb
from distserve_kernels.kv_copy import Bytes, PagedBytes


@dataclass(slots=True)
class _Arriving:
    """The stage that is under way."""

    number: int  # on this link
    head: StageHead
    grant: Grant
    seed: bytes
    checksum: bool
    spans: Iterator[PieceSpan]
    next_span: PieceSpan | None
    index: int = 0
    nbytes: int = 0


class Inbound:
    """One accepted connection, from the handshake to its end, on a thread of its own."""

    def __init__(
        self,
        me: Identity,
        sock: socket.socket,
        pool: PagedBytes,
        grants: Grants,
        report: Callable[[MoverEvent], None],
        counts: Counts,
        config: TransferConfig,
        ended: Callable[[Inbound], None],
    ) -> None:
        self._me = me
        self._sock = sock
        self._pool = pool
        self._grants = grants
        self._report = report
        self._counts = counts
        self._config = config
        self._ended = ended
        self._arriving: _Arriving | None = None
        self._pieces = 0  # taken from the lane since the link began
        self._told = 0  # of these, how many the source was told of
        self._staged: list[Bytes] = []
        self.peer: InstanceRef | None = None  # known after the handshake
        self.thread = threading.Thread(target=self._run, name=f"kv-in {me.ref}", daemon=True)

    def interrupt(self) -> None:
        """Break the connection; the thread ends soon. From any thread."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # closed or broken already: the thread is on its way out

    def _run(self) -> None:
        try:
            link = accept(self._me, self._sock, self._config)
        except TransferError as error:
            self._counts.add(f"handshakes_{error.reason}")
        else:
            self.peer = link.peer
            self._counts.add(f"links_in_{link.kind}")
            self._serve(link)
        finally:
            self._ended(self)

    def _serve(self, link: Link) -> None:
        """Handle frames until the link ends."""
        self._staged = [self._pool.staging(slot) for slot in link.lane.slots]
        try:
            while True:
                self._handle(link, link.channel.receive(self._config.stall_s if self._arriving else None))
        except TransferError as error:
            self._counts.add(f"links_in_ended_{error.reason}")
        finally:
            self._staged = []
            link.close()

    def _handle(self, link: Link, frame: pb.TransferFrame) -> None:
        match frame.WhichOneof("kind"):
            case "piece":
                self._take(link, frame.piece)
            case "begin":
                self._begin(link, frame.begin)
            case "abort":
                if self._arriving and self._arriving.number == frame.abort.stage:
                    self._arriving = None
                    self._counts.add("stages_aborted")
            case other:
                raise Garbled(f"a frame of kind {other} has no place on an open link")

    def _begin(self, link: Link, begin: pb.TransferStageBegin) -> None:
        if self._arriving:
            raise Garbled("a stage began before the one before it ended")
        head = StageHead.from_wire(begin)
        if head.source != link.peer or head.block_size != link.source_layout.block_size:
            self._refuse(link, begin.stage, Reason.TICKET, "the stage is not from the instance that opened the link")
            return
        if self._config.checksum and not begin.checksum:
            self._refuse(link, begin.stage, Reason.PROTOCOL, f"{self._me.ref} takes no stage without checksums")
            return
        grant = self._grants.begin(head)
        if isinstance(grant, str):
            self._refuse(link, begin.stage, Reason.TICKET, grant)
            return
        spans = cut(link.source_layout, head.start, head.end, link.slot_bytes)
        self._arriving = _Arriving(begin.stage, head, grant, head.seed(), begin.checksum, spans, next(spans, None))

    def _take(self, link: Link, piece: pb.TransferPiece) -> None:
        """Receive an announced piece into staging, and store it if it is sound and wanted."""
        if not 0 < piece.nbytes <= link.slot_bytes:
            raise Garbled(f"a piece of {piece.nbytes} bytes was announced for slots of {link.slot_bytes}")
        slot = self._pieces % len(link.lane.slots)
        link.lane.take(slot, piece.nbytes, self._config.stall_s)
        arriving = self._arriving if self._arriving and self._arriving.number == piece.stage else None
        refusal = self._store(link, arriving, piece, slot) if arriving else None
        link.lane.release(slot)
        self._pieces += 1
        if arriving and refusal:
            self._refuse(link, arriving.number, *refusal)
            if refusal[0] is Reason.CHECKSUM:
                self._report(StageCorrupt(arriving.head.move_id, arriving.head.nonce, refusal[1]))
        elif arriving and arriving.next_span is None:
            self._finish(link, arriving)
        elif self._pieces - self._told >= max(1, len(link.lane.slots) // 4):
            self._told = self._pieces
            link.channel.send(pb.TransferFrame(consumed=pb.TransferConsumed(pieces=self._pieces)))

    def _store(self, link: Link, arriving: _Arriving, piece: pb.TransferPiece, slot: int) -> tuple[Reason, str] | None:
        """Verify a piece in staging and let its grant write it; or why not."""
        span = arriving.next_span
        if span is None or piece.index != arriving.index:
            return Reason.PROTOCOL, f"piece {piece.index} is out of order"
        if piece.nbytes != span.nbytes:
            return Reason.CHECKSUM, f"piece {piece.index} has {piece.nbytes} of {span.nbytes} bytes"
        if arriving.checksum:
            found = digest(link.lane.slots[slot], span.nbytes, seed_of(arriving.seed, piece.index))
            if found != piece.checksum:
                return Reason.CHECKSUM, f"piece {piece.index} has checksum {found:016x}, not {piece.checksum:016x}"
        if why := self._grants.write(arriving.grant, arriving.head, span, self._staged[slot][: span.nbytes]):
            return Reason.TICKET, why
        arriving.index += 1
        arriving.nbytes += span.nbytes
        arriving.next_span = next(arriving.spans, None)
        return None

    def _finish(self, link: Link, arriving: _Arriving) -> None:
        """The stage is whole: tell the instance first, then the source, whose commit could overtake us otherwise."""
        head = arriving.head
        if why := self._grants.finish(arriving.grant, head):
            self._refuse(link, arriving.number, Reason.TICKET, why)
            return
        self._arriving = None
        self._counts.add("stages_stored")
        self._counts.add("bytes_stored", arriving.nbytes)
        self._report(StageStored(head.move_id, head.nonce, head.start, head.end, arriving.nbytes))
        self._end(link, arriving.number, "", "")

    def _refuse(self, link: Link, number: int, reason: Reason, detail: str) -> None:
        self._arriving = None
        self._counts.add(f"stages_refused_{reason}")
        self._end(link, number, reason, detail)

    def _end(self, link: Link, number: int, reason: str, detail: str) -> None:
        self._told = self._pieces
        end = pb.TransferStageEnd(stage=number, reason=reason, detail=detail, consumed=self._pieces)
        link.channel.send(pb.TransferFrame(end=end))
