"""The live step loop and the simulated instance, given the same events and step times, take identical decisions."""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from distserve.core.effects import Effect, OpenTicket, RunStep, Send, SendStage
from distserve.core.events import CommitAsked, GatewayAttached, InstanceEvent, ReserveAsked, StageStored, Submit
from distserve.core.types import (
    Endpoint,
    GatewayRef,
    InstanceRef,
    Member,
    ModelSpec,
    Request,
    Role,
    Sampling,
    StepPlan,
    Stopping,
    Ticket,
    Token,
    first_epoch,
)
from distserve.instance.inbox import Inbox
from distserve.instance.loop import StepLoop
from distserve.sched.batching import BatchPolicy
from distserve.sched.instance import InstanceState
from distserve_planner.simulation.deployment import InstanceSpec
from distserve_planner.simulation.shell import SimulatedInstance
from tests.planner.arrange import config

GATEWAY = GatewayRef("gateway", 1)
EPOCH = first_epoch(1)
PATIENCE: dict[str, Any] = {"lease_s": 1e6, "deadline_slack_s": 1e6, "tombstone_s": 1e6}  # a real queue waits by it
ELSEWHERE = Endpoint(InstanceRef("p", 1), "p")


def member(role: Role, blocks: int) -> Member:
    spec = ModelSpec("m", "f", 100, 1 << 20, (), 1, 1, 1, "float32", 8, blocks)
    return Member(Endpoint(InstanceRef("i", 1), "i"), role, spec)


def request(name: str, rng: random.Random) -> Request:
    stopping = Stopping(rng.randint(1, 40))
    return Request(name, "m", (0,) * rng.randint(1, 120), Sampling(temperature=0.0), stopping, 1e6)


def submits(me: Member, seed: int) -> list[tuple[float, InstanceEvent]]:
    rng, at = random.Random(seed), 0.0
    events: list[tuple[float, InstanceEvent]] = []
    for i in range(60):
        at += rng.expovariate(12.0)
        events.append((at, Submit(GATEWAY, request(f"r{i}", rng), EPOCH, me.endpoint, (), 1e6)))
    return events


def moves_in(me: Member, seed: int) -> list[tuple[float, InstanceEvent]]:
    rng, at = random.Random(seed), 0.0
    events: list[tuple[float, InstanceEvent]] = []
    for i in range(60):
        at += rng.expovariate(12.0)
        asked = request(f"r{i}", rng)
        total = len(asked.prompt_token_ids)
        events.append((at, ReserveAsked(f"m{i}", ELSEWHERE, me.ref, GATEWAY, asked, EPOCH, (), "f", total, 1e6, 1e6)))
    return events


def overflowing(me: Member, seed: int) -> list[tuple[float, InstanceEvent]]:
    """Moves, and between them prompts that are to be read and decoded here."""
    local = [(at, replace(e, request=replace(e.request, id=f"local {e.request.id}"))) for at, e in submits(me, seed)]
    return sorted([*moves_in(me, seed), *local[::2]], key=lambda due: due[0])


@dataclass
class Recorder:
    """A machine that notes what it decided, without the times that only measure."""

    state: InstanceState
    decided: list[Any] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.state, name)

    def handle(self, event: InstanceEvent, now: float) -> list[Effect]:
        effects = self.state.handle(event, now)
        self.decided += [_decision(e) for e in effects]
        return effects


def _decision(effect: Effect) -> Any:
    if isinstance(effect, Send):
        outputs = tuple(replace(o, timings=None) for o in getattr(effect.event, "outputs", ()))
        return effect.to, type(effect.event), outputs or getattr(effect.event, "ticket", None)
    return effect


@dataclass
class Arrived:
    """What a ticket leads to: its KV comes in and its source commits, some time later."""

    rng: random.Random

    def after(self, ticket: Ticket, now: float) -> list[tuple[float, InstanceEvent]]:
        landed = now + self.rng.uniform(0.001, 0.2)
        stored = StageStored(ticket.move_id, ticket.nonce, 0, ticket.total_tokens, 1)
        output, recent = (0,), (Token(0),)
        commit = CommitAsked(ticket.move_id, ticket.source, ticket.nonce, EPOCH, ticket.total_tokens, output, recent)
        return [(landed, stored), (landed + 0.001, commit)]


