"""What every event must leave behind on an instance: seen in its machine's state and in the effects.

One ``InstanceEye`` watches one life. It keeps what the machine does not: since when something has waited, when it last
asked. Times are those of the instance's own clock.
"""

from __future__ import annotations

from collections.abc import Iterator

from distserve.core.effects import Effect, Send, SendStage
from distserve.core.events import (
    Abandon,
    Abandoned,
    CommitAsked,
    Committed,
    Event,
    GatewayLost,
    MembersChanged,
    MoveEnded,
    PeerLost,
    ReserveAsked,
    ReserveGranted,
    StageSent,
    StepDone,
    Tick,
    TokensMade,
)
from distserve.core.types import GatewayRef, InstanceRef
from distserve.sched.arrivals import MoveIn
from distserve.sched.departures import MoveOut
from distserve.sched.instance import InstanceState
from distserve.sched.lifecycle import InPhase, OutPhase, Phase
from distserve.sched.sequence import Sequence
from tests.faults.coverage import Coverage
from tests.faults.process import Process
from tests.faults.properties import Property, Violation

SLACK_S = 0.6
"""How late a machine may be: a shell ticks between two events, and an event may have to wait for a step."""

LOOK_SLACK_S = 1.1
"""How late an eye may learn of progress that no event told."""


