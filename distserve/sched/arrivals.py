"""Moves at their destination: grant room, watch the bytes come in, and become owner exactly once (DESIGN §5).

A move waits here without a ticket while there is no room; that is the back-pressure. What is over is remembered for a
while, so that a repeated or late question gets the answer it got before.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from distserve.core.effects import CloseTicket, Effect, OpenTicket, Send
from distserve.core.events import (
    CommitAsked,
    Committed,
    MoveEnded,
    MoveQueried,
    ReserveAsked,
    ReserveGranted,
    StageCorrupt,
    StageStored,
)
from distserve.core.types import GatewayRef, InstanceRef, Member, Ticket
from distserve.kv.ledger import BlockState
from distserve.kv.shape import Coverage
from distserve.sched.config import InstanceConfig
from distserve.sched.lifecycle import IN_EVENTS, InPhase
from distserve.sched.residents import Residents
from distserve.sched.sequence import Sequence


class MoveIn:
    """One move at its destination."""

    __slots__ = (
        "asked",
        "commit",
        "expires_at",
        "nbytes",
        "order",
        "phase",
        "request_deadline",
        "stored",
        "ticket",
        "tokens",
    )

    def __init__(self, asked: ReserveAsked, order: int, now: float) -> None:
        self.asked = asked
        self.tokens = [*asked.request.prompt_token_ids, *asked.output]
        self.order = order
        self.phase = InPhase.PENDING
        self.expires_at = now
        self.request_deadline = now + asked.request_timeout_s
        self.ticket: Ticket | None = None
        self.stored = Coverage()  # positions verified and in place; stages may come in any order, and twice
        self.nbytes = 0
        self.commit: CommitAsked | None = None

    @property
    def id(self) -> str:
        return self.asked.move_id

    @property
    def owner(self) -> str:
        return f"m:{self.asked.move_id}"


@dataclass(frozen=True, slots=True)
class Tombstone:
    """The last word on a move that is over."""

    answer: Committed | MoveEnded
    until: float


class Arrivals:
    """All moves into one instance, by move id, in order of asking."""

    def __init__(self, member: Member, residents: Residents, config: InstanceConfig, rng: random.Random) -> None:
        self.me: InstanceRef = member.ref
        self.role = member.role
        self.residents = residents
        self.config = config
        self.moves: dict[str, MoveIn] = {}
        self.tombstones: dict[str, Tombstone] = {}
        self.ignored = 0
        self.ended: dict[str, int] = {}  # reason → count
        self._adopted: dict[str, Committed] = {}  # request → the last commit of it here, while remembered
        self._rng = rng
        self._draining = False

    @property
    def open(self) -> int:
        return sum(1 for m in self.moves.values() if m.phase is InPhase.OPEN)

    def first_pending(self) -> MoveIn | None:
        return next((m for m in self.moves.values() if m.phase is InPhase.PENDING), None)

    def of_request(self, request_id: str) -> list[MoveIn]:
        return [m for m in self.moves.values() if m.asked.request.id == request_id]

    # ── reserve ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def over(self, event: ReserveAsked) -> Committed | MoveEnded | None:
        """The last word on a move that is over, or on an earlier one committed here though its source gave it up."""
        if (known := self.tombstones.get(event.move_id)) is not None:
            return known.answer
        adopted = self._adopted.get(event.request.id)
        return adopted if adopted is not None and adopted.epoch == event.epoch + 1 else None

    def asked(self, event: ReserveAsked, order: int, now: float) -> list[Effect]:
        """A new ask waits its turn; a repeated one renews what it has."""
        known = self.moves.get(event.move_id)
        if known is not None:
            if known.phase is InPhase.PENDING:
                self._wait(known, event.timeout_s, now)
                return []
            self._renew(known, now)
            return [Send(event.source.ref, ReserveGranted(known.ticket))] if known.ticket else []
        if problem := self._problem(event):
            return [Send(event.source.ref, MoveEnded(event.move_id, self.me, problem, retriable=False))]
        move = self.moves[event.move_id] = MoveIn(event, order, now)
        self._wait(move, event.timeout_s, now)
        return []

    def drain(self, now: float) -> list[Effect]:
        """Grant nothing any more: who waits for a ticket is told, so that it goes elsewhere; who has one keeps it."""
        self._draining = True
        pending = [m for m in self.moves.values() if m.phase is InPhase.PENDING]
        return [e for m in pending for e in self.end(m, f"{self.me} is shutting down", now, retriable=False)]

    def _problem(self, event: ReserveAsked) -> str:
        """Why this move can never be granted here; empty when it can."""
        spec = self.residents.spec
        if self._draining:
            return f"{self.me} is shutting down"
        if event.destination != self.me:
            return f"asked of {event.destination}, but this is {self.me}"
        if event.fingerprint != spec.fingerprint:
            return f"{event.source.ref} serves model {event.fingerprint}, {self.me} serves {spec.fingerprint}"
        if event.total_tokens != len(event.request.prompt_token_ids) + len(event.output):
            return f"{event.total_tokens} KV positions do not fit {event.request.id}'s tokens"
        if event.request.total_tokens > spec.max_sequence_tokens:
            return f"{event.request.total_tokens} tokens, but {self.me} holds at most {spec.max_sequence_tokens}"
        if not self.role.can_decode:
            return f"{self.me} is a {self.role} instance and does not decode"
        return ""

    def grant_next(self, now: float) -> tuple[MoveIn | None, list[Effect]]:
        """Give the longest-waiting move its ticket if there is room; strictly in order, so that none starves."""
        move = self.first_pending()
        residents = self.residents
        if move is None or len(residents.running) + self.open >= self.config.max_sequences:
            return None, []
        total = move.asked.total_tokens
        if not residents.room_for(move.tokens, total, total):
            return None, []
        have = residents.ledger.admit(move.owner, move.tokens, total, BlockState.RESERVED, total)
        if have is None:
            return None, []
        ticket = Ticket(
            move_id=move.id,
            request_id=move.asked.request.id,
            epoch=move.asked.epoch,
            source=move.asked.source.ref,
            destination=self.me,
            fingerprint=residents.spec.fingerprint,
            nonce=self._rng.getrandbits(63),
            have_tokens=have,
            total_tokens=total,
            lease_s=self.config.lease_s,
        )
        move.ticket, move.phase = ticket, InPhase.OPEN
        move.stored.add(0, have)
        self._renew(move, now)
        blocks = residents.ledger.table(move.owner)
        return move, [OpenTicket(ticket, blocks), Send(move.asked.source.ref, ReserveGranted(ticket))]

    def _wait(self, move: MoveIn, timeout_s: float, now: float) -> None:
        """An ask stands while its source waits for it, and repeats it: one not repeated for a lease is forgotten."""
        move.expires_at = now + min(timeout_s, self.config.lease_s)

    def _renew(self, move: MoveIn, now: float) -> None:
        move.expires_at = now + self.config.lease_s

    # ── stages and commit ────────────────────────────────────────────────────────────────────────────────────────────

    def _legal(self, move_id: str, event: str) -> MoveIn | None:
        move = self.moves.get(move_id)
        if move is None or event not in IN_EVENTS[move.phase]:
            self.ignored += 1
            return None
        return move

    def stored(self, event: StageStored, now: float) -> tuple[Sequence | None, list[Effect]]:
        move = self._legal(event.move_id, "StageStored")
        if move is None or move.ticket is None or event.nonce != move.ticket.nonce:
            return None, []
        if not move.stored.covers(event.start, event.end):
            move.nbytes += event.nbytes
            move.stored.add(event.start, event.end)
        self._renew(move, now)
        return self._commit_if_whole(move, now)

    def corrupt(self, event: StageCorrupt, now: float) -> list[Effect]:
        """Fail closed: nothing of a move is used whose bytes were wrong once; the source may begin another."""
        move = self._legal(event.move_id, "StageCorrupt")
        if move is None or move.ticket is None or event.nonce != move.ticket.nonce:
            return []
        return self.end(move, event.reason, now)

    def commit_asked(self, event: CommitAsked, now: float) -> tuple[Sequence | None, list[Effect]]:
        over = self.tombstones.get(event.move_id)
        if over is not None:
            return None, [Send(event.source, over.answer)]
        move = self._legal(event.move_id, "CommitAsked")
        if move is None or move.ticket is None:
            return None, [Send(event.source, MoveEnded(event.move_id, self.me, "no such move here"))]
        asked = move.asked
        positions = len(asked.request.prompt_token_ids) + len(event.output) - 1
        right = (move.ticket.nonce, asked.epoch, asked.total_tokens, positions, asked.output)
        said = (event.nonce, event.epoch, event.total_tokens, event.total_tokens, event.output[: len(asked.output)])
        if event.source != asked.source.ref or right != said:
            return None, self.end(move, "the commit does not fit the ticket", now)
        move.commit = event
        self._renew(move, now)
        return self._commit_if_whole(move, now)

    def _commit_if_whole(self, move: MoveIn, now: float) -> tuple[Sequence | None, list[Effect]]:
        """Once every position is verified and the source has committed: close the ticket, become owner."""
        commit, asked = move.commit, move.asked
        if commit is None or not move.stored.covers(0, asked.total_tokens):
            return None, []
        del self.moves[move.id]
        sequence = Sequence(
            asked.request,
            asked.gateway,
            asked.epoch + 1,
            commit.output,
            asked.source,
            now=now,
            timeout_s=move.request_deadline - now,
            order=move.order,
        )
        sequence.computed = asked.total_tokens
        sequence.owned_at = now
        sequence.reserve_s = commit.reserve_s
        sequence.kv_bytes = move.nbytes
        sequence.recent = commit.recent
        self.residents.adopt(sequence, move.owner)
        self.ended["committed"] = self.ended.get("committed", 0) + 1
        answer = Committed(move.id, self.me, sequence.epoch)
        self.tombstones[move.id] = Tombstone(answer, now + self.config.tombstone_s)
        self._adopted[asked.request.id] = answer
        return sequence, [CloseTicket(move.id), Send(asked.source.ref, answer)]

    # ── ends ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def end(self, move: MoveIn, reason: str, now: float, *, retriable: bool = True) -> list[Effect]:
        """Give back what a move holds and say so to its source, the only other holder."""
        del self.moves[move.id]
        self.ended[reason] = self.ended.get(reason, 0) + 1
        answer = MoveEnded(move.id, self.me, reason, retriable)
        self.tombstones[move.id] = Tombstone(answer, now + self.config.tombstone_s)
        effects: list[Effect] = []
        if move.phase is InPhase.OPEN:
            effects.append(CloseTicket(move.id))
            self.residents.ledger.release(move.owner)
        return [*effects, Send(move.asked.source.ref, answer)]

    def source_ended(self, event: MoveEnded, now: float) -> list[Effect]:
        move = self._legal(event.move_id, "MoveEnded")
        if move is None or event.sender != move.asked.source.ref:
            return []
        return self.end(move, event.reason, now)

    def queried(self, event: MoveQueried) -> list[Effect]:
        """Who owns it? Always answered."""
        if (over := self.tombstones.get(event.move_id)) is not None:
            return [Send(event.sender, over.answer)]
        move = self.moves.get(event.move_id)
        if move is None:
            return [Send(event.sender, MoveEnded(event.move_id, self.me, "no such move here"))]
        return [Send(event.sender, ReserveGranted(move.ticket))] if move.ticket is not None else []

    def peer_lost(self, ref: InstanceRef, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for move in [m for m in self.moves.values() if m.asked.source.ref == ref]:
            effects += self.end(move, "peer lost", now)
        return effects

    def gateway_lost(self, gateway: GatewayRef, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for move in [m for m in self.moves.values() if m.asked.gateway == gateway]:
            effects += self.end(move, "gateway lost", now, retriable=False)
        return effects

    # ── time ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def next_deadline(self) -> float | None:
        times = [m.expires_at for m in self.moves.values()]
        if self.tombstones:
            times.append(next(iter(self.tombstones.values())).until)
        return min(times, default=None)

    def tick(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for move in [m for m in self.moves.values() if now >= m.expires_at]:
            reason = "the lease ran out" if move.phase is InPhase.OPEN else "no room in time"
            effects += self.end(move, reason, now)
        while self.tombstones and next(iter(self.tombstones.values())).until <= now:
            self._forget(next(iter(self.tombstones)))
        return effects

    def _forget(self, move_id: str) -> None:
        answer = self.tombstones.pop(move_id).answer
        for request_id in [r for r, a in self._adopted.items() if a is answer]:
            del self._adopted[request_id]
