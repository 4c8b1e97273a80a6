"""Moves at their source: ask for a ticket, send what is final, commit, and let go when told (DESIGN §5).

Written for any two places; used here for the prefill→decode hand-off. The source owns the sequence until it hears
``Committed``. It never lets go on silence: when the destination cannot be asked any more, the attempt is given up to
the gateway, whose epochs decide.
"""

from __future__ import annotations

import math

from distserve.core.effects import AbortSend, Effect, Send, SendStage
from distserve.core.events import (
    CommitAsked,
    Committed,
    MoveEnded,
    ReserveAsked,
    ReserveGranted,
    StageFailed,
    StageSent,
)
from distserve.core.types import Code, Endpoint, InstanceRef, Ticket, Token
from distserve.kv.ledger import BlockState
from distserve.kv.shape import Coverage
from distserve.sched.config import InstanceConfig
from distserve.sched.lifecycle import OUT_EVENTS, OutPhase, Phase
from distserve.sched.residents import Residents
from distserve.sched.sequence import Sequence


class MoveOut:
    """One move at its source."""

    __slots__ = (
        "acknowledged",
        "deadline",
        "destination",
        "earlier",
        "id",
        "kv_bytes",
        "phase",
        "repeat_at",
        "sent",
        "sequence",
        "ticket",
        "ticket_at",
        "total",
        "tries",
    )

    def __init__(self, move_id: str, sequence: Sequence, destination: Endpoint, total: int, tries: int, now: float):
        self.id = move_id
        self.sequence = sequence
        self.destination = destination
        self.total = total  # KV positions it carries
        self.tries = tries
        self.phase = OutPhase.RESERVING
        self.ticket: Ticket | None = None
        self.ticket_at = now
        self.sent = 0  # positions handed to the data plane
        self.acknowledged = Coverage()  # positions known to be in place at the destination
        self.earlier: tuple[str, ...] = ()  # ids of this sequence's moves that this one replaces
        self.kv_bytes = 0
        self.repeat_at = now
        self.deadline = now

    @property
    def deadline_at(self) -> float:
        """When the source stops waiting. While stages are on their way the data plane's own deadlines rule."""
        under_way = not self.acknowledged.covers(0, self.sent)
        return math.inf if self.phase is OutPhase.STREAMING or under_way else self.deadline


