"""A cancel does not wait for the step that runs: the inbox notices, the engine stops, the machine is told, KV is free.

With scripted parts for the order of things, and with the real machine over a real engine on a tiny model, where a layer
of the model is what time is counted in.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from distserve.core.effects import Effect
from distserve.core.events import (
    Abandon,
    Abandoned,
    GatewayAttached,
    GatewayLost,
    InstanceEvent,
    StepAbandoned,
    StepDone,
    Submit,
    TokensMade,
)
from distserve.core.types import Endpoint, GatewayRef, InstanceRef, Member, Request, Role, Sampling, Stopping
from distserve.engine.config import EngineConfig
from distserve.engine.forward import TorchForward
from distserve.engine.runner import Engine
from distserve.engine.stopping import StepGivenUp
from distserve.instance.inbox import Inbox
from distserve.instance.loop import FAILED_STEPS_LIMIT, StepLoop, Turn
from distserve.observe.journal import Journal, replay
from distserve.sched.awaiting import Awaiting
from distserve.sched.config import InstanceConfig
from distserve.sched.instance import InstanceState
from tests.engine.driver import complete, ids
from tests.shells.test_loop import GATEWAY, START, Machine, Parts, run, step
from tests.tiny_models import VOCAB_SIZE, make_tiny

LAYERS, PROMPT = 6, 300
ME = InstanceRef("m", 1)
EPOCH = 65536


# ── the inbox ────────────────────────────────────────────────────────────────────────────────────────────────────────


def during(inbox: Inbox, given_up: list[int], **here: tuple[GatewayRef, int]) -> AbstractContextManager[None]:
    return inbox.during(Awaiting(7, dict(here)), given_up.append)


def test_the_last_cancel_gives_the_step_up_in_the_thread_that_hands_it_in() -> None:
    inbox, given_up = Inbox(), []
    with during(inbox, given_up, a=(GATEWAY, 1), b=(GATEWAY, 1)):
        inbox.put(Abandon(GATEWAY, "a", 1))
        assert given_up == []
        inbox.put(Abandon(GATEWAY, "b", 1))
        assert given_up == [7]
    assert inbox.take(wait=False, timeout_s=None) == [Abandon(GATEWAY, "a", 1), Abandon(GATEWAY, "b", 1)]


def test_what_came_between_the_turn_and_the_step_counts() -> None:
    inbox, given_up = Inbox(), []
    inbox.put(Abandon(GATEWAY, "a", 1))
    inbox.ask(lambda: 1)
    with during(inbox, given_up, a=(GATEWAY, 1)):
        assert given_up == [7]


def test_what_comes_when_no_step_runs_gives_none_up() -> None:
    inbox, given_up = Inbox(), []
    with during(inbox, given_up, a=(GATEWAY, 1)):
        pass
    inbox.put(Abandon(GATEWAY, "a", 1))
    with pytest.raises(RuntimeError, match="broke"), during(inbox, given_up, b=(GATEWAY, 1)):
        raise RuntimeError("broke")
    inbox.put(Abandon(GATEWAY, "b", 1))
    assert given_up == []


def test_an_inbox_wakes_whoever_waits() -> None:
    inbox = Inbox()
    taken: list[Any] = []
    waiting = threading.Thread(target=lambda: taken.extend(inbox.take(wait=True, timeout_s=None)))
    waiting.start()
    inbox.put(START)
    waiting.join(20)
    assert taken == [START]
    assert inbox.take(wait=True, timeout_s=0.0) == []


# ── the loop, among scripted parts ───────────────────────────────────────────────────────────────────────────────────


def test_a_step_given_up_is_told_after_the_cancel_and_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    inbox = Inbox()
    steps = FAILED_STEPS_LIMIT + 2

    def give_up(plan: Any) -> None:
        if plan.number == steps:
            inbox.stop()
        raise StepGivenUp(f"step {plan.number} was given up")

    machine = Machine({GatewayAttached: [[step(1)]], StepAbandoned: [[step(n)] for n in range(2, steps + 1)]})
    inbox.put(START)
    run(machine, Parts(give_up), inbox)
    assert machine.seen == [START, *(StepAbandoned(n) for n in range(1, steps))]
    assert not caplog.records


def test_a_cancel_during_a_step_reaches_the_engine_at_once() -> None:
    inbox = Inbox()
    machine = Machine({GatewayAttached: [[step(4)]]})
    parts = Parts()

    def cancelled(_: Any) -> None:
        inbox.put(Abandon(GATEWAY, "r1", 1))
        parts.log.append("still in the step")
        inbox.stop()

    parts.on_run = cancelled
    inbox.put(START)
    run(machine, parts, inbox)
    assert [entry for entry in parts.log if entry[0] != "say"] == [("run", 4), ("give up", 4), "still in the step"]


def test_a_step_cancelled_in_the_turn_that_planned_it_does_not_run() -> None:
    inbox = Inbox()
    machine = Machine({GatewayAttached: [[step(1)]]})
    parts = Parts()
    answer = machine.handle

    def handle(event: Any, now: float) -> list[Effect]:
        if isinstance(event, StepAbandoned):
            inbox.stop()
        return answer(event, now)

    machine.handle = handle  # type: ignore[method-assign]
    inbox.put(START)
    inbox.put(Abandon(GATEWAY, "r1", 1))
    run(machine, parts, inbox)
    assert machine.seen == [START, Abandon(GATEWAY, "r1", 1), StepAbandoned(1)]
    assert not [entry for entry in parts.log if entry[0] == "run"]


# ── the real machine over a real engine ──────────────────────────────────────────────────────────────────────────────


class Instance:
    """The loop, the machine and the engine of an instance; the test is its network. Layers run are counted."""

    def __init__(self, directory: Path, journal: Path | None = None) -> None:
        self.engine = Engine.load(EngineConfig(model=str(directory), kernels="torch", pool_blocks=64))
        self.member = Member(Endpoint(ME, "m:1", "m:2"), Role.MIXED, self.engine.spec)
        self.machine = InstanceState(self.member, InstanceConfig(), 7)
        self.inbox = Inbox()
        self.events: list[InstanceEvent] = []
        self.said: list[Any] = []
        self.layers_run = 0
        self.at_layer: Callable[[int], None] = lambda run: None  # called when so many have run, from inside the step
        self.heard: Callable[[InstanceEvent], None] = lambda event: None
        self.after: Callable[[Any], None] = lambda said: None
        self._journal = journal
        forward = self.engine.forward
        assert isinstance(forward, TorchForward)
        layers = forward._model.layers  # type: ignore[attr-defined]
        layers[:] = [self._counted(layer) for layer in layers]

    def _counted(self, layer: Any) -> Any:
        def run(*inputs: Any) -> Any:
            out = layer(*inputs)
            self.layers_run += 1
            self.at_layer(self.layers_run)
            return out

        return run

    def write(self, now: float, event: InstanceEvent, effects: Sequence[Effect]) -> None:
        self.events.append(event)
        self.machine.check()
        self.heard(event)

    def outward(self, turn: Turn) -> None:
        for send in turn.sends:
            self.said.append(send.event)
            self.after(send.event)

    def hand_in(self, *events: InstanceEvent) -> None:
        """As the network does: from another thread, while the step goes on."""
        thread = threading.Thread(target=lambda: [self.inbox.put(event) for event in events])
        thread.start()
        thread.join()

    def live(self, *events: InstanceEvent) -> None:
        for event in (GatewayAttached(GATEWAY), *events):
            self.inbox.put(event)
        observers: list[Any] = [self]
        if self._journal is not None:
            observers.append(Journal(self._journal, {}))
        StepLoop(self.inbox, self.machine, self.engine, _NoData(), self.outward, observers).run()
        if self._journal is not None:
            observers[1].close()

    def submit(self, name: str, prompt: Sequence[int], tokens: int = 3) -> Submit:
        sampling, stopping = Sampling(temperature=0.0), Stopping(tokens)
        return Submit(GATEWAY, Request(name, "m", tuple(prompt), sampling, stopping, 60.0), EPOCH, self.member.endpoint)

    @property
    def all_free(self) -> bool:
        ledger = self.machine.residents.ledger
        return self.machine.idle and ledger.owners() == () and ledger.free + ledger.evictable == ledger.total


class _NoData:
    """A data plane that is not asked for anything: nothing moves here."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} was asked for")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("tiny"), num_hidden_layers=LAYERS)


