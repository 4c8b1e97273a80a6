"""One instance in a move: at its source and at its destination; repeats and stale words are harmless."""

from __future__ import annotations

from dataclasses import replace

import pytest

from distserve.core.effects import AbortSend, CloseTicket, OpenTicket, RunStep, SendStage
from distserve.core.events import (
    Abandon,
    AttemptFailed,
    CommitAsked,
    Committed,
    Draining,
    MembersChanged,
    MoveEnded,
    MoveQueried,
    PeerLost,
    ReserveAsked,
    ReserveGranted,
    StageCorrupt,
    StageFailed,
    StageSent,
    StageStored,
    Tick,
    TokensMade,
)
from distserve.core.types import Code, Role, Ticket, Token
from distserve.kv.ledger import BlockState
from distserve.sched.instance import InstanceState
from tests.sched.factory import (
    EPOCH,
    GATEWAY,
    D,
    Make,
    P,
    assert_all_free,
    find,
    kinds,
    member,
    request,
    reserve,
    run_to_idle,
    step_done,
    submit,
)


def ticket_of(asked: ReserveAsked, *, have: int = 0, nonce: int = 99) -> Ticket:
    source, destination = asked.source.ref, asked.destination
    return Ticket(
        asked.move_id, asked.request.id, asked.epoch, source, destination, "fp", nonce, have, asked.total_tokens, 10.0
    )


# ── a move at its source ─────────────────────────────────────────────────────────────────────────────────────────────


def handed_off(state: InstanceState, req_tokens: int = 20) -> tuple[ReserveAsked, list[str]]:
    """Prefill one request for D on P; returns what was asked and what followed its first token."""
    effects = state.handle(submit(request(prompt=req_tokens), D), 0.0)
    asked = find(effects, ReserveAsked)
    return asked, kinds(state.handle(step_done(effects), 0.5))


def test_room_is_asked_for_when_prefill_starts_and_the_first_token_goes_first(make: Make) -> None:
    state = make(P)
    asked, after = handed_off(state)
    assert (asked.total_tokens, asked.fingerprint, asked.destination) == (20, "fp", D.ref)
    assert after == ["TokensMade"]  # no ticket yet: the KV is held, nothing is sent
    effects = state.handle(ReserveGranted(ticket_of(asked, have=8)), 0.6)
    assert kinds(effects) == ["SendStage", "CommitAsked"]
    stage, commit = find(effects, SendStage), find(effects, CommitAsked)
    assert (stage.start, stage.end, stage.final) == (8, 20, True)
    assert (commit.nonce, commit.output, commit.recent) == (99, (50,), (Token(50),))
    assert state.residents.ledger.counts()[BlockState.IN_TRANSIT] >= 1
    state.handle(Committed(asked.move_id, D.ref, EPOCH + 1), 0.7)
    assert_all_free(state)


def test_chunks_leave_while_the_prompt_is_still_prefilled(make: Make) -> None:
    state = make(P, prefill_chunk=12)
    effects = state.handle(submit(request(prompt=30), D), 0.0)
    state.handle(ReserveGranted(ticket_of(find(effects, ReserveAsked))), 0.1)
    second = state.handle(step_done(effects), 0.2)
    assert (find(second, SendStage).start, find(second, SendStage).end) == (0, 8)  # whole blocks only
    third = state.handle(step_done(second), 0.3)
    assert (find(third, SendStage).start, find(third, SendStage).end) == (8, 24)
    last = state.handle(step_done(third), 0.4)
    assert kinds(last) == ["TokensMade", "SendStage", "CommitAsked"]
    assert (find(last, SendStage).start, find(last, SendStage).end, find(last, SendStage).final) == (24, 30, True)


def test_a_request_that_ends_with_its_first_token_never_moves(make: Make) -> None:
    state = make(P)
    effects = state.handle(submit(request(max_tokens=1), D), 0.0)
    asked = find(effects, ReserveAsked)
    state.handle(ReserveGranted(ticket_of(asked)), 0.1)
    assert kinds(state.handle(step_done(effects), 0.2)) == ["TokensMade", "AbortSend", "MoveEnded"]
    assert_all_free(state)


