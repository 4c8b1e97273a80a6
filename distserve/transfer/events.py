"""What a mover tells its instance, and how it names failures. Frozen values; nothing here acts."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Reason(StrEnum):
    """Why a stage failed. ``PEER``, ``TIMEOUT`` and ``CHECKSUM`` may be tried again under the same ticket."""

    CHECKSUM = "checksum"  # bytes changed on the way; nothing of that piece was written
    TICKET = "ticket"  # the destination has no such grant, or the stage does not fit it
    PEER = "peer"  # the other end is gone, or cannot be reached
    TIMEOUT = "timeout"  # the other end, or the network, made no progress in time
    REFUSED = "refused"  # the two ends cannot exchange KV: model, layout, life or lane
    PROTOCOL = "protocol"  # the other end said what the protocol does not allow
    CLOSED = "closed"  # this mover was closed
    INTERNAL = "internal"  # a fault of this program at the source

    @property
    def retriable(self) -> bool:
        """True when the same stage may be sent again under the same ticket."""
        return self in (Reason.CHECKSUM, Reason.PEER, Reason.TIMEOUT)


@dataclass(frozen=True, slots=True)
class StageSent:
    """At the source: the destination has verified and stored tokens ``[start, end)``. ``seconds`` from its turn on."""

    move_id: str
    start: int
    end: int
    nbytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class StageFailed:
    """At the source: the stage is not stored. ``detail`` is a sentence for people."""

    move_id: str
    reason: str  # a Reason
    retriable: bool
    start: int = 0
    end: int = 0
    detail: str = ""


@dataclass(frozen=True, slots=True)
class StageStored:
    """At the destination: tokens ``[start, end)`` are verified and in the pool."""

    move_id: str
    nonce: int
    start: int
    end: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class StageCorrupt:
    """At the destination: a piece of an open ticket's stage failed its checksum; ``reason`` is a sentence."""

    move_id: str
    nonce: int
    reason: str


MoverEvent = StageSent | StageFailed | StageStored | StageCorrupt
