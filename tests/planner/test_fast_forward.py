"""Batching policies, and many steps at once: the machine after a jump is the machine after the steps."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from distserve.core.effects import RunStep
from distserve.core.events import Abandon, GatewayAttached, StepDone, Submit
from distserve.core.types import (
    Endpoint,
    GatewayRef,
    InstanceRef,
    Member,
    ModelSpec,
    Request,
    Role,
    Sampling,
    Stopping,
    Token,
    first_epoch,
)
from distserve.sched.batching import POLICIES, BatchLimits, BatchPolicy
from distserve.sched.instance import InstanceState
from tests.planner.arrange import config

GATEWAY, EPOCH, TOKEN = GatewayRef("g", 1), first_epoch(1), Token(0)
ME = Endpoint(InstanceRef("i", 1), "i")
LIMITS = BatchLimits(max_tokens=100, max_tokens_beside_decodes=40, chunk=30)


@dataclass
class Owes:
    owed: int
    decoding: bool = False


def chosen(policy: BatchPolicy, running: list[Owes], limits: BatchLimits = LIMITS) -> list[int]:
    """Tokens of each of ``running``, 0 for those left out."""
    counts = {id(s): n for s, n in POLICIES[policy](running, limits)}
    return [counts.get(id(s), 0) for s in running]


D = True


def test_chunks_fill_the_budget_beside_decodes() -> None:
    assert chosen(BatchPolicy.CHUNKED, [Owes(1, D), Owes(50), Owes(50)]) == [1, 30, 9]


def test_whole_prompts_are_not_cut() -> None:
    assert chosen(BatchPolicy.WHOLE_PROMPTS, [Owes(60), Owes(30), Owes(20)]) == [60, 30, 0]
    assert chosen(BatchPolicy.WHOLE_PROMPTS, [Owes(1, D), Owes(20), Owes(25)]) == [1, 20, 0]
    assert chosen(BatchPolicy.WHOLE_PROMPTS, [Owes(500), Owes(1)]) == [500, 0], "one beyond the budget runs alone"


def test_prompts_first_lets_decodes_wait() -> None:
    assert chosen(BatchPolicy.PROMPTS_FIRST, [Owes(1, D), Owes(60), Owes(30)]) == [0, 60, 30]
    assert chosen(BatchPolicy.PROMPTS_FIRST, [Owes(1, D), Owes(1, D)]) == [1, 1]


@pytest.mark.parametrize("policy", list(BatchPolicy))
def test_every_policy_runs_all_decodes_when_nobody_owes_a_prompt(policy: BatchPolicy) -> None:
    assert chosen(policy, [Owes(1, D)] * 3) == [1] * 3
    assert chosen(policy, []) == []


def machine(blocks: int) -> InstanceState:
    spec = ModelSpec("m", "f", 100, 1 << 20, (), 1, 1, 1, "float32", 8, blocks)
    state = InstanceState(Member(ME, Role.MIXED, spec), config(), 7, terse=True)
    state.handle(GatewayAttached(GATEWAY), 0.0)
    return state


def submit(name: str, prompt: int, output: int) -> Submit:
    request = Request(name, "m", (0,) * prompt, Sampling(), Stopping(output), 1e6)
    return Submit(GATEWAY, request, EPOCH, ME, (), 1e6)


def one_step(state: InstanceState, now: float) -> None:
    steps = state.steps
    state.handle(StepDone(steps.count, tuple((i, TOKEN) for i in steps.sampling()), 0.0), now)


def picture(state: InstanceState) -> object:
    """All that later decisions can depend on."""
    residents, ledger = state.residents, state.residents.ledger
    state.check()
    sequences = [
        (s.id, s.phase, s.computed, tuple(s.tokens), s.first_token_at, s.started_at, s.timed, s.recent)
        for s in residents.sequences.values()
    ]
    tables = [(owner, ledger.table(owner), ledger.state(owner)) for owner in ledger.owners()]
    places = [[s.id for s in residents.waiting], [s.id for s in residents.running]]
    return sequences, tables, places, state.steps.count, state.steps.shape(), residents.preemptions


@pytest.mark.parametrize("blocks", [40, 400])
def test_a_jump_leaves_what_its_steps_leave(blocks: int) -> None:
    rng = random.Random(blocks)
    fast, slow = machine(blocks), machine(blocks)
    now, jumped, longest = 0.0, 0, 0
    for i in range(300):
        now += 1.0
        if i % 5 == 0 and i < 200:
            event = submit(f"r{i}", rng.randint(1, 60), rng.randint(20, 90))
            assert [type(e) for e in fast.handle(event, now)] == [type(e) for e in slow.handle(event, now)]
        elif (sure := fast.steps.alike()) > 0:
            steps = rng.randint(1, sure)
            fast.fast_forward(steps, TOKEN, now, now)
            for _ in range(steps):
                one_step(slow, now)
            jumped, longest = jumped + steps, max(longest, steps)
        elif fast.steps.running:
            one_step(fast, now)
            one_step(slow, now)
        assert picture(fast) == picture(slow)
    assert jumped > 300
    assert longest > 10
    assert (fast.residents.preemptions > 0) == (blocks == 40)


def test_what_could_decide_differently_is_not_alike() -> None:
    state = machine(100)
    assert state.steps.alike() == 0, "nothing runs"
    state.handle(submit("a", 20, 30), 0.0)
    assert state.steps.alike() == 0, "a prompt"
    one_step(state, 1.0)
    assert state.steps.alike() == 29
    state.handle(submit("b", 20, 30), 1.5)
    assert state.steps.alike() == 1, "b joins after this step"
    one_step(state, 2.0)
    one_step(state, 3.0)
    assert state.steps.alike() == 27
    state.handle(Abandon(GATEWAY, "a", EPOCH), 3.5)
    assert state.steps.alike() == 0, "a is gone, but its blocks are still written"


def test_plans_are_terse_only_when_asked() -> None:
    spec = ModelSpec("m", "f", 100, 1 << 20, (), 1, 1, 1, "float32", 8, 64)
    for terse in (False, True):
        state = InstanceState(Member(ME, Role.MIXED, spec), config(), 7, terse=terse)
        state.handle(GatewayAttached(GATEWAY), 0.0)
        (run,) = [e for e in state.handle(submit("a", 20, 3), 0.0) if isinstance(e, RunStep)]
        assert len(run.plan.items) == (0 if terse else 1)
        assert state.steps.shape().chunks == ((20, 0),)
