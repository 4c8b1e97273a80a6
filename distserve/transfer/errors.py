"""The ways in which a link ends. All are caught at its two ends and become events.

TransferError
├── PeerGone    the other end closed, was killed, or cannot be reached
├── Stalled     the other end made no progress before a deadline
├── Garbled     the other end said what the protocol does not allow
├── Refused     the other end, or this one, will not have the link; carries the sentence
│   └── NoTicket    for its ticket alone: the pair may do better with another
└── LaneFailed  the payload's way broke
"""

from __future__ import annotations

from distserve.transfer.events import Reason
from distserve.v1 import transfer_pb2 as pb


class TransferError(Exception):
    """A link ended. ``reason`` is what the stages on it are told."""

    reason = Reason.PEER


class PeerGone(TransferError):
    """The other end closed, was killed, or cannot be reached."""


class Stalled(TransferError):
    """No progress before a deadline."""

    reason = Reason.TIMEOUT


class Garbled(TransferError):
    """The other end said what the protocol does not allow."""

    reason = Reason.PROTOCOL


class Refused(TransferError):
    """The two ends cannot exchange KV."""

    reason = Reason.REFUSED


class NoTicket(Refused):
    """One end does not hold the ticket that the link is for."""

    reason = Reason.TICKET


class LaneFailed(TransferError):
    """The payload's way broke; the socket may not know yet."""


def refusal_of(refusal: pb.TransferRefusal) -> Refused:
    """What the other end refused with, as an error of this one."""
    return NoTicket(refusal.reason) if refusal.ticket else Refused(refusal.reason)
