"""What ``tests/faults`` found, each as the shortest story that shows it."""

from __future__ import annotations

import math

from distserve.core.effects import RunStep, SendStage
from distserve.core.events import (
    CommitAsked,
    Committed,
    ControllerFound,
    InstanceFound,
    MembersChanged,
    MoveEnded,
    ReserveAsked,
    ReserveGranted,
    StageFailed,
    StageSent,
    StageStored,
    Tick,
)
from distserve.core.types import Role, Ticket, Token, first_epoch
from distserve.sched.config import InstanceConfig
from distserve.sched.gateway import GatewayState
from distserve.sched.instance import InstanceState
from tests.sched.factory import (
    EPOCH,
    GATEWAY,
    find,
    instance,
    kinds,
    member,
    request,
    reserve,
    run_to_idle,
    step_done,
    submit,
)

P = member("p", Role.PREFILL)
D = member("d", Role.DECODE)
M = member("m", Role.MIXED, blocks=8)


def all_free(state: InstanceState) -> bool:
    state.check()
    return state.idle and not state.residents.ledger.owners()


def granted(asked: ReserveAsked) -> ReserveGranted:
    source, total = asked.source.ref, asked.total_tokens
    return ReserveGranted(
        Ticket(asked.move_id, asked.request.id, asked.epoch, source, asked.destination, "fp", 5, 0, total, 10.0)
    )


def committing(state: InstanceState) -> ReserveAsked:
    """A request prefilled on ``state``, its KV sent to D and the commit asked for, at time 0.2."""
    effects = state.handle(submit(request(), D), 0.0)
    asked = find(effects, ReserveAsked)
    state.handle(step_done(effects), 0.1)
    assert kinds(state.handle(granted(asked), 0.2)) == ["SendStage", "CommitAsked"]
    return asked


def commit(ticket: Ticket) -> CommitAsked:
    return CommitAsked(ticket.move_id, P.ref, ticket.nonce, ticket.epoch, ticket.total_tokens, (50,), (Token(50),))


def adopted(state: InstanceState, *, move: str = "mv", epoch: int = EPOCH) -> list[str]:
    """A move into ``state``, from the ask to the change of owner."""
    ticket = find(state.handle(reserve(request(), P, D, move=move, epoch=epoch), 0.0), ReserveGranted).ticket
    state.handle(StageStored(move, ticket.nonce, ticket.have_tokens, 20, 1), 0.1)
    return kinds(state.handle(commit(ticket), 0.2))


def test_a_late_repeat_of_a_submit_does_not_run_the_request_again() -> None:
    state = instance(M)
    asked = submit(request(), M)
    run_to_idle(state, state.handle(asked, 0.0))
    assert state.handle(asked, 5.0) == []
    assert all_free(state)


def test_stages_may_be_stored_in_any_order() -> None:
    state = instance(D)
    ticket = find(state.handle(reserve(request(), P, D), 0.0), ReserveGranted).ticket
    state.handle(commit(ticket), 0.1)
    for start, end in ((16, 20), (0, 8), (0, 8)):
        assert state.handle(StageStored("mv", ticket.nonce, start, end, 1), 0.2) == []
    assert "Committed" in kinds(state.handle(StageStored("mv", ticket.nonce, 8, 16, 1), 0.3))


def test_the_commit_is_waited_for_from_the_last_stage_on() -> None:
    """A long prompt's KV may take longer than the answer to a commit; the data plane has deadlines of its own."""
    state = instance(P, InstanceConfig(commit_timeout_s=3.0))
    asked = committing(state)
    assert kinds(state.handle(Tick(), 30.0)) == ["CommitAsked"]
    state.handle(StageSent(asked.move_id, 0, 20, 1, 30.0), 31.0)
    assert kinds(state.handle(Tick(), 33.0)) == ["CommitAsked"]
    assert kinds(state.handle(Tick(), 34.5)) == ["AbortSend", "MoveEnded", "AttemptFailed"]
    assert all_free(state)


def test_a_move_thought_broken_may_have_been_committed() -> None:
    """The bytes arrived, their acknowledgement did not: the source tries again, then hears who owns the sequence."""
    state = instance(P)
    first = committing(state)
    again = state.handle(StageFailed(first.move_id, "timed out", True), 5.0)
    second = find(again, ReserveAsked)
    assert second.move_id != first.move_id
    assert kinds(state.handle(Committed(first.move_id, D.ref, EPOCH + 1), 5.1)) == ["MoveEnded"]
    assert all_free(state)