def prompt(seed: int, length: int = PROMPT) -> list[int]:
    return [(7 * i * (seed + 1) + seed) % (VOCAB_SIZE - 3) + 3 for i in range(length)]


@pytest.mark.parametrize("end", [Abandon(GATEWAY, "r1", EPOCH), GatewayLost(GATEWAY)], ids=["cancel", "gateway lost"])
def test_a_cancel_frees_a_long_prompt_within_a_layer(directory: Path, end: InstanceEvent) -> None:
    instance = Instance(directory)

    def at_layer(count: int) -> None:
        if count == 2:
            instance.hand_in(end, end)

    def heard(event: InstanceEvent) -> None:
        if isinstance(event, StepAbandoned):
            instance.inbox.stop()

    instance.at_layer, instance.heard = at_layer, heard
    instance.live(instance.submit("r1", prompt(1)))
    assert instance.layers_run == 2, "the step went on for nobody"
    assert instance.events[-3:] == [end, end, StepAbandoned(1)]
    assert instance.all_free
    assert instance.machine.residents.ledger.evictable == 0, "half-written blocks are in the prefix cache"


def test_the_next_prompt_on_the_same_blocks_is_right_and_the_journal_replays(directory: Path, tmp_path: Path) -> None:
    """Cancelled in its third layer; then the very same prompt again, which must find nothing of it in the cache."""
    instance = Instance(directory, tmp_path / "journal.jsonl")
    made: list[int] = []

    def at_layer(count: int) -> None:
        if count == 3:
            instance.hand_in(Abandon(GATEWAY, "r1", EPOCH))

    def after(said: Any) -> None:
        if isinstance(said, Abandoned):
            instance.inbox.put(instance.submit("r2", prompt(1)))
        if isinstance(said, TokensMade):
            made.extend(token.id for output in said.outputs for token in output.tokens)
            if said.outputs[0].finish is not None:
                instance.inbox.stop()

    instance.at_layer, instance.after = at_layer, after
    instance.live(instance.submit("r1", prompt(1)))
    assert [type(e) for e in instance.events if isinstance(e, Abandon | StepAbandoned | StepDone)] == [
        Abandon, StepAbandoned, StepDone, StepDone, StepDone,
    ]  # fmt: skip
    assert instance.layers_run == 3 + 3 * LAYERS
    assert instance.all_free
    fresh = Engine.load(EngineConfig(model=str(directory), kernels="torch", pool_blocks=64))
    assert made == ids(complete(fresh, prompt(1), 3))

    replayed = replay(tmp_path / "journal.jsonl", lambda _: InstanceState(instance.member, InstanceConfig(), 7))
    assert replayed == len(instance.events)