@dataclass
class Live:
    """The production step loop on a clock that only steps move; events due during a step wait in its inbox."""

    machine: Recorder
    coming: list[tuple[float, int, InstanceEvent]]
    rng: random.Random
    now: float = 0.0
    steps: list[float] = field(default_factory=list)
    given: list[tuple[float, InstanceEvent]] = field(default_factory=list)
    inbox: Inbox = field(init=False)
    plan: StepPlan = field(init=False)
    sources: Arrived = field(default_factory=lambda: Arrived(random.Random(5)))

    def live(self) -> None:
        self.inbox = ScriptedInbox(self)
        self.inbox.put(GatewayAttached(GATEWAY))
        StepLoop(self.inbox, self.machine, self, self, lambda turn: None, clock=lambda: self.now).run()

    def idle(self) -> None:
        """The loop would wait: the clock goes on to the next event."""
        if self.coming:
            self.pass_to(self.coming[0][0])
        else:
            self.inbox.stop()

    def pass_to(self, now: float) -> None:
        self.now = max(self.now, now)
        while self.coming and self.coming[0][0] <= self.now:
            at, _, event = heapq.heappop(self.coming)
            self.given.append((at, event))
            self.inbox.put(event)

    # the engine
    depth = 1

    def submit(self, plan: StepPlan) -> None:
        self.plan = plan

    def wait(self) -> Any:
        seconds = self.rng.uniform(0.005, 0.04)
        self.steps.append(seconds)
        self.pass_to(self.now + seconds)
        tokens = tuple((i.request_id, Token(0)) for i in self.plan.items if i.sample)
        return _Output(tokens, seconds)

    def give_up(self, number: int) -> None: ...

    # the data plane
    def open_ticket(self, ticket: Ticket, blocks: tuple[int, ...]) -> None:
        for at, event in self.sources.after(ticket, self.now):
            heapq.heappush(self.coming, (at, 1 << 20 | len(self.coming) + len(self.given), event))

    def close_ticket(self, move_id: str) -> None: ...
    def send_stage(self, *_: Any) -> None: ...
    def abort_send(self, move_id: str) -> None: ...
    def peer_lost(self, peer: InstanceRef) -> None: ...


class ScriptedInbox(Inbox):
    """Never waits: where the loop would, the script goes on."""

    def __init__(self, live: Live) -> None:
        super().__init__()
        self._live = live

    def take(self, *, wait: bool, timeout_s: float | None) -> Any:
        if wait and not self._items:
            self._live.idle()
        return super().take(wait=wait, timeout_s=timeout_s)


@dataclass(frozen=True, slots=True)
class _Output:
    tokens: tuple[tuple[str, Token], ...]
    forward_s: float


class Recorded:
    """A latency model that tells recorded step times, one after the other."""

    name, stages, uncertainty = "recorded", 1, 0.0
    kv_bytes_per_token, kv_capacity_tokens = 1.0, 1

    def __init__(self, seconds: Sequence[float]) -> None:
        self._seconds = iter(seconds)

    def step_s(self, chunks: Sequence[tuple[int, int]], decodes: int, decode_context: int) -> float:
        return next(self._seconds)

    def decode_s(self, batch: int, context: int) -> float:
        return next(self._seconds)


@dataclass
class Around:
    """The world around one simulated instance: step ends on a heap, all else goes nowhere."""

    due: list[float] = field(default_factory=list)

    def wake_at(self, instance: int, at: float) -> None:
        self.due.append(at)

    def send(self, source: int, effect: Send, now: float) -> None: ...
    def stage(self, source: int, effect: SendStage, now: float) -> None: ...
    def abort(self, move_id: str, now: float) -> None: ...
    def ended(self, instance: int, sequence: Any, now: float) -> None: ...
    def after(self, at: float, instance: int, effects: list[Effect]) -> None: ...


def simulated(me: Member, settings: Any, live: Live) -> Recorder:
    around = Around()
    spec = InstanceSpec(me.role, Recorded(live.steps), settings, me.spec.pool_tokens, 8)
    shell = SimulatedInstance(0, me, spec, around, jumps=False, seed=7)
    recorder = Recorder(InstanceState(me, settings, 7))
    shell.state = recorder  # type: ignore[assignment]
    shell.handle(GatewayAttached(GATEWAY), 0.0)
    for at, event in live.given:
        while around.due and around.due[0] <= at:
            shell.run_to(around.due.pop(0))
        shell.handle(event, at)
    while around.due:
        shell.run_to(around.due.pop(0))
    return recorder


@pytest.mark.parametrize("batching", list(BatchPolicy))
@pytest.mark.parametrize(
    ("role", "events"), [(Role.MIXED, submits), (Role.DECODE, moves_in), (Role.DECODE, overflowing)]
)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_same_events_same_step_times_same_decisions(role: Role, events: Any, batching: BatchPolicy, seed: int) -> None:
    me, settings = (
        member(role, blocks=48),
        replace(config(batching), prefill_chunk=32, max_batch_tokens=128, **PATIENCE),
    )
    machine = Recorder(InstanceState(me, settings, 7))
    coming = [(at, i, event) for i, (at, event) in enumerate(events(me, seed))]
    live = Live(machine, coming, random.Random(seed))
    live.live()
    again = simulated(me, settings, live)
    plans = [d for d in machine.decided if isinstance(d, RunStep)]
    assert len(plans) > 50
    assert machine.state.residents.preemptions > 0, "the pool was never short: the test would show little"
    assert again.decided == machine.decided
    assert machine.state.idle and again.state.idle
    if role is Role.DECODE:
        assert sum(isinstance(d, OpenTicket) for d in machine.decided) == 60