class InstanceEye:
    """See the module."""

    def __init__(self, process: Process, machine: InstanceState, coverage: Coverage) -> None:
        self.process = process
        self.machine = machine
        self.situations = coverage.situations
        self.config = machine.config
        self.held: set[tuple[str, int]] = set()  # (request, epoch) owned now
        self.phases: dict[str, str] = {}  # "s:request" or move id → its phase
        self._since: dict[str, tuple[OutPhase, float]] = {}  # move → in this phase since, nothing under way
        self._said: dict[str, float] = {}  # move → when its destination was last asked
        self._preemptions = 0
        self._adopted: set[tuple[str, int]] = set()  # (request, epoch) owned here by a move

    # ── after an event ───────────────────────────────────────────────────────────────────────────────────────────────

    def saw(self, event: Event, effects: list[Effect]) -> None:
        """Everything but ownership, which is the cluster's."""
        self._answers(event, effects)
        if isinstance(event, StepDone):
            self._token_first(effects)
        elif isinstance(event, StageSent):
            self._since.pop(event.move_id, None)  # from the last stage on, the commit's time counts anew
        for effect in effects:
            if isinstance(effect, Send) and isinstance(effect.event, ReserveAsked | CommitAsked):
                self._said[effect.event.move_id] = self.process.clock
        self._one_thing_each()
        self._acts()
        self.look()

    def look(self) -> None:
        """What must hold at any time, whether or not something happens."""
        machine = self.machine
        waiting = machine.residents.sequences or machine.arrivals.moves or machine.departures.moves
        if waiting and machine.next_deadline() is None:
            self._broken(Property.DEADLINE, "waits for something without a deadline")
        if self.process.stalled_until > self.process.heap.now - SLACK_S:
            return
        now = self.process.clock
        for sequence in machine.residents.sequences.values():
            self._within(sequence.id, sequence.deadline, now, sequence.request.timeout_s + self.config.deadline_slack_s)
        for move in machine.arrivals.moves.values():
            self._within(move.id, move.expires_at, now, max(self.config.lease_s, 0.0))
        for out in machine.departures.moves.values():
            self._departs(out, now)
        self._tombstones(now)

    def _broken(self, broken: Property, what: str) -> None:
        raise Violation(broken, f"{self.process.name} {what}")

    def _within(self, name: str, deadline: float, now: float, bound: float) -> None:
        if deadline < now - SLACK_S:
            self._broken(Property.OVERDUE, f"keeps {name} {now - deadline:.2f} s after its deadline")
        if deadline > now + bound + 1e-6:
            self._broken(Property.OVERDUE, f"would keep {name} for {deadline - now:.1f} s, more than {bound:g}")

    def _departs(self, move: MoveOut, now: float) -> None:
        """A move out waits no longer than configured, and asks again at the configured pace."""
        under_way = not move.acknowledged.covers(0, move.sent)
        known, since = self._since.get(move.id, (None, now))
        if known is not move.phase or under_way or move.phase is OutPhase.STREAMING:
            self._since[move.id] = (move.phase, now)
            since = now
        if move.phase is OutPhase.STREAMING:
            return
        reserving = move.phase is OutPhase.RESERVING
        bound = self.config.reserve_timeout_s if reserving else self.config.commit_timeout_s
        if now - since > bound + SLACK_S:
            self._broken(Property.OVERDUE, f"waits {now - since:.1f} s {move.phase} {move.id}; {bound:g} is the limit")
        pace = self.config.reserve_repeat_s if reserving else self.config.commit_repeat_s
        if now - self._said.get(move.id, now) > pace + SLACK_S:
            self._broken(Property.REPEAT, f"has not repeated what {move.id} waits for within {pace:g} s")

    def _tombstones(self, now: float) -> None:
        machine, bound = self.machine, self.config.tombstone_s
        for name, untils in (
            ("abandoned request", [until for _, until in machine._abandoned.values()]),
            ("submitted attempt", [until for _, until in machine._submitted.values()]),
            ("move", [stone.until for stone in machine.arrivals.tombstones.values()]),
        ):
            if untils and min(untils) < now - SLACK_S:
                self._broken(Property.TOMBSTONE, f"remembers a {name} {now - min(untils):.1f} s past its time")
            if untils and max(untils) > now + bound + 1e-6:
                self._broken(Property.TOMBSTONE, f"means to remember a {name} for {max(untils) - now:.1f} s")
        if len(machine.arrivals._adopted) > len(machine.arrivals.tombstones):
            self._broken(Property.TOMBSTONE, "remembers commits whose moves are forgotten")

    def _one_thing_each(self) -> None:
        """An instance holds one thing for a request: its sequence, or one move in."""
        moves = self.machine.arrivals.moves
        if moves:
            names = [move.asked.request.id for move in moves.values()]
            twice = [name for name in names if name in self.machine.residents.sequences or names.count(name) > 1]
            if twice:
                self._broken(Property.OWNER, f"holds more than one thing for {twice[0]}")

    def _token_first(self, effects: list[Effect]) -> None:
        """Tokens of a step leave before KV and commits of the same step."""
        kinds = [type(e.event) if isinstance(e, Send) else type(e) for e in effects]
        tokens = [n for n, kind in enumerate(kinds) if kind is TokensMade]
        moved = [n for n, kind in enumerate(kinds) if kind in (SendStage, CommitAsked)]
        if tokens and moved and moved[0] < tokens[-1]:
            self._broken(Property.ORDER, "sends KV before the token that was made with it")

    # ── answers: what an event asks for is done in the same breath ───────────────────────────────────────────────────

    def _answers(self, event: Event, effects: list[Effect]) -> None:
        match event:
            case GatewayLost(gateway):
                self._nothing_of_gateway(gateway)
            case PeerLost(ref, _):
                self._nothing_with(ref, effects)
            case MembersChanged(_, _, lost):
                for ref in lost:
                    self._nothing_with(ref, effects)
            case Abandon(gateway, request_id, epoch):
                self._abandoned(gateway, request_id, epoch, effects)
            case ReserveGranted(ticket) if ticket.move_id not in self.machine.departures.moves:
                if not _says(effects, MoveEnded):
                    self._broken(Property.LETGO, f"keeps a ticket of {ticket.move_id}, which is over, to itself")
            case Committed(move_id, sender, epoch):
                for move in self.machine.departures.moves.values():
                    committed = move.id == move_id and move.phase is OutPhase.COMMITTING
                    right = (move.sequence.epoch, move.destination.ref) == (epoch - 1, sender)
                    if right and (committed or move_id in move.earlier):
                        self._broken(Property.LETGO, f"was told that {move_id} is owned elsewhere but keeps its KV")
            case Tick():
                self._in_time(effects)
        sequences = self.machine.residents.sequences.values()
        adopted = {(s.id, s.epoch) for s in sequences if s.owned_at is not None}
        if adopted - self._adopted and not _says(effects, Committed):
            self._broken(Property.PROGRESS, "became an owner without saying so")
        self._adopted = adopted

    def _in_time(self, effects: list[Effect]) -> None:
        """A tick ends no move before the time that it may wait is over."""
        for effect in effects:
            ended = effect.event if isinstance(effect, Send) else None
            if not isinstance(ended, MoveEnded) or ended.move_id not in self._since:
                continue
            phase, since = self._since[ended.move_id]
            commits = phase is OutPhase.COMMITTING and ended.reason.startswith("no answer")
            waited = self.process.clock - since
            if commits and waited < self.config.commit_timeout_s - LOOK_SLACK_S:
                what = f"gives up {ended.move_id} {waited:.1f} s after its last stage: {ended.reason}"
                self._broken(Property.OVERDUE, what)

    def _nothing_of_gateway(self, gateway: GatewayRef) -> None:
        left = [s.id for s in self.machine.residents.sequences.values() if s.gateway == gateway]
        left += [m.id for m in self.machine.arrivals.moves.values() if m.asked.gateway == gateway]
        if left:
            self._broken(Property.LETGO, f"lost {gateway} but keeps {left}")

    def _nothing_with(self, ref: InstanceRef, effects: list[Effect]) -> None:
        """But for a move that has only just begun: its ask will be answered, by the network if nobody else."""
        if ref == self.machine.me:
            return
        asks = (e.event for e in effects if isinstance(e, Send) and isinstance(e.event, ReserveAsked))
        new = {asked.move_id for asked in asks}
        outward = self.machine.departures.moves.values()
        left = [m.id for m in outward if m.destination.ref == ref and m.id not in new]
        left += [m.id for m in self.machine.arrivals.moves.values() if m.asked.source.ref == ref]
        if left:
            self._broken(Property.LETGO, f"lost {ref} but keeps {left}")

    def _abandoned(self, gateway: GatewayRef, request_id: str, epoch: int, effects: list[Effect]) -> None:
        machine = self.machine
        sequence = machine.residents.sequences.get(request_id)
        left = [request_id] if sequence and sequence.gateway == gateway and sequence.epoch <= epoch else []
        moves = machine.arrivals.of_request(request_id)
        left += [m.id for m in moves if m.asked.gateway == gateway and m.asked.epoch <= epoch]
        if left:
            self._broken(Property.LETGO, f"was told to abandon {request_id} but keeps {left}")
        if not _says(effects, Abandoned):
            self._broken(Property.LETGO, f"does not say that it abandoned {request_id}")

    # ── who can act acts ─────────────────────────────────────────────────────────────────────────────────────────────

    def _acts(self) -> None:
        machine = self.machine
        residents = machine.residents
        self.situations["dropped while its step ran"] += residents.zombies
        settled, self._preemptions = self._preemptions == residents.preemptions, residents.preemptions
        self._steps()
        if settled:
            self._lets_in()
        for out in machine.departures.moves.values():
            self._sends(out)
        for move in machine.arrivals.moves.values():
            whole = move.commit is not None and move.stored.covers(0, move.asked.total_tokens)
            if whole:
                self._broken(Property.PROGRESS, f"has all of {move.id} and its commit, but does not own it")

    def _steps(self) -> None:
        """Who has work steps, unless the blocks it needs are on the move."""
        machine, residents = self.machine, self.machine.residents
        if machine.steps.running or machine.arrivals.open:
            return
        if any(s.phase is Phase.HANDOFF for s in residents.sequences.values()):
            return
        if residents.running or residents.waiting or machine.arrivals.moves:
            counts = {str(k): v for k, v in residents.ledger.counts().items() if v}
            self._broken(Property.PROGRESS, f"has work, is idle, and nothing is in its way: {counts}")

    def _lets_in(self) -> None:
        """Nobody waits at the head of the line for room that is there."""
        machine, residents = self.machine, self.machine.residents
        head: Sequence | MoveIn | None = residents.waiting[0] if residents.waiting else None
        asked = machine.arrivals.first_pending()
        if asked is not None and (head is None or asked.order < head.order):
            head = asked
        taken = len(residents.running) + machine.arrivals.open
        if head is None or taken >= self.config.max_sequences:
            return
        if isinstance(head, Sequence):
            if sum(s.owed for s in residents.running if not s.decoding) >= self.config.max_batch_tokens:
                return
            need = len(head.tokens)
        else:
            need = head.asked.total_tokens
        self.situations["prompt waits for room" if isinstance(head, Sequence) else "move waits for room"] += 1
        blocks = -(-(need + residents.headroom_tokens) // residents.spec.block_size)
        if blocks <= residents.ledger.available:
            available = residents.ledger.available
            self._broken(Property.PROGRESS, f"has {available} blocks but lets {head.id} wait for {blocks}")

    def _sends(self, move: MoveOut) -> None:
        """KV that is final is sent once there is a ticket; a whole one is committed."""
        if move.phase is not OutPhase.STREAMING:
            return
        if move.sequence.phase is Phase.HANDOFF:
            self._broken(Property.PROGRESS, f"has a ticket for all of {move.id} but does not commit")
        block = self.machine.residents.spec.block_size
        if move.sequence.computed // block * block > move.sent:
            self._broken(Property.PROGRESS, f"has a ticket but does not send {move.id}")

    # ── views ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def saw_prefix(self, request_id: str, point: str) -> None:
        """A sequence that begins its prompt may find the beginning of it cached."""
        if point == "sequence prefill":
            self.situations["prefix reused"] += self.machine.residents.sequences[request_id].cached_tokens > 0

    def points(self) -> Iterator[tuple[str, str, str]]:
        """(key, request, phase) of everything here, as ``coverage`` names phases."""
        for sequence in self.machine.residents.sequences.values():
            yield sequence.owner, sequence.id, f"sequence {sequence.phase.value}"
        for out in self.machine.departures.moves.values():
            yield f"out {out.id}", out.sequence.id, f"move out {out.phase.value}"
        for move in self.machine.arrivals.moves.values():
            phase = "open" if move.phase is InPhase.OPEN else "pending"
            yield f"in {move.id}", move.asked.request.id, f"move in {phase}"


def _says(effects: list[Effect], kind: type) -> bool:
    """Whether a message of that kind goes out."""
    return any(isinstance(effect, Send) and isinstance(effect.event, kind) for effect in effects)
