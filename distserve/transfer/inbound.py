"""The destination's end of one link: a thread that verifies what arrives in staging and lets the grants write it.

Payload is trusted with nothing until its slice is verified: a wrong length, checksum, ticket or order ends the stage,
not the link; bytes that are no protocol end the link. While no stage is under way the thread waits without a deadline
and costs nothing; within a stage silence ends the link.
"""

from __future__ import annotations

import socket
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from distserve.core.types import InstanceRef
from distserve.kv.shard import KvPart
from distserve.transfer.checksum import slice_seed, stage_seed
from distserve.transfer.config import TransferConfig
from distserve.transfer.counts import Counts
from distserve.transfer.errors import Garbled, TransferError
from distserve.transfer.events import MoverEvent, Reason, StageCorrupt, StageStored
from distserve.transfer.grants import Grant, Grants
from distserve.transfer.handshake import Link, accept
from distserve.transfer.identity import Identity
from distserve.transfer.layout import Slice, cut
from distserve.transfer.pinned import PinnedSlots
from distserve.transfer.stage import StageHead
from distserve.v1 import transfer_pb2 as pb
from distserve_kernels.checksum import Bytes
from distserve_kernels.cores import keep_to
from distserve_kernels.kv_part import PagedPart, StagedSlice
from distserve_kernels.streams import own_stream


@dataclass(slots=True)
class _Arriving:
    """The stage that is under way."""

    number: int  # on this link
    head: StageHead
    grant: Grant
    seed: int
    checksum: bool
    slices: deque[Slice]  # not stored yet
    index: int = 0  # of the first of them
    nbytes: int = 0  # stored

    def cut(self, nbytes: int, staged: Bytes) -> deque[tuple[Slice, StagedSlice]]:
        """The next slices, as many as are whole in a staged piece of so many bytes."""
        found: deque[tuple[Slice, StagedSlice]] = deque()
        at = 0
        for index, each in enumerate(self.slices, self.index):
            if at + each.nbytes > nbytes:
                break
            found.append((each, StagedSlice(staged[at : at + each.nbytes], slice_seed(self.seed, index))))
            at += each.nbytes
        return found

    def advance(self) -> None:
        """The first slice is stored."""
        self.nbytes += self.slices.popleft().nbytes
        self.index += 1