def test_a_failed_stage_is_tried_again_with_a_fresh_move_then_given_up(make: Make) -> None:
    state = make(P, move_attempts=2)
    asked, _ = handed_off(state)
    state.handle(ReserveGranted(ticket_of(asked)), 0.6)
    again = state.handle(StageFailed(asked.move_id, "checksum", True), 0.7)
    assert kinds(again) == ["AbortSend", "MoveEnded", "ReserveAsked"]
    fresh = find(again, ReserveAsked)
    assert fresh.move_id != asked.move_id
    state.handle(ReserveGranted(ticket_of(fresh)), 0.8)
    failed = find(state.handle(StageFailed(fresh.move_id, "checksum", True), 0.9), AttemptFailed)
    assert failed.retriable and failed.culprit == D.ref and "checksum" in failed.message
    assert_all_free(state)


def test_a_ticket_for_a_move_that_is_over_is_given_back(make: Make) -> None:
    state = make(P)
    asked, _ = handed_off(state)
    state.handle(Abandon(GATEWAY, "r", EPOCH), 0.6)
    assert kinds(state.handle(ReserveGranted(ticket_of(asked)), 0.7)) == ["MoveEnded"]
    assert_all_free(state)


def test_a_ticket_of_another_epoch_or_model_is_refused(make: Make) -> None:
    state = make(P)
    asked, _ = handed_off(state)
    forged = Ticket(asked.move_id, "r", EPOCH + 5, P.ref, D.ref, "fp", 1, 0, 20, 10.0)
    assert "AttemptFailed" in kinds(state.handle(ReserveGranted(forged), 0.6))
    assert_all_free(state)


def test_waiting_for_a_ticket_repeats_the_ask_and_ends_at_its_deadline(make: Make) -> None:
    state = make(P, reserve_repeat_s=2.0, reserve_timeout_s=5.0)
    handed_off(state)
    assert kinds(state.handle(Tick(), 2.5)) == ["ReserveAsked"]
    failed = state.handle(Tick(), 5.5)
    assert kinds(failed) == ["MoveEnded", "AttemptFailed"]
    assert "no room" in find(failed, AttemptFailed).message
    assert find(failed, AttemptFailed).code is Code.RESOURCE_EXHAUSTED  # full, not broken: worth another try later
    assert_all_free(state)


def test_an_unanswered_commit_is_repeated_then_left_to_the_gateway(make: Make) -> None:
    state = make(P, commit_repeat_s=1.0, commit_timeout_s=3.0)
    asked, _ = handed_off(state)
    state.handle(ReserveGranted(ticket_of(asked)), 0.6)
    assert kinds(state.handle(Tick(), 1.7)) == ["CommitAsked"]
    assert "AttemptFailed" not in kinds(state.handle(Tick(), 4.0))  # the bytes are still on their way
    state.handle(StageSent(asked.move_id, 0, 20, 100, 0.1), 5.0)
    assert "AttemptFailed" in kinds(state.handle(Tick(), 8.5))
    assert_all_free(state)


def test_a_lost_decode_instance_ends_its_moves_and_names_the_culprit(make: Make) -> None:
    state = make(P)
    handed_off(state)
    failed = find(state.handle(PeerLost(D.ref, "reset"), 0.6), AttemptFailed)
    assert failed.culprit == D.ref
    assert_all_free(state)


def test_a_life_that_left_the_cluster_counts_as_lost(make: Make) -> None:
    state = make(P)
    handed_off(state)
    assert "AttemptFailed" in kinds(state.handle(MembersChanged(2, (P,), (D.ref,)), 0.6))
    assert_all_free(state)


# ── a move at its destination ────────────────────────────────────────────────────────────────────────────────────────


def opened(state: InstanceState, req_tokens: int = 20, at: float = 0.0) -> Ticket:
    effects = state.handle(reserve(request(prompt=req_tokens), P, D), at)
    assert kinds(effects) == ["OpenTicket", "ReserveGranted"]
    ticket = find(effects, ReserveGranted).ticket
    assert find(effects, OpenTicket).ticket == ticket
    return ticket