def test_a_step_that_others_wait_for_goes_on(directory: Path) -> None:
    """Two prompts in one step, one of them cancelled: the other one's tokens are those it has alone."""
    instance = Instance(directory)
    made: list[int] = []

    def at_layer(count: int) -> None:
        if instance.machine.steps.count == 2:
            instance.at_layer = lambda count: None
            instance.hand_in(Abandon(GATEWAY, "r2", EPOCH), Abandon(GATEWAY, "r3", EPOCH - 1))

    def after(said: Any) -> None:
        for output in getattr(said, "outputs", ()):
            if output.request_id == "r3":
                made.extend(token.id for token in output.tokens)
                if output.finish is not None:
                    instance.inbox.stop()

    instance.at_layer, instance.after = at_layer, after
    first = instance.submit("r1", prompt(0, 5), 1)
    instance.live(first, instance.submit("r2", prompt(1, 60)), instance.submit("r3", prompt(2, 60)))
    assert not [e for e in instance.events if isinstance(e, StepAbandoned)]
    assert instance.all_free
    fresh = Engine.load(EngineConfig(model=str(directory), kernels="torch", pool_blocks=64))
    assert made == ids(complete(fresh, prompt(2, 60), 3))


def test_sends_of_a_cancel_leave_before_the_next_step(directory: Path) -> None:
    """Who was cancelled is acknowledged although another prompt waits and runs next."""
    instance = Instance(directory)
    order: list[str] = []

    def at_layer(count: int) -> None:
        if count == 2:
            instance.hand_in(instance.submit("r2", prompt(2)), Abandon(GATEWAY, "r1", EPOCH))
        if count == 3:
            order.append("the next step")
            instance.inbox.stop()

    instance.at_layer = at_layer
    instance.after = lambda said: order.append(type(said).__name__)
    instance.live(instance.submit("r1", prompt(1)))
    assert order[:2] == ["Abandoned", "the next step"]
    assert instance.said[0] == Abandoned(ME, "r1", EPOCH)
