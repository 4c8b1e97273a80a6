"""Who waits for a step, and what the machine makes of one that was given up: in every order, with nothing lost."""

from __future__ import annotations

import pytest

from distserve.core.effects import RunStep
from distserve.core.events import Abandon, Abandoned, GatewayAttached, GatewayLost, StepAbandoned, Tick, TokensMade
from distserve.core.types import GatewayRef, InstanceRef, Role
from distserve.sched.awaiting import Awaiting
from distserve.sched.departures import Departures
from tests.sched.factory import EPOCH, GATEWAY, Make, assert_all_free, find, kinds, member, request, step_done, submit

OTHER = GatewayRef("g", 2)
M = member("m", Role.MIXED)
P, D = member("p", Role.PREFILL), member("d", Role.DECODE)


def two() -> Awaiting:
    return Awaiting(7, {"a": (GATEWAY, EPOCH), "b": (OTHER, EPOCH + 3)})


def test_the_last_one_to_leave_is_told_once() -> None:
    awaiting = two()
    assert not awaiting.hear(Abandon(GATEWAY, "a", EPOCH))
    assert not awaiting.hear(Abandon(GATEWAY, "a", EPOCH)), "a repeat"
    assert not awaiting.nobody
    assert awaiting.hear(Abandon(OTHER, "b", EPOCH + 9))
    assert awaiting.nobody
    assert not awaiting.hear(Abandon(OTHER, "b", EPOCH + 9)), "said already"


@pytest.mark.parametrize(
    "event",
    [
        Abandon(OTHER, "b", EPOCH + 2),  # an earlier attempt
        Abandon(GATEWAY, "b", EPOCH + 3),  # another gateway's request of that name
        Abandon(OTHER, "c", EPOCH + 3),
        GatewayLost(GatewayRef("g", 3)),
        GatewayLost(GatewayRef("h", 2)),
        Tick(),
        Abandoned(InstanceRef("m", 1), "b", EPOCH + 3),
    ],
)
def test_what_is_meant_for_others_changes_nothing(event) -> None:
    awaiting = two()
    awaiting.hear(Abandon(GATEWAY, "a", EPOCH))
    assert not awaiting.hear(event)
    assert not awaiting.nobody


@pytest.mark.parametrize("kind", [GatewayLost, GatewayAttached])
def test_a_gateway_leaves_with_all_its_requests(kind) -> None:
    awaiting = Awaiting(1, {"a": (GATEWAY, EPOCH), "b": (OTHER, EPOCH), "c": (GATEWAY, EPOCH)})
    assert not awaiting.hear(kind(GATEWAY))
    assert awaiting.hear(kind(OTHER))


def test_the_machine_says_who_is_still_here(make: Make) -> None:
    state = make(M)
    state.handle(submit(request("a"), M), 0.0)
    state.handle(submit(request("b", 7), M), 0.0)  # comes while the step of the first one runs
    awaiting = state.awaiting()
    assert awaiting.number == 1
    assert awaiting.hear(Abandon(GATEWAY, "a", EPOCH)), "nobody else is in the step"
    state.handle(Abandon(GATEWAY, "a", EPOCH), 0.1)
    assert state.awaiting().nobody


def test_a_step_given_up_frees_what_the_cancelled_held_and_caches_none_of_it(make: Make) -> None:
    state = make(M)
    state.handle(submit(request("a", 24), M), 0.0)
    find(state.handle(Abandon(GATEWAY, "a", EPOCH), 0.1), Abandoned)
    assert state.residents.ledger.owners() != (), "the step still writes"
    assert state.handle(StepAbandoned(1), 0.2) == []
    assert_all_free(state)
    assert state.residents.ledger.evictable == 0
    again = find(state.handle(submit(request("b", 24), M), 0.3), RunStep).plan
    assert (again.number, again.items[0].start) == (2, 0), "the same prompt is computed from its start"


def test_a_chunk_given_up_leaves_the_chunks_before_it(make: Make) -> None:
    """What earlier steps computed stays in the prefix cache; the chunk that was cut short does not."""
    state = make(M, prefill_chunk=8)
    first = state.handle(submit(request("a", 24), M), 0.0)
    second = state.handle(step_done(first), 0.1)
    assert find(second, RunStep).plan.items[0].start == 8
    state.handle(Abandon(GATEWAY, "a", EPOCH), 0.2)
    state.handle(StepAbandoned(2), 0.3)
    assert state.residents.ledger.evictable == 1
    assert find(state.handle(submit(request("b", 24), M), 0.4), RunStep).plan.items[0].start == 8


def test_the_step_may_end_before_the_machine_hears_of_the_cancel(make: Make) -> None:
    state = make(M)
    state.handle(submit(request("a", 24), M), 0.0)
    again = find(state.handle(StepAbandoned(1), 0.1), RunStep).plan
    assert (again.number, again.items[0].start, len(again.items[0].token_ids)) == (2, 0, 24)
    state.handle(Abandon(GATEWAY, "a", EPOCH), 0.2)
    state.handle(StepAbandoned(2), 0.3)
    assert_all_free(state)


def test_whoever_is_still_here_is_planned_again_and_comes_to_the_same_end(make: Make) -> None:
    state, undisturbed = make(M), make(M)
    made = {}
    for machine, disturb in ((state, True), (undisturbed, False)):
        effects = machine.handle(submit(request("a", 24, 4), M), 0.0)
        out = []
        for turn in range(20):
            if not any(isinstance(e, RunStep) for e in effects):
                break
            if disturb and turn % 2 == 0:
                effects = machine.handle(StepAbandoned(find(effects, RunStep).plan.number), 0.1)
                assert kinds(effects) == ["RunStep"]
            effects = machine.handle(step_done(effects), 0.2)
            out += [o.tokens for e in effects if "TokensMade" in kinds([e]) for o in e.event.outputs]
            machine.check()
        made[disturb] = out
        assert_all_free(machine)
    assert made[True] == made[False]
    assert len(made[True]) == 4


def test_a_step_given_up_late_or_twice_is_counted_and_changes_nothing(make: Make) -> None:
    state = make(M)
    first = state.handle(submit(request("a", 24), M), 0.0)
    find(state.handle(step_done(first), 0.1), TokensMade)
    assert state.handle(StepAbandoned(1), 0.2) == []
    assert state.steps.ignored == 1
    assert state.steps.running


def test_a_move_under_way_sends_nothing_of_a_step_given_up(make: Make) -> None:
    """The prompt is on its way to its decode instance chunk by chunk; the chunk that was cut short stays unsent."""
    state = make(P, prefill_chunk=8)
    first = state.handle(submit(request("a", 24), D), 0.0)
    state.handle(step_done(first), 0.1)
    assert isinstance(state.departures, Departures)
    (move,) = state.departures.moves.values()
    sent = move.sent
    again = state.handle(StepAbandoned(2), 0.2)
    assert kinds(again) == ["RunStep"]
    assert (find(again, RunStep).plan.items[0].start, move.sent) == (8, sent)