def test_one_that_is_to_end_grants_no_move_and_finishes_those_it_granted(make: Make) -> None:
    state = make(D, max_sequences=1)
    ticket = opened(state)
    assert kinds(state.handle(reserve(request("w"), P, D, move="waiting"), 0.1)) == []
    (told,) = state.handle(Draining(), 0.2)
    ended = find([told], MoveEnded)
    assert (ended.move_id, ended.retriable) == ("waiting", False)
    assert "is shutting down" in ended.reason
    refused = find(state.handle(reserve(request("n"), P, D, move="new"), 0.3), MoveEnded)
    assert (refused.move_id, refused.retriable) == ("new", False)
    again = state.handle(reserve(request(prompt=20), P, D), 0.4)  # a repeat of the one that has its ticket
    assert find(again, ReserveGranted).ticket == ticket


def commit(ticket: Ticket, **changes: object) -> CommitAsked:
    fields: dict[str, object] = {
        "move_id": ticket.move_id,
        "source": P.ref,
        "nonce": ticket.nonce,
        "epoch": ticket.epoch,
        "total_tokens": ticket.total_tokens,
        "output": (50,),
        "recent": (Token(50),),
    }
    return CommitAsked(**{**fields, **changes})  # type: ignore[arg-type]


def stored(ticket: Ticket, start: int, end: int) -> StageStored:
    return StageStored(ticket.move_id, ticket.nonce, start, end, 100)


def test_owner_changes_once_when_all_bytes_and_the_commit_are_here(make: Make) -> None:
    state = make(D)
    ticket = opened(state)
    assert state.handle(stored(ticket, 0, 16), 0.1) == []
    assert state.handle(commit(ticket), 0.2) == []
    effects = state.handle(stored(ticket, 16, 20), 0.3)
    assert kinds(effects) == ["CloseTicket", "Committed", "TokensMade", "RunStep"]
    first = find(effects, TokensMade).outputs[0]
    assert (first.epoch, first.first_index, [t.id for t in first.tokens]) == (EPOCH + 1, 0, [50])
    item = find(effects, RunStep).plan.items[0]
    assert (item.start, item.token_ids, item.output_index) == (20, (50,), 1)
    assert kinds(state.handle(commit(ticket), 0.4)) == ["Committed"]  # repeated: same answer, nothing changes
    assert kinds(state.handle(MoveQueried(ticket.move_id, P.ref), 0.4)) == ["Committed"]
    assert state.handle(MoveEnded(ticket.move_id, P.ref, "late"), 0.5) == []  # an owner does not let go on that word
    run_to_idle(state, effects)
    assert_all_free(state)


def test_a_repeated_ask_gets_the_same_ticket(make: Make) -> None:
    state = make(D)
    ticket = opened(state)
    again = state.handle(reserve(request(), P, D), 0.1)
    assert kinds(again) == ["ReserveGranted"] and find(again, ReserveGranted).ticket == ticket


@pytest.mark.parametrize(
    "wrong", [{"nonce": 1}, {"epoch": EPOCH + 1}, {"total_tokens": 19}, {"source": D.ref}, {"output": (50, 51)}]
)
def test_a_commit_that_does_not_fit_ends_the_move(make: Make, wrong: dict[str, object]) -> None:
    state = make(D)
    ticket = opened(state)
    state.handle(stored(ticket, 0, 20), 0.1)
    assert "MoveEnded" in kinds(state.handle(commit(ticket, **wrong), 0.2))
    assert_all_free(state)


def test_corrupt_bytes_close_the_ticket_and_free_the_blocks(make: Make) -> None:
    state = make(D)
    ticket = opened(state)
    effects = state.handle(StageCorrupt(ticket.move_id, ticket.nonce, "checksum"), 0.1)
    assert kinds(effects) == ["CloseTicket", "MoveEnded"]
    assert_all_free(state)
    assert kinds(state.handle(commit(ticket), 0.2)) == ["MoveEnded"]


def test_bytes_under_another_nonce_count_for_nothing(make: Make) -> None:
    state = make(D)
    ticket = opened(state)
    assert state.handle(StageStored(ticket.move_id, ticket.nonce + 1, 0, 20, 1), 0.1) == []
    assert state.handle(commit(ticket), 0.2) == []
    assert not state.residents.sequences
    state.handle(MoveEnded(ticket.move_id, P.ref, "end"), 0.3)


