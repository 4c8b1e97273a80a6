"""What may happen to a move (DESIGN §5): the words between its two sides, and what their data planes report.

Part of ``events``, which names them all; a module of its own because the protocol is read as one page.
"""

from __future__ import annotations

from dataclasses import dataclass

from distserve.core.types import Endpoint, GatewayRef, InstanceRef, Request, Ticket, Token

# ── instance ↔ instance: the move (DESIGN §5) ────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class ReserveAsked:
    """Step 1. May be repeated; the answer is the same ticket. ``output`` are tokens produced so far.

    The destination may make it wait (no room): absence of a ticket is the back-pressure. ``total_tokens`` is how many
    KV positions the move will carry, ``timeout_s`` how long the source will wait for a ticket.
    """

    move_id: str
    source: Endpoint
    destination: InstanceRef
    gateway: GatewayRef
    request: Request
    epoch: int
    output: tuple[int, ...]
    fingerprint: str
    total_tokens: int
    timeout_s: float
    request_timeout_s: float


@dataclass(frozen=True, slots=True)
class ReserveGranted:
    """The destination's ticket."""

    ticket: Ticket


@dataclass(frozen=True, slots=True)
class MoveEnded:
    """Either side ends a move without a change of owner. Idempotent; sent to whoever else may hold something for it."""

    move_id: str
    sender: InstanceRef
    reason: str
    retriable: bool = True


@dataclass(frozen=True, slots=True)
class CommitAsked:
    """Step 3. All KV up to ``total_tokens`` is sent or on its way. May be repeated; the answer is the same.

    ``output`` are all output tokens so far; ``recent`` the last of them in full, which the new owner repeats to the
    gateway. The destination becomes owner at ``ticket epoch + 1``.
    """

    move_id: str
    source: InstanceRef
    nonce: int
    epoch: int
    total_tokens: int
    output: tuple[int, ...]
    recent: tuple[Token, ...]
    reserve_s: float = 0.0  # how long the sequence waited for its ticket after its first token


@dataclass(frozen=True, slots=True)
class Committed:
    """The destination owns the sequence now, at ``epoch``; the source may free."""

    move_id: str
    sender: InstanceRef
    epoch: int


@dataclass(frozen=True, slots=True)
class MoveQueried:
    """Who owns it? Answered by ``Committed``, ``ReserveGranted`` (still open), or ``MoveEnded``."""

    move_id: str
    sender: InstanceRef


@dataclass(frozen=True, slots=True)
class PeerLost:
    """Local to the instance: control messages to this life of a peer can no longer be delivered."""

    ref: InstanceRef
    why: str = ""


# ── data plane → instance (local) ────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class StageSent:
    """Source side: the bytes of ``[start, end)`` were verified and stored at the destination."""

    move_id: str
    start: int
    end: int
    nbytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class StageFailed:
    """Source side: a stage will not arrive."""

    move_id: str
    reason: str
    retriable: bool


@dataclass(frozen=True, slots=True)
class StageStored:
    """Destination side: tokens ``[start, end)`` are verified and in the reserved blocks."""

    move_id: str
    nonce: int
    start: int
    end: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class StageCorrupt:
    """Destination side: bytes under this ticket failed verification; nothing of them reached a block."""

    move_id: str
    nonce: int
    reason: str