class Inbound:
    """One accepted connection, from the handshake to its end, on a thread of its own."""

    def __init__(
        self,
        me: Identity,
        sock: socket.socket,
        window: Callable[[KvPart], PagedPart],
        grants: Grants,
        report: Callable[[MoverEvent], None],
        counts: Counts,
        config: TransferConfig,
        ended: Callable[[Inbound], None],
    ) -> None:
        self._me = me
        self._sock = sock
        self._window_of = window
        self._grants = grants
        self._report = report
        self._counts = counts
        self._config = config
        self._ended = ended
        self._arriving: _Arriving | None = None
        self._announced: deque[pb.TransferPiece] = deque()  # not taken yet
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
        keep_to(self._config.cores)
        try:
            with own_stream(self._me.device):
                self._accept()
        finally:
            self._ended(self)

    def _accept(self) -> None:
        try:
            link = accept(self._me, self._sock, self._config, self._grants.ticket)
        except TransferError as error:
            self._counts.add(f"handshakes_{error.reason}")
        else:
            self.peer = link.peer
            self._counts.add(f"links_in_{link.kind}")
            self._serve(link)

    def _serve(self, link: Link) -> None:
        """Handle frames until the link ends: all that have come, then one piece, so that the next are on their way."""
        self._window = self._window_of(link.part)
        self._staged = [self._window.staging(slot) for slot in link.lane.slots]
        pinned = PinnedSlots(link.lane.slots, self._me.device)
        try:
            while True:
                if not self._announced:
                    self._handle(link, link.channel.receive(self._config.stall_s if self._arriving else None))
                while (frame := link.channel.receive_ready()) is not None:
                    self._handle(link, frame)
                if self._announced:
                    self._take(link, self._announced.popleft())
        except TransferError as error:
            self._counts.add(f"links_in_ended_{error.reason}")
            if self._arriving and isinstance(error, Garbled):
                self._corrupt(self._arriving, str(error))
        finally:
            self._staged = []
            pinned.release()
            link.close()

    def _handle(self, link: Link, frame: pb.TransferFrame) -> None:
        match frame.WhichOneof("kind"):
            case "piece":
                self._expect(link, frame.piece)
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
        grant = self._grants.begin(head, link.part, self._window)
        if isinstance(grant, str):
            self._refuse(link, begin.stage, Reason.TICKET, grant)
            return
        slices = deque(cut(link.source_layout, head.start, head.end, link.slice_bytes))
        self._arriving = _Arriving(begin.stage, head, grant, stage_seed(head.seed()), begin.checksum, slices)

    def _expect(self, link: Link, piece: pb.TransferPiece) -> None:
        """Let an announced piece come into its slot."""
        slots = len(link.lane.slots)
        if not 0 < piece.nbytes <= link.slot_bytes:
            raise Garbled(f"a piece of {piece.nbytes} bytes was announced for slots of {link.slot_bytes}")
        if len(self._announced) == slots:
            raise Garbled(f"more pieces were announced than the {slots} slots of the lane")
        link.lane.expect((self._pieces + len(self._announced)) % slots, piece.nbytes)
        self._announced.append(piece)

    def _take(self, link: Link, piece: pb.TransferPiece) -> None:
        """Receive an expected piece into staging, and store it if it is sound and wanted."""
        slot = self._pieces % len(link.lane.slots)
        link.lane.take(slot, self._config.stall_s)
        arriving = self._arriving if self._arriving and self._arriving.number == piece.stage else None
        refusal = self._store(arriving, piece, self._staged[slot]) if arriving else None
        link.lane.free(slot)
        self._pieces += 1
        if arriving and refusal:
            if refusal[0] is not Reason.TICKET:
                self._corrupt(arriving, refusal[1])
            self._refuse(link, arriving.number, *refusal)
        elif arriving and not arriving.slices:
            self._finish(link, arriving)
        elif self._pieces - self._told >= max(1, len(link.lane.slots) // 2):
            self._told = self._pieces
            link.channel.send(pb.TransferFrame(consumed=pb.TransferConsumed(pieces=self._pieces)))

    def _store(self, arriving: _Arriving, piece: pb.TransferPiece, staged: Bytes) -> tuple[Reason, str] | None:
        """Let the grant write each sound slice of a piece in staging, while the next one is verified; or say why not.

        A slice is written only after it was verified: what is summed up during a write is the slice after it.
        """
        if piece.index != arriving.index:
            return Reason.PROTOCOL, f"slice {piece.index} came when {arriving.index} was next"
        waiting = arriving.cut(piece.nbytes, staged)
        if sum(each.nbytes for each, _ in waiting) != piece.nbytes:
            return Reason.CHECKSUM, f"the piece of slice {piece.index} has a wrong length, {piece.nbytes} bytes"
        if arriving.checksum and len(waiting) != len(piece.checksums):
            return Reason.CHECKSUM, f"the piece of slice {piece.index} has {len(piece.checksums)} checksums"
        found = waiting[0][1].digest() if arriving.checksum else 0
        said = iter(piece.checksums)
        while waiting:
            each, here = waiting.popleft()
            if arriving.checksum and found != next(said):
                index = arriving.index
                return Reason.CHECKSUM, f"slice {index} has the checksum {found:016x}, not the one it was sent with"
            ahead = waiting[0][1] if waiting and arriving.checksum else None
            written = self._grants.write(arriving.grant, arriving.head, each, here.staged, ahead)
            if isinstance(written, str):
                return Reason.TICKET, written
            found = written
            arriving.advance()
        return None

    def _finish(self, link: Link, arriving: _Arriving) -> None:
        """The stage is whole: tell the instance first, then the source, whose commit could overtake us otherwise."""
        head = arriving.head
        stored = self._grants.finish(arriving.grant, head, arriving.nbytes)
        if isinstance(stored, str):
            self._refuse(link, arriving.number, Reason.TICKET, stored)
            return
        self._arriving = None
        self._counts.add("stages_stored")
        self._counts.add("bytes_stored", arriving.nbytes)
        if stored.start < stored.end:
            self._report(StageStored(head.move_id, head.nonce, stored.start, stored.end, stored.nbytes))
        self._end(link, arriving.number, "", "")

    def _corrupt(self, arriving: _Arriving, why: str) -> None:
        self._report(StageCorrupt(arriving.head.move_id, arriving.head.nonce, why))

    def _refuse(self, link: Link, number: int, reason: Reason, detail: str) -> None:
        self._arriving = None
        self._counts.add(f"stages_refused_{reason}")
        self._end(link, number, reason, detail)

    def _end(self, link: Link, number: int, reason: str, detail: str) -> None:
        self._told = self._pieces
        end = pb.TransferStageEnd(stage=number, reason=reason, detail=detail, consumed=self._pieces)
        link.channel.send(pb.TransferFrame(end=end))
