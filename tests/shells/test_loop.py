"""The step loop among scripted parts: what is handled when, what leaves when, and how it ends."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from distserve.core.effects import AbortSend, CloseTicket, Effect, OpenTicket, RunStep, Send, SendStage
from distserve.core.events import (
    Abandon,
    Abandoned,
    GatewayAttached,
    GatewayLost,
    MembersChanged,
    PeerLost,
    StepAbandoned,
    StepDone,
    StepFailed,
    Tick,
)
from distserve.core.types import GatewayRef, InstanceRef, Load, StepPlan, Ticket, Token
from distserve.engine.stopping import StepGivenUp
from distserve.instance.inbox import Inbox
from distserve.instance.loop import EngineBroken, StepLoop, Turn
from distserve.sched.awaiting import Awaiting

ME, PEER = InstanceRef("me", 1), InstanceRef("peer", 2)
GATEWAY = GatewayRef("g", 3)
TICKET = Ticket("m1", "r1", 1, PEER, ME, "f", 9, 0, 32, 5.0)
START = GatewayAttached(GATEWAY)


@dataclass
class Machine:
    """Answers events as scripted and notes them."""

    script: dict[type, list[list[Effect]]] = field(default_factory=dict)
    seen: list[Any] = field(default_factory=list)
    deadline: float | None = None

    idle = True
    planned = 0

    def handle(self, event: Any, now: float) -> list[Effect]:
        self.seen.append(event)
        if isinstance(event, Tick):
            self.deadline = None
        answers = self.script.get(type(event), [])
        effects = answers.pop(0) if answers else []
        self.planned = next((e.plan.number for e in effects if isinstance(e, RunStep)), self.planned)
        return effects

    def next_deadline(self) -> float | None:
        return self.deadline

    def load(self) -> Load:
        return Load(steps=len(self.seen))

    def awaiting(self) -> Awaiting:
        abandoned = any(isinstance(event, Abandon) and event.request_id == "r1" for event in self.seen)
        return Awaiting(self.planned, {} if abandoned else {"r1": (GATEWAY, 1)})


@dataclass
class Output:
    tokens: tuple[tuple[str, Token], ...]
    forward_s: float = 0.5


@dataclass
class Parts:
    """Engine, data plane and network in one, noting the order of all they are asked."""

    on_run: Callable[[StepPlan], None] = lambda plan: None
    log: list[Any] = field(default_factory=list)
    depth: int = 1
    plans: list[StepPlan] = field(default_factory=list)

    def submit(self, plan: StepPlan) -> None:
        self.plans.append(plan)
        if self.depth > 1:
            self.log.append(("submit", plan.number))

    def wait(self) -> Output:
        plan = self.plans.pop(0)
        self.log.append(("run", plan.number))
        self.on_run(plan)
        return Output((("r1", Token(plan.number)),))

    def give_up(self, number: int) -> None:
        self.log.append(("give up", number))

    def outward(self, turn: Turn) -> None:
        self.log.append(("say", tuple(send.event for send in turn.sends)))

    def open_ticket(self, ticket: Ticket, blocks: tuple[int, ...]) -> None:
        self.log.append(("open", ticket.move_id, blocks))

    def close_ticket(self, move_id: str) -> None:
        self.log.append(("close", move_id))

    def send_stage(self, ticket: Ticket, address: str, start: int, end: int, blocks: tuple, final: bool) -> None:
        self.log.append(("stage", address, start, end, blocks, final))

    def abort_send(self, move_id: str) -> None:
        self.log.append(("abort", move_id))

    def peer_lost(self, peer: InstanceRef) -> None:
        self.log.append(("peer lost", peer))


def step(number: int) -> RunStep:
    return RunStep(StepPlan(number, ()))


def run(machine: Machine, parts: Parts, inbox: Inbox) -> None:
    StepLoop(inbox, machine, parts, parts, parts.outward).run()


def test_messages_that_came_during_a_step_are_handled_before_its_end() -> None:
    inbox = Inbox()
    abandon = Abandon(GATEWAY, "r1", 1)
    machine = Machine({GatewayAttached: [[step(1)]]})

    def during(_: StepPlan) -> None:
        inbox.put(abandon)
        inbox.ask(lambda: machine.seen.append("asked"))

    parts = Parts(during)
    inbox.put(START)
    stopper = Machine.handle

    def handle(event: Any, now: float) -> list[Effect]:
        if isinstance(event, StepDone):
            inbox.stop()
        return stopper(machine, event, now)

    machine.handle = handle  # type: ignore[method-assign]
    run(machine, parts, inbox)
    assert machine.seen == [START, abandon, "asked", StepDone(1, (("r1", Token(1)),), 0.5)]


def test_what_is_said_leaves_before_the_next_step_runs() -> None:
    inbox = Inbox()
    said = Abandoned(ME, "r1", 1)
    machine = Machine({GatewayAttached: [[step(1)]], StepDone: [[Send(GATEWAY, said), step(2)], []]})
    parts = Parts(lambda plan: inbox.stop() if plan.number == 2 else None)
    inbox.put(START)
    run(machine, parts, inbox)
    order = [entry for entry in parts.log if entry[0] == "run" or entry[1]]
    assert order == [("run", 1), ("say", (said,)), ("run", 2)]


def test_effects_are_performed_in_the_order_given() -> None:
    inbox = Inbox()
    effects: list[Effect] = [
        CloseTicket("m0"),
        OpenTicket(TICKET, (1, 2)),
        AbortSend("m2"),
        SendStage(TICKET, "there:1", 0, 16, (4,), True),
    ]
    parts = Parts()
    inbox.put(START)
    inbox.stop()
    run(Machine({GatewayAttached: [effects]}), parts, inbox)
    assert [e[:2] for e in parts.log] == [("close", "m0"), ("open", "m1"), ("abort", "m2"), ("stage", "there:1")]


def test_links_to_the_dead_are_cut_before_the_machine_hears_of_it() -> None:
    inbox = Inbox()
    parts = Parts()
    machine = Machine({PeerLost: [[CloseTicket("m1")]]})
    inbox.put(PeerLost(PEER))
    inbox.put(MembersChanged(1, (), (PEER,)))
    inbox.stop()
    run(machine, parts, inbox)
    assert parts.log == [("peer lost", PEER), ("close", "m1"), ("peer lost", PEER)]


def test_a_tick_comes_when_it_is_due_and_only_then() -> None:
    inbox = Inbox()
    clock = iter([0.0, 0.0, 7.0, 7.0, 7.0, 7.0])
    machine = Machine(deadline=0.01)
    ticked = threading.Event()
    machine.script = {Tick: [[]]}
    handle = Machine.handle

    def stop_after(event: Any, now: float) -> list[Effect]:
        if isinstance(event, Tick):
            assert now == 7.0
            ticked.set()
            inbox.stop()
        return handle(machine, event, now)

    machine.handle = stop_after  # type: ignore[method-assign]
    parts = Parts()
    StepLoop(inbox, machine, parts, parts, parts.outward, clock=lambda: next(clock)).run()
    assert ticked.is_set()
    assert machine.seen == [Tick()]


def test_a_failed_step_is_told_and_a_second_in_a_row_ends_the_loop() -> None:
    inbox = Inbox()

    def fail(_: StepPlan) -> None:
        raise RuntimeError("out of luck")

    machine = Machine({GatewayAttached: [[step(1)]], StepFailed: [[step(2)]]})
    inbox.put(START)
    with pytest.raises(EngineBroken, match="2 steps in a row failed, the last with: out of luck"):
        run(machine, Parts(fail), inbox)
    assert machine.seen == [START, StepFailed(1, "RuntimeError: out of luck")]


def test_a_step_that_works_forgives_the_one_that_failed() -> None:
    inbox = Inbox()

    def odd_ones_fail(plan: StepPlan) -> None:
        if plan.number % 2:
            raise ValueError("odd")
        if plan.number == 4:
            inbox.stop()

    machine = Machine({GatewayAttached: [[step(1)]], StepFailed: [[step(2)], [step(4)]], StepDone: [[step(3)]]})
    inbox.put(START)
    run(machine, Parts(odd_ones_fail), inbox)
    assert [type(event) for event in machine.seen] == [GatewayAttached, StepFailed, StepDone, StepFailed]


def test_questions_are_answered_in_turn_and_refused_after_the_end() -> None:
    inbox = Inbox()
    first = inbox.ask(lambda: 42)
    inbox.stop()
    beside = inbox.ask(lambda: 43)
    run(Machine(), Parts(), inbox)
    assert (first.result(0), beside.result(0)) == (42, 43)
    assert inbox.ask(lambda: 44).cancelled()


def test_steps_are_submitted_as_soon_as_they_are_planned_and_waited_for_in_order() -> None:
    inbox = Inbox()
    machine = Machine({GatewayAttached: [[step(1), step(2)]], StepDone: [[step(3)], [], []]})
    parts = Parts(lambda plan: inbox.stop() if plan.number == 3 else None, depth=2)
    inbox.put(START)
    run(machine, parts, inbox)
    order = [entry for entry in parts.log if entry[0] != "say"]
    assert order == [("submit", 1), ("submit", 2), ("run", 1), ("submit", 3), ("run", 2), ("run", 3)]
    assert [e.number for e in machine.seen if isinstance(e, StepDone)] == [1, 2]


def test_what_was_planned_behind_a_step_that_did_not_end_is_void() -> None:
    """Step 3 was planned by a message that came while step 1 was given up: it is not even submitted."""
    inbox = Inbox()
    machine = Machine(
        {GatewayAttached: [[step(1), step(2)]], GatewayLost: [[step(3)]], StepAbandoned: [[], [], [step(4)]]}
    )

    def given_up(plan: StepPlan) -> None:
        if plan.number == 4:
            inbox.stop()
            return
        if plan.number == 1:
            inbox.put(GatewayLost(GatewayRef("other", 1)))
        raise StepGivenUp(f"step {plan.number}")

    parts = Parts(given_up, depth=2)
    inbox.put(START)
    run(machine, parts, inbox)
    assert [entry for entry in parts.log if entry[0] in ("submit", "run")] == [
        ("submit", 1), ("submit", 2), ("run", 1), ("run", 2), ("submit", 4), ("run", 4),
    ]  # fmt: skip
    ends = [e for e in machine.seen if isinstance(e, StepAbandoned)]
    assert ends == [StepAbandoned(1), StepAbandoned(2), StepAbandoned(3)]


def test_once_nobody_waits_each_step_is_given_up_in_its_turn() -> None:
    inbox = Inbox()
    machine = Machine({GatewayAttached: [[step(1), step(2)]]})

    def run_step(plan: StepPlan) -> None:
        if plan.number == 1:
            inbox.put(Abandon(GATEWAY, "r1", 1))
        else:
            inbox.stop()

    parts = Parts(run_step, depth=2)
    inbox.put(START)
    run(machine, parts, inbox)
    assert [entry for entry in parts.log if entry[0] in ("give up", "run")] == [
        ("run", 1), ("give up", 1), ("give up", 2), ("run", 2),
    ]  # fmt: skip


def test_more_steps_than_the_engine_takes_are_a_bug_of_the_machine() -> None:
    inbox = Inbox()
    inbox.put(START)
    with pytest.raises(RuntimeError, match="step 2 was asked for while step 1 is outstanding"):
        run(Machine({GatewayAttached: [[step(1), step(2)]]}), Parts(), inbox)


def test_a_broken_machine_ends_the_loop() -> None:
    inbox = Inbox()
    machine = Machine()

    def broken(event: Any, now: float) -> list[Effect]:
        raise AssertionError("a block is lost")

    machine.handle = broken  # type: ignore[method-assign]
    inbox.put(GatewayLost(GATEWAY))
    with pytest.raises(AssertionError, match="a block is lost"):
        run(machine, Parts(), inbox)


def test_becoming_idle_is_said_though_nothing_else_changed() -> None:
    inbox = Inbox()
    machine = Machine()
    machine.idle = False
    machine.load = lambda: Load(running=0)  # type: ignore[method-assign]
    turns: list[Turn] = []

    def become_idle() -> None:
        machine.idle = True

    inbox.put(START)

    def outward(turn: Turn) -> None:
        turns.append(turn)
        if len(turns) == 1:
            inbox.ask(become_idle)
        else:
            inbox.stop()

    parts = Parts()
    StepLoop(inbox, machine, parts, parts, outward).run()
    assert [turn.idle for turn in turns] == [False, True]
