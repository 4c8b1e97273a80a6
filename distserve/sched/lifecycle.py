"""The phases of a sequence and of the two sides of a move, and the legal moves between them.

An event that is not in the row of the current phase changes nothing and is counted by the machine (DESIGN §4): this is
what makes repeated and late messages harmless.
"""

from __future__ import annotations

from enum import StrEnum


class Phase(StrEnum):
    """Of a sequence on the instance that owns it."""

    WAITING = "waiting"  # queued; holds no blocks
    PREFILL = "prefill"  # in the running set, owes prompt (or recomputed) tokens
    DECODE = "decode"  # in the running set, owes one token at a time
    HANDOFF = "handoff"  # prefilled; out of the batch until its move commits
    ENDED = "ended"


PHASE_MOVES: dict[Phase, tuple[Phase, ...]] = {
    Phase.WAITING: (Phase.PREFILL, Phase.ENDED),
    Phase.PREFILL: (Phase.DECODE, Phase.HANDOFF, Phase.WAITING, Phase.ENDED),
    Phase.DECODE: (Phase.WAITING, Phase.ENDED),
    Phase.HANDOFF: (Phase.ENDED,),
    Phase.ENDED: (),
}


class OutPhase(StrEnum):
    """Of a move at its source."""

    RESERVING = "reserving"  # asked; waits for a ticket
    STREAMING = "streaming"  # has a ticket; stages go out as KV becomes final
    COMMITTING = "committing"  # everything sent or on its way; waits to be told that it no longer owns


OUT_EVENTS: dict[OutPhase, tuple[str, ...]] = {
    OutPhase.RESERVING: ("ReserveGranted", "MoveEnded"),
    OutPhase.STREAMING: ("ReserveGranted", "StageSent", "StageFailed", "MoveEnded"),
    OutPhase.COMMITTING: ("StageSent", "StageFailed", "MoveEnded", "Committed"),
}


class InPhase(StrEnum):
    """Of a move at its destination."""

    PENDING = "pending"  # asked; no room yet
    OPEN = "open"  # ticket given, blocks reserved


IN_EVENTS: dict[InPhase, tuple[str, ...]] = {
    InPhase.PENDING: ("ReserveAsked", "MoveEnded", "MoveQueried"),
    InPhase.OPEN: ("ReserveAsked", "StageStored", "StageCorrupt", "CommitAsked", "MoveEnded", "MoveQueried"),
}
