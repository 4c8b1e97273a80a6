"""The head of a stage: which ticket it claims and which tokens it brings; and its form on the wire."""

from __future__ import annotations

from dataclasses import dataclass

from distserve.core.types import InstanceRef, Ticket
from distserve.v1 import transfer_pb2 as pb


@dataclass(frozen=True, slots=True)
class StageHead:
    """What a source says of a stage it begins; the fields are those of the ticket, then the range."""

    move_id: str
    request_id: str
    epoch: int
    source: InstanceRef
    destination: InstanceRef
    fingerprint: str
    nonce: int
    start: int
    end: int
    block_size: int  # of the source
    final: bool

    def seed(self) -> bytes:
        """What every checksum of the stage covers besides the payload."""
        parts = (
            self.move_id, self.request_id, self.epoch, self.source, self.destination, self.fingerprint, self.nonce,
            self.start, self.end, self.block_size, self.final,
        )  # fmt: skip
        return "\0".join(map(str, parts)).encode()

    @classmethod
    def of(cls, ticket: Ticket, start: int, end: int, block_size: int, final: bool) -> StageHead:
        """The head under which the holder of ``ticket`` sends tokens ``[start, end)``."""
        return cls(
            ticket.move_id,
            ticket.request_id,
            ticket.epoch,
            ticket.source,
            ticket.destination,
            ticket.fingerprint,
            ticket.nonce,
            start,
            end,
            block_size,
            final,
        )

    @classmethod
    def from_wire(cls, begin: pb.TransferStageBegin) -> StageHead:
        """What the peer says; nothing of it is checked."""
        return cls(
            begin.move_id,
            begin.request_id,
            begin.epoch,
            ref_from_wire(begin.source),
            ref_from_wire(begin.destination),
            begin.fingerprint,
            begin.nonce,
            begin.start,
            begin.end,
            begin.block_size,
            begin.final,
        )

    def to_wire(self, stage: int, checksum: bool) -> pb.TransferStageBegin:
        """The frame that begins stage number ``stage`` of a link."""
        return pb.TransferStageBegin(
            stage=stage,
            move_id=self.move_id,
            request_id=self.request_id,
            epoch=self.epoch,
            source=ref_to_wire(self.source),
            destination=ref_to_wire(self.destination),
            fingerprint=self.fingerprint,
            nonce=self.nonce,
            start=self.start,
            end=self.end,
            first_token=self.start // self.block_size * self.block_size,
            block_size=self.block_size,
            final=self.final,
            checksum=checksum,
        )


def ref_to_wire(ref: InstanceRef) -> pb.TransferPeer:
    return pb.TransferPeer(id=ref.id, incarnation=ref.incarnation)


def ref_from_wire(peer: pb.TransferPeer) -> InstanceRef:
    return InstanceRef(peer.id, peer.incarnation)