def test_a_second_ask_for_what_is_already_owned_is_told_so() -> None:
    state = instance(D)
    assert "Committed" in adopted(state, move="r/1")
    answer = state.handle(reserve(request(), P, D, move="r/2"), 1.0)
    assert kinds(answer) == ["Committed"]
    assert find(answer, Committed).move_id == "r/1"
    assert len(state.residents.sequences) == 1


def test_a_new_attempts_move_ends_what_an_old_attempt_left_running() -> None:
    """The Abandon was lost; two sequences of one request would be one owner too many."""
    state = instance(D)
    adopted(state, move="old")
    assert "Committed" in adopted(state, move="new", epoch=first_epoch(2))
    assert [s.epoch for s in state.residents.sequences.values()] == [first_epoch(2) + 1]
    state.check()


def test_an_old_attempts_move_does_not_end_a_newer_one() -> None:
    state = instance(D)
    state.handle(reserve(request(), P, D, move="new", epoch=first_epoch(2)), 0.0)
    answer = state.handle(reserve(request(), P, D, move="old"), 0.1)
    assert kinds(answer) == ["MoveEnded"]
    assert find(answer, MoveEnded).move_id == "old"
    assert list(state.arrivals.moves) == ["new"]


def test_an_ask_that_its_source_stopped_repeating_is_forgotten() -> None:
    """The word that the move is over was lost: it must not be granted long after, nor hold its place in the line."""
    state = instance(member("d", Role.DECODE, blocks=4), InstanceConfig(lease_s=10.0))
    state.handle(reserve(request("first"), P, D, move="first"), 0.0)
    assert state.handle(reserve(request("second"), P, D, move="second"), 1.0) == []
    state.handle(reserve(request("first"), P, D, move="first"), 9.0)
    state.handle(reserve(request("second"), P, D, move="second"), 9.0)
    assert state.handle(Tick(), 12.0) == []  # both were repeated
    assert kinds(state.handle(Tick(), 19.5)) == ["CloseTicket", "MoveEnded", "MoveEnded"]
    assert all_free(state)


def test_a_sequence_alone_gets_the_whole_pool_whatever_is_cached() -> None:
    """Two prompts alike were computed at once; the copy that the first leaves behind gives way to the second."""
    state = instance(M)
    twins = [request(f"r{i}", prompt=24, max_tokens=most) for i, most in enumerate((4, 40))]
    effects = [e for twin in twins for e in state.handle(submit(twin, M), 0.0)]
    run_to_idle(state, effects)
    assert all_free(state)


def test_a_late_repeat_of_an_old_member_list_takes_nobody_away() -> None:
    state = GatewayState(GATEWAY)
    state.handle(ControllerFound(), 0.0)
    state.handle(MembersChanged(3, (P, D)), 0.0)
    state.handle(InstanceFound(P.ref), 0.0)
    state.handle(MembersChanged(2, (D,), (P.ref,)), 0.1)
    assert set(state.members) == {"p", "d"}
    state.handle(ControllerFound(), 0.2)  # another controller counts from the start
    state.handle(MembersChanged(0, (D,), (P.ref,)), 0.3)
    assert set(state.members) == {"d"}


def test_nothing_is_sent_before_it_is_computed() -> None:
    state = instance(P, InstanceConfig(prefill_chunk=12))
    effects = state.handle(submit(request(prompt=30), D), 0.0)
    asked = find(effects, ReserveAsked)
    sent = 0
    computed = 0
    effects += state.handle(granted(asked), 0.1)
    while any(isinstance(e, RunStep) for e in effects):
        computed += find(effects, RunStep).plan.tokens
        effects = state.handle(step_done(effects), 0.2)
        for stage in (e for e in effects if isinstance(e, SendStage)):
            assert sent == stage.start < stage.end <= computed
            sent = stage.end
    assert sent == computed == 30
    assert math.isfinite(state.next_deadline() or math.inf)


def test_what_was_submitted_is_remembered_for_its_time_and_no_longer() -> None:
    """Nothing else happens afterwards: a timer of its own forgets it."""
    state = instance(M)
    run_to_idle(state, state.handle(submit(request(), M), 0.0))
    due = state.next_deadline()
    assert due == state.config.tombstone_s
    assert state.handle(Tick(), due) == []
    assert state.next_deadline() is None
