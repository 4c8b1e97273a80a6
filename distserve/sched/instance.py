"""One instance's sequences, batches, moves and block ledger: the machine (DESIGN §4).

Changed by ``handle`` alone. Knows no clock, no network, no tensor. Its parts: ``residents`` (who waits, runs, holds
blocks), ``departures`` and ``arrivals`` (the two sides of a move). The role is policy: it decides what the controller
sends here, not what this code does.
"""

from __future__ import annotations

import random

from distserve.core.effects import Effect, Send
from distserve.core.events import (
    Abandon,
    Abandoned,
    AttemptFailed,
    CommitAsked,
    Committed,
    ControllerFound,
    ControllerLost,
    Draining,
    GatewayAttached,
    GatewayLost,
    InstanceEvent,
    JoinAsked,
    JoinRefused,
    MembersChanged,
    MoveEnded,
    MoveQueried,
    PeerLost,
    ReserveAsked,
    ReserveGranted,
    SequenceOutput,
    StageCorrupt,
    StageFailed,
    StageSent,
    StageStored,
    StepAbandoned,
    StepDone,
    StepFailed,
    Submit,
    Tick,
    TokensMade,
    Welcomed,
)
from distserve.core.types import Code, GatewayRef, InstanceRef, Load, Member, Token
from distserve.sched.arrivals import Arrivals
from distserve.sched.awaiting import Awaiting
from distserve.sched.config import InstanceConfig
from distserve.sched.departures import Departures
from distserve.sched.lifecycle import InPhase, OutPhase, Phase
from distserve.sched.residents import Residents
from distserve.sched.sequence import Sequence
from distserve.sched.steps import Steps


