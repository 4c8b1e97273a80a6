"""The move protocol alone: two instances' machines, and between them messages and stages that get lost, come twice, or
come late. Whatever is drawn, one of them owns the sequence in the end, or the gateway was told; nothing is held beside.

The sides of a move are those of production (``departures``, ``arrivals``, their instances around them). The steps of a
rule are single deliveries, so that hypothesis finds the order that breaks it and shrinks it.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from distserve.core.effects import AbortSend, CloseTicket, Effect, OpenTicket, RunStep, Send, SendStage
from distserve.core.events import (
    Abandon,
    AttemptFailed,
    Event,
    GatewayAttached,
    PeerLost,
    StageCorrupt,
    StageFailed,
    StageSent,
    StageStored,
    StepDone,
    Tick,
    TokensMade,
)
from distserve.core.types import InstanceRef, Role, Ticket, Token, attempt_of, first_epoch
from distserve.sched.config import InstanceConfig
from distserve.sched.instance import InstanceState
from tests.sched.factory import GATEWAY, member, request, submit

P = member("p", Role.PREFILL)
D = member("d", Role.DECODE, blocks=6)
OUTPUT = tuple(range(50, 57))


class Side:
    """One instance: its machine, its open tickets, the step it has yet to run."""

    def __init__(self, who: object, config: InstanceConfig) -> None:
        self.machine = InstanceState(who, config, seed=3)  # type: ignore[arg-type]
        self.tickets: dict[str, Ticket] = {}
        self.aborted: set[str] = set()
        self.step: RunStep | None = None


class MoveAlone(RuleBasedStateMachine):
    """See the module. ``wires``: what is on its way, by receiver; ``stages``: KV on its way to the destination."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.wires: list[tuple[str, Event]] = []
        self.stages: list[SendStage] = []
        self.reports: list[tuple[str, Event]] = []  # of the data plane: never lost, but late
        self.sides: dict[str, Side] = {}
        self.tokens: dict[int, tuple[int, int]] = {}  # output index → (token, epoch it came at)
        self.owned: dict[int, str] = {}  # epoch → who owned it
        self.told: list[AttemptFailed] = []
        self.attempt = 1
        self.finished = False

    @initialize(chunk=st.sampled_from([8, 512]), attempts=st.integers(1, 3), prompt=st.integers(1, 24))
    def start(self, chunk: int, attempts: int, prompt: int) -> None:
        config = InstanceConfig(
            prefill_chunk=chunk, move_attempts=attempts, reserve_timeout_s=12.0, lease_s=6.0, commit_timeout_s=3.0
        )
        self.sides = {"p": Side(P, config), "d": Side(D, config)}
        self.request = request(prompt=prompt, max_tokens=len(OUTPUT))
        for name in self.sides:
            self.feed(name, GatewayAttached(GATEWAY))
        self.feed("p", submit(self.request, D))

    # ── what the world does, one thing at a time ─────────────────────────────────────────────────────────────────────

    @precondition(lambda self: self.wires)
    @rule(data=st.data(), fate=st.sampled_from(["arrives", "arrives", "arrives", "twice", "lost"]))
    def message(self, data: st.DataObject, fate: str) -> None:
        """Any message under way, not only the oldest: links do not keep the order of a repeat."""
        index = data.draw(st.integers(0, min(2, len(self.wires) - 1)))
        name, event = self.wires[index] if fate == "twice" else self.wires.pop(index)
        if fate != "lost":
            self.feed(name, event)

    @precondition(lambda self: self.stages)
    @rule(data=st.data(), fate=st.sampled_from(["stored", "stored", "stored", "twice", "lost", "unheard", "corrupt"]))
    def stage(self, data: st.DataObject, fate: str) -> None:
        index = data.draw(st.integers(0, min(2, len(self.stages) - 1)))
        stage = self.stages[index] if fate == "twice" else self.stages.pop(index)
        ticket = stage.ticket
        opened = self.sides["d"].tickets.get(ticket.move_id) == ticket
        if fate == "lost" or not opened:
            self.report("p", StageFailed(ticket.move_id, "timed out", True))
        elif fate == "corrupt":
            self.report("d", StageCorrupt(ticket.move_id, ticket.nonce, "wrong checksum"))
            self.report("p", StageFailed(ticket.move_id, "wrong checksum", True))
        else:
            self.report("d", StageStored(ticket.move_id, ticket.nonce, stage.start, stage.end, 1))
            failed = StageFailed(ticket.move_id, "timed out", True)
            sent = StageSent(ticket.move_id, stage.start, stage.end, 1, 0.1)
            self.report("p", failed if fate == "unheard" else sent)

    @precondition(lambda self: self.reports)
    @rule(data=st.data())
    def data_plane_speaks(self, data: st.DataObject) -> None:
        self.feed(*self.reports.pop(data.draw(st.integers(0, min(2, len(self.reports) - 1)))))

    @precondition(lambda self: any(side.step for side in self.sides.values()))
    @rule(name=st.sampled_from(["p", "d"]))
    def step_ends(self, name: str) -> None:
        side = self.sides[name]
        if side.step is None:
            return
        plan, side.step = side.step.plan, None
        made = tuple((i.request_id, Token(OUTPUT[i.output_index])) for i in plan.items if i.sample)
        self.feed(name, StepDone(plan.number, made, 0.01))

    @rule(seconds=st.sampled_from([0.5, 2.0, 7.0]))
    def time_passes(self, seconds: float) -> None:
        until = self.now + seconds
        while due := [(t, n) for n, s in self.sides.items() if (t := s.machine.next_deadline()) is not None]:
            at, name = min(due)
            if at > until:
                break
            self.now = max(self.now, at)
            self.feed(name, Tick())
        self.now = until

    @rule(name=st.sampled_from(["p", "d"]))
    def peer_is_lost(self, name: str) -> None:
        """One side's stream to the other breaks; what was under way to and fro on it is gone."""
        other = D.ref if name == "p" else P.ref
        self.wires.clear()
        self.feed(name, PeerLost(other, "stream broke"))

    @precondition(lambda self: not self.finished and self.attempt == 1)
    @rule(hears=st.sampled_from(["pd", "p", "d"]))
    def gateway_tries_again(self, hears: str) -> None:
        """The gateway gives the attempt up; a holder that does not hear of it keeps on until a later word."""
        self.abandon(hears)
        self.attempt += 1
        delivered = tuple(self.tokens[i][0] for i in range(len(self.tokens)))
        if len(delivered) < len(OUTPUT):
            again = submit(self.request, D, epoch=first_epoch(self.attempt), delivered=delivered)
            self.feed("p", again)

    # ── what the world keeps ─────────────────────────────────────────────────────────────────────────────────────────

    def abandon(self, names: str) -> None:
        for name in names:
            self.feed(name, Abandon(GATEWAY, self.request.id, first_epoch(self.attempt + 1) - 1))

    def report(self, name: str, event: Event) -> None:
        self.reports.append((name, event))

    def feed(self, name: str, event: Event) -> None:
        side = self.sides[name]
        if isinstance(event, StageSent | StageFailed) and event.move_id in side.aborted:
            return  # the fence: no event of an aborted move follows
        if isinstance(event, StageStored | StageCorrupt) and event.move_id not in side.tickets:
            return
        effects = side.machine.handle(event, self.now)  # type: ignore[arg-type]
        side.machine.check()
        for effect in effects:
            self.perform(name, side, effect)
        self.note_owners(name, side)

    def perform(self, name: str, side: Side, effect: Effect) -> None:
        match effect:
            case Send(InstanceRef() as to, event):
                self.wires.append((to.id, event))
            case Send(_, TokensMade(_, outputs)):
                for output in outputs:
                    self.hear(output.epoch, output.first_index, tuple(t.id for t in output.tokens), output.finish)
            case Send(_, AttemptFailed() as failed):
                self.told.append(failed)
            case OpenTicket(ticket, _):
                assert ticket.move_id not in side.tickets
                side.tickets[ticket.move_id] = ticket
            case CloseTicket(move_id):
                del side.tickets[move_id]
            case SendStage():
                assert effect.ticket.move_id not in side.aborted
                self.stages.append(effect)
            case AbortSend(move_id):
                side.aborted.add(move_id)
                self.stages = [s for s in self.stages if s.ticket.move_id != move_id]
            case RunStep():
                assert side.step is None
                side.step = effect

    def hear(self, epoch: int, first: int, tokens: tuple[int, ...], finish: object) -> None:
        """As a gateway does: the current attempt alone, by index, no gap within what its epochs have said."""
        if attempt_of(epoch) != self.attempt:
            return
        for index, token in enumerate(tokens, start=first):
            assert token == OUTPUT[index]
            known = self.tokens.get(index)
            if known is None:
                assert index == len(self.tokens), f"token {index} came, {len(self.tokens)} was next"
                self.tokens[index] = (token, epoch)
        self.finished = self.finished or finish is not None

    def note_owners(self, name: str, side: Side) -> None:
        for sequence in side.machine.residents.sequences.values():
            assert self.owned.setdefault(sequence.epoch, name) == name, f"two own epoch {sequence.epoch}"

    # ── what must hold ───────────────────────────────────────────────────────────────────────────────────────────────

    @invariant()
    def tickets_are_known(self) -> None:
        for side in self.sides.values():
            assert set(side.tickets) == {m.id for m in side.machine.arrivals.moves.values() if m.ticket is not None}

    @invariant()
    def somebody_owns_it_or_the_gateway_knows(self) -> None:
        """The sequence is never lost in between: it is somewhere, or it ended, or the gateway was told."""
        if not self.sides or self.finished:
            return
        here = [s.epoch for side in self.sides.values() for s in side.machine.residents.sequences.values()]
        told = any(attempt_of(failed.epoch) == self.attempt for failed in self.told)
        assert told or any(attempt_of(epoch) == self.attempt for epoch in here), "nobody owns it and nobody was told"

    def teardown(self) -> None:
        """Left alone, with every message arriving, both sides come to rest and hold nothing."""
        if not self.sides:
            return
        for _ in range(400):
            self.settle()
            dues = [t for s in self.sides.values() if (t := s.machine.next_deadline()) is not None]
            if not dues and not self.wires:
                break
            self.time_passes(max(0.0, min(dues, default=self.now) - self.now))
        assert self.finished or self.told or self.attempt > 1
        for side in self.sides.values():
            assert side.machine.idle and not side.tickets
            assert not side.machine.residents.ledger.owners()
            assert side.machine.next_deadline() is None
            assert not side.machine.arrivals.tombstones

    def settle(self) -> None:
        while self.wires or self.stages or self.reports or any(side.step for side in self.sides.values()):
            for name in self.sides:
                self.step_ends(name)
            if self.stages:
                stage = self.stages.pop(0)
                move = stage.ticket.move_id
                if self.sides["d"].tickets.get(move) == stage.ticket:
                    self.report("d", StageStored(move, stage.ticket.nonce, stage.start, stage.end, 1))
                    self.report("p", StageSent(move, stage.start, stage.end, 1, 0.1))
                else:
                    self.report("p", StageFailed(move, "no such ticket", True))
            if self.reports:
                self.feed(*self.reports.pop(0))
            if self.wires:
                self.feed(*self.wires.pop(0))


MoveAlone.TestCase.settings = settings(max_examples=250, stateful_step_count=40, deadline=None)
TestMoveAlone = MoveAlone.TestCase


def test_the_undisturbed_move_changes_the_owner_once() -> None:
    world = MoveAlone()
    world.start(512, 3, 20)
    world.settle()
    assert sorted(world.owned.items()) == [(first_epoch(1), "p"), (first_epoch(1) + 1, "d")]
    assert world.finished and not world.told
    assert [world.tokens[i][0] for i in range(len(OUTPUT))] == list(OUTPUT)
    world.teardown()