class Departures:
    """All moves out of one instance, by move id."""

    def __init__(self, me: Endpoint, residents: Residents, config: InstanceConfig) -> None:
        self.me = me
        self.residents = residents
        self.config = config
        self.moves: dict[str, MoveOut] = {}
        self._by_request: dict[str, MoveOut] = {}
        self.ignored = 0
        self.ended: dict[str, int] = {}  # reason → count

    def of(self, sequence: Sequence) -> MoveOut | None:
        return self._by_request.get(sequence.id)

    # ── start, pump, stop ────────────────────────────────────────────────────────────────────────────────────────────

    def begin(self, sequence: Sequence, now: float, tries: int = 1, earlier: tuple[str, ...] = ()) -> list[Effect]:
        """Ask the sequence's decode instance for room. Called when its own blocks are secured (waits form no cycle)."""
        total = len(sequence.tokens) - (1 if sequence.phase is Phase.HANDOFF else 0)
        move = MoveOut(f"{sequence.id}/{sequence.epoch}/{tries}", sequence, sequence.decode, total, tries, now)
        move.deadline = now + self.config.reserve_timeout_s
        move.earlier = earlier
        self.moves[move.id] = move
        self._by_request[sequence.id] = move
        return self._ask(move, now)

    def _ask(self, move: MoveOut, now: float) -> list[Effect]:
        sequence = move.sequence
        move.repeat_at = now + self.config.reserve_repeat_s
        kept = sequence.tokens[sequence.prompt_len : move.total]
        asked = ReserveAsked(
            move_id=move.id,
            source=self.me,
            destination=move.destination.ref,
            gateway=sequence.gateway,
            request=sequence.request,
            epoch=sequence.epoch,
            output=tuple(kept),
            fingerprint=self.residents.spec.fingerprint,
            total_tokens=move.total,
            timeout_s=max(0.0, move.deadline - now),
            request_timeout_s=max(0.0, sequence.deadline - now),
        )
        return [Send(move.destination.ref, asked)]

    def pump(self, sequence: Sequence, now: float) -> list[Effect]:
        """Send whatever is final and not yet sent; commit when the prompt is done."""
        move = self._by_request.get(sequence.id)
        if move is None or move.phase is not OutPhase.STREAMING or move.ticket is None:
            return []
        last = sequence.phase is Phase.HANDOFF
        block = self.residents.spec.block_size
        end = move.total if last else sequence.computed // block * block
        effects: list[Effect] = []
        if end > move.sent:
            blocks = self.residents.ledger.table(sequence.owner)
            address = move.destination.data_address
            effects.append(SendStage(move.ticket, address, move.sent, end, blocks, final=last))
            move.sent = end
        if last:
            move.phase = OutPhase.COMMITTING
            move.deadline = now + self.config.commit_timeout_s
            self.residents.ledger.restate(sequence.owner, BlockState.IN_TRANSIT)
            first = sequence.first_token_at if sequence.first_token_at is not None else now
            sequence.reserve_s = max(0.0, move.ticket_at - first)
            effects += self._commit(move, now)
        return effects

    def _commit(self, move: MoveOut, now: float) -> list[Effect]:
        assert move.ticket is not None
        sequence = move.sequence
        move.repeat_at = now + self.config.commit_repeat_s
        recent: tuple[Token, ...] = sequence.recent
        asked = CommitAsked(
            move_id=move.id,
            source=self.me.ref,
            nonce=move.ticket.nonce,
            epoch=sequence.epoch,
            total_tokens=move.total,
            output=sequence.output,
            recent=recent,
            reserve_s=sequence.reserve_s,
        )
        return [Send(move.destination.ref, asked)]

    def end(self, move: MoveOut, reason: str, *, tell: bool = True) -> list[Effect]:
        """Stop a move; its sequence stays here. Tells the destination, the only other holder."""
        del self.moves[move.id]
        if self._by_request.get(move.sequence.id) is move:
            del self._by_request[move.sequence.id]
        self.ended[reason] = self.ended.get(reason, 0) + 1
        effects: list[Effect] = []
        if move.ticket is not None:
            effects.append(AbortSend(move.id))
        if move.phase is OutPhase.COMMITTING:
            self.residents.ledger.restate(move.sequence.owner, BlockState.OWNED)
        if tell:
            effects.append(Send(move.destination.ref, MoveEnded(move.id, self.me.ref, reason)))
        return effects

    def end_for(self, sequence: Sequence, reason: str) -> list[Effect]:
        """Stop a sequence's move, if it is on one, before the sequence is dropped."""
        move = self._by_request.get(sequence.id)
        return self.end(move, reason) if move is not None else []

    # ── events ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _legal(self, move_id: str, event: str) -> MoveOut | None:
        move = self.moves.get(move_id)
        if move is None or event not in OUT_EVENTS[move.phase]:
            self.ignored += 1
            return None
        return move

    def granted(self, event: ReserveGranted, now: float) -> list[Effect]:
        """A ticket. One for a move that is over is given back, or the destination would hold it for its lease."""
        ticket = event.ticket
        move = self.moves.get(ticket.move_id)
        if move is None or ticket.source != self.me.ref or ticket.destination != move.destination.ref:
            self.ignored += 1
            return [Send(ticket.destination, MoveEnded(ticket.move_id, self.me.ref, "the move is over"))]
        if move.phase is not OutPhase.RESERVING:
            self.ignored += 1
            return []
        sequence = move.sequence
        right = (sequence.epoch, self.residents.spec.fingerprint, move.total)
        if (ticket.epoch, ticket.fingerprint, ticket.total_tokens) != right:
            return self._broken(move, "the ticket does not fit the move", now, retriable=False)
        move.ticket, move.ticket_at = ticket, now
        move.phase = OutPhase.STREAMING
        move.sent = ticket.have_tokens
        move.acknowledged.add(0, ticket.have_tokens)
        return self.pump(sequence, now)

    def sent(self, event: StageSent, now: float) -> list[Effect]:
        if (move := self._legal(event.move_id, "StageSent")) is not None:
            move.kv_bytes += event.nbytes
            move.acknowledged.add(event.start, event.end)
            if move.phase is OutPhase.COMMITTING:
                move.deadline = now + self.config.commit_timeout_s
        return []

    def failed(self, event: StageFailed, now: float) -> list[Effect]:
        move = self._legal(event.move_id, "StageFailed")
        return self._broken(move, event.reason, now, retriable=event.retriable) if move is not None else []

    def refused(self, event: MoveEnded, now: float) -> list[Effect]:
        """The destination ended it: no room, a failed check, a lost lease."""
        move = self._legal(event.move_id, "MoveEnded")
        if move is None or event.sender != move.destination.ref:
            return []
        return self._broken(move, event.reason, now, retriable=event.retriable, tell=False)

    def committed(self, event: Committed) -> list[Effect]:
        """The destination owns it: free everything here. The prefix stays cached for the next prompt like it."""
        move = self._successor(event.move_id) or self._legal(event.move_id, "Committed")
        if move is None or event.sender != move.destination.ref or event.epoch != move.sequence.epoch + 1:
            return []
        effects = self.end(move, "committed", tell=move.id != event.move_id)
        self.residents.drop(move.sequence)
        return effects

    def _successor(self, move_id: str) -> MoveOut | None:
        """The move that was begun instead of this one. A move thought broken may have been committed all the same."""
        return next((m for m in self.moves.values() if move_id in m.earlier), None)

    def _broken(
        self,
        move: MoveOut,
        reason: str,
        now: float,
        *,
        retriable: bool,
        tell: bool = True,
        code: Code = Code.UNAVAILABLE,
    ) -> list[Effect]:
        """The KV is still here: try again with a fresh move, or give the attempt up to the gateway."""
        effects = self.end(move, reason, tell=tell)
        sequence = move.sequence
        if retriable and move.tries < self.config.move_attempts:
            return effects + self.begin(sequence, now, move.tries + 1, (*move.earlier, move.id))
        message = f"the hand-off to {move.destination.ref} failed: {reason}"
        culprit = move.destination.ref
        return effects + self.residents.fail(sequence, code, message, retriable=True, culprit=culprit)

    def peer_lost(self, ref: InstanceRef, why: str) -> list[Effect]:
        """A destination is gone. Who owns what is then the gateway's to decide, by epoch."""
        effects: list[Effect] = []
        for move in [m for m in self.moves.values() if m.destination.ref == ref]:
            effects += self.end(move, "peer lost", tell=True)
            message = f"decode instance {ref} was lost: {why}"
            effects += self.residents.fail(move.sequence, Code.UNAVAILABLE, message, retriable=True, culprit=ref)
        return effects

    # ── time ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def next_deadline(self) -> float | None:
        return min((min(m.repeat_at, m.deadline_at) for m in self.moves.values()), default=None)

    def tick(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for move in list(self.moves.values()):
            if now >= move.deadline_at:
                effects += self._expired(move, now)
            elif now >= move.repeat_at:
                committing = move.phase is OutPhase.COMMITTING
                effects += self._commit(move, now) if committing else self._ask(move, now)
        return effects

    def _expired(self, move: MoveOut, now: float) -> list[Effect]:
        if move.phase is OutPhase.RESERVING:
            reason, code = f"no room within {self.config.reserve_timeout_s:g} s", Code.RESOURCE_EXHAUSTED
        else:
            reason, code = f"no answer to the commit within {self.config.commit_timeout_s:g} s", Code.UNAVAILABLE
        move.tries = self.config.move_attempts
        return self._broken(move, reason, now, retriable=False, code=code)
