"""The source's end of one open link: gathers a stage slice by slice, pushes it in pieces, and hears how it ended.

Pool bytes are read only under the move's ``Reading``, so that an abort is a fence; everything later works on staging.
Used by one thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from distserve.core.types import Ticket
from distserve.transfer.checksum import slice_seed, stage_seed
from distserve.transfer.config import TransferConfig
from distserve.transfer.errors import Garbled, Stalled
from distserve.transfer.events import Reason
from distserve.transfer.handshake import Link
from distserve.transfer.layout import Slice, cut, pieces
from distserve.transfer.pinned import PinnedSlots
from distserve.transfer.stage import StageHead
from distserve.v1 import transfer_pb2 as pb
from distserve_kernels.checksum import Bytes
from distserve_kernels.kv_part import PagedPart


@dataclass(slots=True, eq=False, weakref_slot=True)
class Reading:
    """A move's permission to read the pool; gone for good once aborted. Held while a slice is gathered."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    aborted: bool = False

    def abort(self) -> None:
        """The fence: when it returns nothing of the move is read any more."""
        with self.lock:
            self.aborted = True


@dataclass(slots=True, eq=False)
class Stage:
    """Tokens ``[start, end)`` to send; ``blocks`` is the source's table from position 0."""

    ticket: Ticket
    address: str
    start: int
    end: int
    blocks: tuple[int, ...]
    final: bool
    reading: Reading
    deadline: float  # monotonic


class Ended(Exception):
    """The stage failed, the link did not."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


class Aborted(Exception):
    """The stage was aborted at this end."""


class Sender:
    """One open link, seen by the thread that sends on it."""

    def __init__(self, link: Link, pool: PagedPart, config: TransferConfig) -> None:
        self.link = link
        self._pool = pool
        self._config = config
        self._staged: list[Bytes] = [pool.staging(slot) for slot in link.lane.slots]
        self._pinned = PinnedSlots(link.lane.slots, pool.device)
        self._stages = 0
        self._pushed = 0  # pieces since the link began
        self._consumed = 0  # of these, how many the destination is done with
        self._end: pb.TransferStageEnd | None = None  # of the stage under way

    def send(self, stage: Stage) -> int:
        """Send one stage to its end; returns its bytes. Ended and Aborted spare the link, TransferError does not."""
        self._stages += 1
        self._end = None
        head = StageHead.of(stage.ticket, stage.start, stage.end, self._pool.block_size, stage.final)
        begin = head.to_wire(self._stages, self._config.checksum)
        self.link.channel.send(pb.TransferFrame(begin=begin))
        try:
            nbytes = self._send_pieces(stage, head)
        except (Ended, Aborted):
            self.link.channel.send(pb.TransferFrame(abort=pb.TransferStageAbort(stage=self._stages)))
            raise
        end = self._verdict()
        if end is None or (not end.reason and nbytes < payload_bytes(self.link, stage)):
            raise Garbled("the destination stored a stage that it had not received")
        if end.reason:
            raise Ended(_reason(end.reason), end.detail)
        return nbytes

    def _send_pieces(self, stage: Stage, head: StageHead) -> int:
        """Send pieces until the destination has ended the stage; returns the bytes sent."""
        seed, index, nbytes = stage_seed(head.seed()), 0, 0
        slices = cut(self.link.source_layout, stage.start, stage.end, self.link.slice_bytes)
        for piece in pieces(slices, self.link.slot_bytes):
            self._await(stage, lambda: self._pushed - self._consumed < len(self._staged))
            if self._verdict() is not None:
                return nbytes
            nbytes += self._send_piece(stage, index, piece, seed)
            index += len(piece)
        self._await(stage, lambda: False)
        return nbytes

    def close(self) -> None:
        self._staged = []
        self._pinned.release()
        self.link.close()

    def _send_piece(self, stage: Stage, first: int, slices: list[Slice], seed: int) -> int:
        """Gather these slices, of which ``first`` is the first one's index, into the next slot and push it."""
        faults = self._config.faults
        faults.on_piece(stage.ticket, first)
        slot = self._pushed % len(self._staged)
        staged = self._staged[slot]
        nbytes, checksums = 0, []
        for index, each in enumerate(slices, first):
            room = staged[nbytes : nbytes + each.nbytes]
            summed = slice_seed(seed, index) if self._config.checksum else None
            with stage.reading.lock:
                if stage.reading.aborted:
                    raise Aborted
                checksum = self._pool.gather(stage.blocks[each.low : each.high], room, each.rows, summed)
            if self._config.checksum:
                checksums.append(checksum)
            nbytes += each.nbytes
        faults.on_staged(stage.ticket, first, staged[:nbytes])
        sent = faults.piece_bytes(stage.ticket, first, nbytes)
        self.link.lane.push(slot, sent)
        self._pushed += 1
        piece = pb.TransferPiece(stage=self._stages, index=first, nbytes=sent, checksums=checksums)
        self.link.channel.send(pb.TransferFrame(piece=piece))
        return nbytes

    def _await(self, stage: Stage, enough: Callable[[], bool]) -> None:
        """Hear the destination until ``enough``, or it has ended the stage. Ended when the stage's time is up."""
        while self._verdict() is None and not enough():
            left = stage.deadline - time.monotonic()
            if left <= 0:
                raise Ended(Reason.TIMEOUT, f"the stage took longer than {self._config.stage_s:g} s")
            try:
                self._handle(self.link.channel.receive(min(left, self._config.stall_s)))
            except Stalled:
                if left >= self._config.stall_s:
                    raise

    def _verdict(self) -> pb.TransferStageEnd | None:
        """How the destination ended the stage under way, if it did."""
        return self._end

    def _handle(self, frame: pb.TransferFrame) -> None:
        match frame.WhichOneof("kind"):
            case "consumed":
                self._consumed = frame.consumed.pieces
            case "end":
                self._consumed = frame.end.consumed
                if frame.end.stage == self._stages:
                    self._end = frame.end
            case other:
                raise Garbled(f"a frame of kind {other} has no place on an open link")


def payload_bytes(link: Link, stage: Stage) -> int:
    """The bytes that a stage puts on its link."""
    size = link.source_layout.block_size
    return (-(-stage.end // size) - stage.start // size) * link.source_layout.block_bytes


def _reason(word: str) -> Reason:
    try:
        return Reason(word)
    except ValueError:
        return Reason.PROTOCOL