class InstanceState:
    """See the module. ``seed`` feeds ticket nonces; a live shell passes an unpredictable one.

    ``terse``: step plans name no items (see ``Steps``).
    """

    def __init__(
        self, member: Member, config: InstanceConfig | None = None, seed: int = 0, *, terse: bool = False
    ) -> None:
        self.member = member
        self.me: InstanceRef = member.ref
        self.config = config or InstanceConfig()
        self.residents = Residents(member, self.config)
        self.departures = Departures(member.endpoint, self.residents, self.config)
        self.arrivals = Arrivals(member, self.residents, self.config, random.Random(seed))
        self.gateways: dict[GatewayRef, None] = {}
        self.steps = Steps(self.me, self.residents, self.departures, terse=terse)
        self.ignored = 0
        self._order = 0
        self._abandoned: dict[tuple[GatewayRef, str], tuple[int, float]] = {}  # → (epoch, remembered until)
        self._submitted: dict[tuple[GatewayRef, str], tuple[int, float]] = {}  # likewise, of attempts that came here

    # ── the one door ─────────────────────────────────────────────────────────────────────────────────────────────────

    def handle(self, event: InstanceEvent, now: float) -> list[Effect]:
        """Take one event; return what is to be done, in order."""
        effects = self._on(event, now)
        effects += self._let_in(now)
        effects += self.steps.next(now)
        return effects

    def fast_forward(
        self, steps: int, token: Token, first_done: float, now: float
    ) -> tuple[list[Sequence], list[Effect]]:
        """``steps`` steps in one, nothing decided between them: see ``Steps.alike`` and ``Steps.fast_forward``."""
        ended, effects = self.steps.fast_forward(steps, token, first_done, now)
        if not self.steps.running:
            effects += self._let_in(now)
            effects += self.steps.next(now)
        return ended, effects

    def _on(self, event: InstanceEvent, now: float) -> list[Effect]:
        match event:
            case StepDone():
                return self.steps.done(event, now)
            case Submit():
                return self._submit(event, now)
            case Abandon():
                return self._abandon(event, now)
            case ReserveAsked():
                return self._reserve_asked(event, now)
            case ReserveGranted():
                return self.departures.granted(event, now)
            case StageSent():
                return self.departures.sent(event, now)
            case StageFailed():
                return self.departures.failed(event, now)
            case StageStored():
                return self._adopted(*self.arrivals.stored(event, now))
            case StageCorrupt():
                return self.arrivals.corrupt(event, now)
            case CommitAsked():
                return self._adopted(*self.arrivals.commit_asked(event, now))
            case Committed():
                return self.departures.committed(event)
            case MoveEnded():
                return self._move_ended(event, now)
            case MoveQueried():
                return self.arrivals.queried(event)
            case Tick():
                return self._tick(now)
            case _:
                return self._on_parties(event, now)

    def _on_parties(self, event: InstanceEvent, now: float) -> list[Effect]:
        """Gateways, peers and the controller coming and going; a step that failed or was given up."""
        match event:
            case GatewayAttached(gateway):
                effects = self._gateway_lost(gateway, now) if gateway in self.gateways else []
                self.gateways[gateway] = None
                return effects
            case GatewayLost(gateway):
                return self._gateway_lost(gateway, now)
            case Draining():
                return self.arrivals.drain(now)
            case PeerLost(ref, why):
                return self._peer_lost(ref, why, now)
            case MembersChanged(_, _, lost):
                return [e for ref in lost if ref != self.me for e in self._peer_lost(ref, "it left the cluster", now)]
            case StepFailed():
                return self.steps.failed(event)
            case StepAbandoned():
                return self.steps.abandoned(event)
            case Welcomed() | JoinRefused() | JoinAsked() | ControllerLost() | ControllerFound():
                return []
            case _:
                return self._ignore()

    def _ignore(self) -> list[Effect]:
        """Late or repeated: changes nothing, is counted."""
        self.ignored += 1
        return []

    # ── requests ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _submit(self, event: Submit, now: float) -> list[Effect]:
        request, epoch = event.request, event.epoch
        if event.gateway not in self.gateways:
            return self._ignore()
        if self._is_abandoned(event.gateway, request.id, epoch):
            return [Send(event.gateway, Abandoned(self.me, request.id, epoch))]
        known = self.residents.sequences.get(request.id)
        if self._is_foreign(event.gateway, request.id):
            message = f"request id {request.id!r} is in use through another gateway; choose another"
            failed = AttemptFailed(self.me, request.id, epoch, Code.ALREADY_EXISTS, message, False, None)
            return [Send(event.gateway, failed)]
        if (known is not None and known.epoch >= epoch) or self._was_submitted(event, now):
            return self._ignore()
        effects = self._forget(request.id, epoch - 1, "superseded", now)
        if problem := self._refusal(event):
            code, message, retriable = problem
            failed = AttemptFailed(self.me, request.id, epoch, code, message, retriable, None)
            return [*effects, Send(event.gateway, failed)]
        self._order += 1
        sequence = Sequence(
            request,
            event.gateway,
            epoch,
            event.delivered,
            event.decode,
            now=now,
            timeout_s=event.timeout_s + self.config.deadline_slack_s,
            order=self._order,
        )
        self.residents.enqueue(sequence)
        return effects

    def _was_submitted(self, event: Submit, now: float) -> bool:
        """Whether this attempt came before, and notes that it came: a late repeat does not run it again."""
        key = (event.gateway, event.request.id)
        if self._submitted.get(key, (-1, 0.0))[0] >= event.epoch:
            return True
        self._submitted.pop(key, None)
        self._submitted[key] = (event.epoch, now + self.config.tombstone_s)
        return False

    def _refusal(self, event: Submit) -> tuple[Code, str, bool] | None:
        """Why this instance cannot take a request now or ever; None when it can."""
        request, spec = event.request, self.member.spec
        stays = event.decode.ref == self.me
        need = request.total_tokens if stays else len(request.prompt_token_ids) + len(event.delivered)
        if need > spec.max_sequence_tokens:
            holds = f"{self.me} holds at most {spec.max_sequence_tokens}"
            return Code.INVALID_ARGUMENT, f"the request needs {need} tokens of KV cache, but {holds}", False
        if len(event.delivered) >= request.stopping.max_tokens:
            return Code.INTERNAL, "every token of the request was already delivered", False
        if len(self.residents.waiting) >= self.config.max_waiting:
            return Code.RESOURCE_EXHAUSTED, f"{self.me} already queues {self.config.max_waiting} requests", True
        return None

    def _abandon(self, event: Abandon, now: float) -> list[Effect]:
        gateway, request_id = event.gateway, event.request_id
        effects: list[Effect] = []
        if not self._is_foreign(gateway, request_id):
            effects += self._forget(request_id, event.epoch, "abandoned", now)
        epoch = max(event.epoch, self._abandoned.pop((gateway, request_id), (0, 0.0))[0])
        self._abandoned[gateway, request_id] = (epoch, now + self.config.tombstone_s)
        return [*effects, Send(gateway, Abandoned(self.me, request_id, event.epoch))]

    def _is_abandoned(self, gateway: GatewayRef, request_id: str, epoch: int) -> bool:
        return epoch <= self._abandoned.get((gateway, request_id), (-1, 0.0))[0]

    def _is_foreign(self, gateway: GatewayRef, request_id: str) -> bool:
        """Whether another gateway's request of that id is here: ids are unique within a gateway only."""
        known = self.residents.sequences.get(request_id)
        moves = self.arrivals.of_request(request_id)
        return (known is not None and known.gateway != gateway) or any(m.asked.gateway != gateway for m in moves)

    def _epochs(self, request_id: str) -> list[int]:
        """The epochs at which something is held here for a request."""
        sequence = self.residents.sequences.get(request_id)
        moves = [move.asked.epoch for move in self.arrivals.of_request(request_id)]
        return [*moves, sequence.epoch] if sequence is not None else moves

    def _forget(self, request_id: str, epoch: int, reason: str, now: float) -> list[Effect]:
        """Give up everything held for a request at epochs up to ``epoch``, telling whoever else holds a part."""
        effects: list[Effect] = []
        sequence = self.residents.sequences.get(request_id)
        if sequence is not None and sequence.epoch <= epoch:
            effects += self._drop(sequence, reason)
        for move in self.arrivals.of_request(request_id):
            if move.asked.epoch <= epoch:
                effects += self.arrivals.end(move, reason, now, retriable=False)
        return effects

    def _drop(self, sequence: Sequence, reason: str) -> list[Effect]:
        effects = self.departures.end_for(sequence, reason)
        self.residents.drop(sequence)
        return effects

    # ── parties ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _gateway_lost(self, gateway: GatewayRef, now: float) -> list[Effect]:
        self.gateways.pop(gateway, None)
        effects = self.arrivals.gateway_lost(gateway, now)
        for sequence in [s for s in self.residents.sequences.values() if s.gateway == gateway]:
            effects += self._drop(sequence, "gateway lost")
        return effects

    def _peer_lost(self, ref: InstanceRef, why: str, now: float) -> list[Effect]:
        return self.departures.peer_lost(ref, why) + self.arrivals.peer_lost(ref, now)

    # ── moves ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _reserve_asked(self, event: ReserveAsked, now: float) -> list[Effect]:
        if (over := self.arrivals.over(event)) is not None:
            return [Send(event.source.ref, over)]
        request_id = event.request.id
        refusal = ""
        if self._is_abandoned(event.gateway, request_id, event.epoch):
            refusal = "the request was abandoned"
        elif event.gateway not in self.gateways:
            refusal = f"gateway {event.gateway} is not connected to {self.me}"
        elif self._is_foreign(event.gateway, request_id):
            refusal = f"request id {request_id!r} is in use through another gateway"
        elif any(epoch > event.epoch for epoch in self._epochs(request_id)):
            refusal = f"{self.me} holds a later attempt"
        if refusal:
            known = self.arrivals.moves.get(event.move_id)
            if known is not None:
                return self.arrivals.end(known, refusal, now)
            return [Send(event.source.ref, MoveEnded(event.move_id, self.me, refusal))]
        effects: list[Effect] = []
        if event.move_id not in self.arrivals.moves:
            effects += self._forget(request_id, event.epoch, "superseded", now)
            self._order += 1
        return effects + self.arrivals.asked(event, self._order, now)

    def _move_ended(self, event: MoveEnded, now: float) -> list[Effect]:
        if event.move_id in self.departures.moves:
            return self.departures.refused(event, now)
        return self.arrivals.source_ended(event, now)

    def _adopted(self, sequence: Sequence | None, effects: list[Effect]) -> list[Effect]:
        """Tell the gateway who owns the sequence now, repeating the tokens it may not have."""
        if sequence is None:
            return effects
        first = sequence.output_len - len(sequence.recent)
        output = SequenceOutput(sequence.id, sequence.epoch, first, sequence.recent)
        return [*effects, Send(sequence.gateway, TokensMade(self.me, (output,)))]

    # ── letting in ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _let_in(self, now: float) -> list[Effect]:
        """Queued prompts and asked moves get their room in one line, in order of arrival, so that neither starves."""
        effects: list[Effect] = []
        while True:
            queued = self.residents.waiting[0] if self.residents.waiting else None
            asked = self.arrivals.first_pending()
            if asked is not None and (queued is None or asked.order < queued.order):
                granted, more = self.arrivals.grant_next(now)
                if granted is None:
                    return effects
                effects += more
            else:
                sequence = self.residents.admit_next(reserved=self.arrivals.open)
                if sequence is None:
                    return effects
                if self.residents.leaves(sequence):
                    effects += self.departures.begin(sequence, now)

    # ── time ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def next_deadline(self) -> float | None:
        """When a ``Tick`` is next due; None when nothing waits."""
        times = [s.deadline for s in self.residents.sequences.values()]
        times += [t for t in (self.departures.next_deadline(), self.arrivals.next_deadline()) if t is not None]
        times += [next(iter(stones.values()))[1] for stones in (self._abandoned, self._submitted) if stones]
        return min(times, default=None)

    def _tick(self, now: float) -> list[Effect]:
        effects = self.departures.tick(now) + self.arrivals.tick(now)
        for sequence in [s for s in self.residents.sequences.values() if now >= s.deadline]:
            effects += self.departures.end_for(sequence, "deadline")
            message = f"the request's deadline passed while it was in phase {sequence.phase}"
            effects += self.residents.fail(sequence, Code.DEADLINE_EXCEEDED, message, retriable=False)
        for stones in (self._abandoned, self._submitted):
            while stones and next(iter(stones.values()))[1] <= now:
                del stones[next(iter(stones))]
        return effects

    # ── views ────────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def idle(self) -> bool:
        """Nothing held for anybody."""
        return not self.residents.sequences and not self.arrivals.moves and not self.steps.running

    def awaiting(self) -> Awaiting:
        """Who waits for the outstanding steps now: with nobody left the oldest may be given up (``StepAbandoned``)."""
        return self.steps.awaiting()

    def load(self) -> Load:
        residents = self.residents
        return Load(
            waiting=len(residents.waiting),
            running=len(residents.running),
            handing_off=sum(1 for s in residents.sequences.values() if s.phase is Phase.HANDOFF),
            incoming=len(self.arrivals.moves),
            queued_tokens=residents.queued_tokens(),
            kv_free=residents.ledger.free,
            kv_cached=residents.ledger.evictable,
            kv_total=residents.ledger.total,
            steps=self.steps.count,
            preemptions=residents.preemptions,
        )

    def check(self) -> None:
        """Raise if any invariant of DESIGN §5 and §6 is broken."""
        self.residents.ledger.check()
        self.residents.check()
        moving = {m.owner for m in self.arrivals.moves.values() if m.phase is InPhase.OPEN}
        held, owners = self.residents.holders() | moving, set(self.residents.ledger.owners())
        if held != owners:
            raise AssertionError(f"{self.me}: blocks of {sorted(owners - held)} have no owner able to release them")
        for sequence in self.residents.sequences.values():
            move = self.departures.of(sequence)
            if sequence.phase is Phase.HANDOFF and move is None:
                raise AssertionError(f"{sequence.id} waits for a hand-off that does not exist")
            if move is not None and move.phase is OutPhase.COMMITTING and sequence.phase is not Phase.HANDOFF:
                raise AssertionError(f"{sequence.id} commits in phase {sequence.phase}")
        for move in self.departures.moves.values():
            if self.residents.sequences.get(move.sequence.id) is not move.sequence:
                raise AssertionError(f"{move.id} moves a sequence that is not here")