def test_a_ticket_without_progress_expires(make: Make) -> None:
    state = make(D, lease_s=10.0)
    ticket = opened(state)
    state.handle(stored(ticket, 0, 8), 6.0)
    assert state.handle(Tick(), 10.5) == []
    assert kinds(state.handle(Tick(), 16.5)) == ["CloseTicket", "MoveEnded"]
    assert_all_free(state)


def test_without_room_a_move_waits_in_line_and_is_granted_when_room_comes(make: Make) -> None:
    state = make(member("d", Role.DECODE, blocks=4), prefix_cache=False)
    big = reserve(request("a", 28, 2), P, D, move="a")
    assert kinds(state.handle(big, 0.0)) == ["OpenTicket", "ReserveGranted"]
    assert state.handle(reserve(request("b", 20, 2), P, D, move="b"), 0.1) == []
    assert state.handle(reserve(request("c", 4, 2), P, D, move="c"), 0.2) == []  # small, but not first in line
    assert kinds(state.handle(MoveEnded("a", P.ref, "end"), 0.3)) == [
        "CloseTicket",
        "MoveEnded",
        "OpenTicket",
        "ReserveGranted",
        "OpenTicket",
        "ReserveGranted",
    ]
    for move in ("b", "c"):
        state.handle(MoveEnded(move, P.ref, "end"), 0.4)
    assert_all_free(state)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"fingerprint": "other"}, "serves model other"),
        ({"destination": P.ref}, "but this is"),
        ({"total_tokens": 21}, "do not fit"),
    ],
)
def test_moves_that_can_never_be_are_refused_with_a_sentence(
    make: Make, changes: dict[str, object], sentence: str
) -> None:
    ended = find(make(D).handle(replace(reserve(request(), P, D), **changes), 0.0), MoveEnded)  # type: ignore[arg-type]
    assert not ended.retriable and sentence in ended.reason


def test_a_prefill_instance_grants_nothing(make: Make) -> None:
    assert "does not decode" in find(make(P).handle(reserve(request(), D, P), 0.0), MoveEnded).reason


def test_what_the_destination_has_cached_is_not_asked_for(make: Make) -> None:
    state = make(D)
    ticket = opened(state)
    state.handle(stored(ticket, 0, 20), 0.1)
    run_to_idle(state, state.handle(commit(ticket), 0.2))
    effects = state.handle(reserve(request("r2"), P, D, move="m2"), 1.0)
    assert find(effects, ReserveGranted).ticket.have_tokens == 16
    state.handle(MoveEnded("m2", P.ref, "end"), 1.1)


def test_a_new_attempt_replaces_the_move_of_the_old_one(make: Make) -> None:
    state = make(D)
    opened(state)
    effects = state.handle(reserve(request(), P, D, move="mv2", epoch=EPOCH * 2), 0.1)
    assert kinds(effects) == ["CloseTicket", "MoveEnded", "OpenTicket", "ReserveGranted"]
    state.handle(Abandon(GATEWAY, "r", EPOCH * 2), 0.2)
    assert_all_free(state)


def test_fences_come_before_blocks_are_used_again(make: Make) -> None:
    state = make(member("d", Role.DECODE, blocks=4), prefix_cache=False)
    state.handle(reserve(request("a", 28, 2), P, D, move="a"), 0.0)
    state.handle(reserve(request("b", 28, 2), P, D, move="b"), 0.1)
    effects = state.handle(Abandon(GATEWAY, "a", EPOCH), 0.2)
    places = [type(e) for e in effects]
    assert places.index(CloseTicket) < places.index(OpenTicket)
    state.handle(MoveEnded("b", P.ref, "end"), 0.3)


def test_an_abandoned_source_stops_reading_before_it_frees(make: Make) -> None:
    state = make(P)
    asked, _ = handed_off(state)
    state.handle(ReserveGranted(ticket_of(asked)), 0.6)
    effects = state.handle(Abandon(GATEWAY, "r", EPOCH), 0.7)
    assert next(type(e) for e in effects) is AbortSend
    assert kinds(effects) == ["AbortSend", "MoveEnded", "Abandoned"]
    assert_all_free(state)
