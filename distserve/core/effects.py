"""Every thing a machine may ask of its shell. Performed in the order given.

Ordering contract: ``CloseTicket`` and ``AbortSend`` are fences and are performed synchronously: when they return, the
data plane touches no block of that move any more. Blocks that a machine frees in ``handle`` may be named again by a
later effect of the same list, never by an earlier one.
"""

from __future__ import annotations

from dataclasses import dataclass

from distserve.core.events import Event
from distserve.core.types import Code, FinishReason, GatewayRef, InstanceRef, StepPlan, Ticket, Timings, Token


@dataclass(frozen=True, slots=True)
class Controller:
    """The one controller, as an address."""


CONTROLLER = Controller()

Party = InstanceRef | GatewayRef | Controller


@dataclass(frozen=True, slots=True)
class Send:
    """Carry an event to another machine. May be lost; machines repeat what matters until a deadline."""

    to: Party
    event: Event


# ── instance ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class RunStep:
    """Run one forward pass; answers ``StepDone``, ``StepFailed`` or ``StepAbandoned``.

    At most ``InstanceConfig.steps_in_flight`` are outstanding; they are answered in order. When one fails or is given
    up, all that were asked for after it and before its answer are answered ``StepAbandoned``.
    """

    plan: StepPlan


@dataclass(frozen=True, slots=True)
class OpenTicket:
    """Let the holder of this ticket write into these blocks (table of tokens ``0 .. total_tokens``)."""

    ticket: Ticket
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CloseTicket:
    """Fence: nothing more is written for this move."""

    move_id: str


@dataclass(frozen=True, slots=True)
class SendStage:
    """Send the KV of tokens ``[start, end)`` out of these blocks; answers ``StageSent`` or ``StageFailed``."""

    ticket: Ticket
    destination_address: str  # data address
    start: int
    end: int
    blocks: tuple[int, ...]
    final: bool


@dataclass(frozen=True, slots=True)
class AbortSend:
    """Fence: nothing more is read for this move; no event of it follows."""

    move_id: str


# ── gateway ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Deliver:
    """New tokens for a client's stream; indices are contiguous and never repeat."""

    request_id: str
    first_index: int
    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class Account:
    """How a request was served (DESIGN §8). Times in seconds."""

    prefill_instance: str
    decode_instance: str
    attempts: int
    prompt_tokens: int
    output_tokens: int
    ttft_s: float
    total_s: float
    timings: Timings


@dataclass(frozen=True, slots=True)
class Complete:
    """The stream ends well (or by the client's own wish)."""

    request_id: str
    finish: FinishReason
    account: Account


@dataclass(frozen=True, slots=True)
class Fail:
    """The stream ends with an error the client is told."""

    request_id: str
    code: Code
    message: str
    retry_after_s: float = 0.0


Effect = Send | RunStep | OpenTicket | CloseTicket | SendStage | AbortSend | Deliver | Complete | Fail
