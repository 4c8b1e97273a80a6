"""A gateway's machine: indices, epochs, re-dispatch, bypass, deadlines, cancellation."""

from __future__ import annotations

from distserve.core.effects import CONTROLLER, Complete, Deliver, Fail, Send
from distserve.core.events import (
    Abandon,
    Abandoned,
    AttemptFailed,
    ClientCancelled,
    ControllerFound,
    ControllerLost,
    DispatchAsked,
    Dispatched,
    DispatchRefused,
    InstanceFound,
    InstanceLost,
    MembersChanged,
    SequenceOutput,
    Submit,
    Submitted,
    Tick,
    TokensMade,
)
from distserve.core.types import Code, FinishReason, InstanceRef, Member, Role, Timings, Token, first_epoch
from distserve.sched.config import GatewayConfig
from distserve.sched.gateway import GatewayState
from tests.sched.factory import GATEWAY, find, kinds, member, request

P, P2 = member("p", Role.PREFILL), member("p2", Role.PREFILL)
D, D2 = member("d", Role.DECODE), member("d2", Role.DECODE)
E1, E2 = first_epoch(1), first_epoch(2)


def gateway(*members: Member, controller: bool = True, **config: float) -> GatewayState:
    state = GatewayState(GATEWAY, GatewayConfig(**config))  # type: ignore[arg-type]
    if controller:
        state.handle(ControllerFound(), 0.0)
    state.handle(MembersChanged(1, members), 0.0)
    for one in members:
        state.handle(InstanceFound(one.ref), 0.0)
    return state


def started(*members: Member, **config: float) -> GatewayState:
    """One request, ``r``, submitted to P with D as its decode instance."""
    state = gateway(*(members or (P, D)), **config)
    assert kinds(state.handle(Submitted(request()), 0.0)) == ["DispatchAsked"]
    submit = find(state.handle(Dispatched("r", E1, P.endpoint, D.endpoint), 0.1), Submit)
    assert (submit.epoch, submit.delivered, submit.decode) == (E1, (), D.endpoint)
    return state


def made(
    first: int, *tokens: int, epoch: int = E1, source: Member = P, finish: FinishReason | None = None
) -> TokensMade:
    timings = Timings(queue_s=0.1, prefill_s=0.2) if epoch == E1 else None
    output = SequenceOutput("r", epoch, first, tuple(Token(t) for t in tokens), finish, timings)
    return TokensMade(source.ref, (output,))


def delivered(effects: list[object]) -> list[tuple[int, list[int]]]:
    return [(e.first_index, [t.id for t in e.tokens]) for e in effects if isinstance(e, Deliver)]


def test_tokens_come_in_order_once_whatever_is_repeated() -> None:
    state = started()
    assert delivered(state.handle(made(0, 50), 0.5)) == [(0, [50])]
    assert delivered(state.handle(made(0, 50), 0.6)) == []
    assert delivered(state.handle(made(0, 50, 51, epoch=E1 + 1, source=D), 0.7)) == [(1, [51])]
    assert delivered(state.handle(made(1, 51, epoch=E1, source=P), 0.8)) == []  # an older epoch
    effects = state.handle(made(2, 52, epoch=E1 + 1, source=D, finish=FinishReason.STOP), 0.9)
    account = find(effects, Complete).account
    assert (account.prefill_instance, account.decode_instance) == ("p#1", "d#1")
    assert account.output_tokens == 3
    assert not state.streams


def test_a_new_owner_may_be_heard_before_the_last_word_of_the_old() -> None:
    state = started()
    assert delivered(state.handle(made(0, 50, epoch=E1 + 1, source=D), 0.5)) == [(0, [50])]
    assert state.handle(made(0, 50), 0.6) == []  # overtaken, not stale: nobody is told to let go
    account = find(state.handle(made(1, 51, epoch=E1 + 1, source=D, finish=FinishReason.STOP), 0.7), Complete).account
    assert (account.prefill_instance, account.decode_instance) == ("p#1", "d#1")
    assert (account.timings.queue_s, account.timings.prefill_s) == (0.1, 0.2)


def test_the_parts_sum_to_ttft() -> None:
    state = started()
    state.handle(made(0, 50), 0.5)
    account = find(state.handle(made(1, 51, finish=FinishReason.LENGTH), 0.6), Complete).account
    parts = account.timings
    assert abs(parts.gateway_s + parts.dispatch_s + parts.queue_s + parts.prefill_s - account.ttft_s) < 1e-9
    assert abs(account.ttft_s - 0.5) < 1e-9


def test_a_lost_owner_means_a_new_attempt_that_resumes_and_every_survivor_is_told() -> None:
    state = started()
    state.handle(made(0, 50), 0.5)
    state.handle(made(1, 51, epoch=E1 + 1, source=D), 0.6)
    effects = state.handle(InstanceLost(D.ref, "killed"), 0.7)
    assert kinds(effects) == ["Abandon", "DispatchAsked"]
    assert effects[0].to == P.ref  # type: ignore[union-attr]
    assert find(effects, Abandon).epoch == E2 - 1
    asked = find(effects, DispatchAsked)
    assert (asked.epoch, asked.prompt_tokens, asked.avoid) == (E2, 22, (D.ref,))
    state.handle(InstanceFound(D2.ref), 0.75)
    submit = find(state.handle(Dispatched("r", E2, P.endpoint, D2.endpoint), 0.8), Submit)
    assert submit.delivered == (50, 51)
    assert delivered(state.handle(made(2, 52, epoch=E2, source=P), 0.9)) == [(2, [52])]


def test_a_lost_prefill_instance_matters_only_until_the_hand_off() -> None:
    state = started()
    state.handle(made(0, 50), 0.5)
    state.handle(made(0, 50, 51, epoch=E1 + 1, source=D), 0.6)
    assert state.handle(InstanceLost(P.ref, "killed"), 0.7) == []
    assert state.streams["r"].owner == D.ref


def test_a_lost_decode_instance_before_the_hand_off_is_not_waited_for() -> None:
    state = started()
    assert "DispatchAsked" in kinds(state.handle(InstanceLost(D.ref, "killed"), 0.2))


def test_stale_senders_are_told_to_let_go() -> None:
    state = started()
    state.handle(InstanceLost(P.ref, "reset"), 0.3)
    late = state.handle(made(0, 50, epoch=E1 + 1, source=D), 0.4)
    assert delivered(late) == []
    unknown = TokensMade(D.ref, (SequenceOutput("ghost", E1, 0, (Token(1),)),))
    told = find(state.handle(unknown, 0.5), Abandon)
    assert (told.request_id, told.epoch) == ("ghost", E1)


def test_lost_tokens_are_made_again_never_skipped() -> None:
    state = started()
    effects = state.handle(made(1, 51), 0.5)
    assert delivered(effects) == []
    assert kinds(effects) == ["Abandon", "Abandon", "DispatchAsked"]


def test_cancel_tells_every_holder_until_they_acknowledge() -> None:
    state = started(abandon_repeat_s=1.0)
    effects = state.handle(ClientCancelled("r"), 0.5)
    assert kinds(effects) == ["Abandon", "Abandon", "RequestEnded", "Complete"]
    assert find(effects, Complete).finish is FinishReason.CANCELLED
    state.handle(Abandoned(P.ref, "r", E2 - 1), 0.6)
    again = state.handle(Tick(), 1.6)
    assert [(e.to, type(e.event)) for e in again if isinstance(e, Send)] == [(D.ref, Abandon)]
    state.handle(Abandoned(D.ref, "r", E2 - 1), 1.7)
    assert state.next_deadline() is None


def test_a_stop_string_ends_the_stream_well() -> None:
    state = started()
    assert find(state.handle(ClientCancelled("r", FinishReason.STOP), 0.5), Complete).finish is FinishReason.STOP


def test_the_deadline_fails_with_what_it_waited_for() -> None:
    state = started()
    assert state.next_deadline() == 100.0
    failed = find(state.handle(Tick(), 100.0), Fail)
    assert failed.code is Code.DEADLINE_EXCEEDED and "prefill" in failed.message


def test_a_refusal_for_overload_reaches_the_client_with_when_to_try_again() -> None:
    state = gateway(P, D)
    state.handle(Submitted(request()), 0.0)
    refused = DispatchRefused("r", E1, Code.RESOURCE_EXHAUSTED, "full", 2.0)
    failed = find(state.handle(refused, 0.1), Fail)
    assert (failed.code, failed.retry_after_s) == (Code.RESOURCE_EXHAUSTED, 2.0)


def test_without_an_instance_a_request_waits_its_patience_and_wakes_when_one_comes() -> None:
    state = gateway(P, patience_s=10.0)
    state.handle(Submitted(request()), 0.0)
    assert state.handle(DispatchRefused("r", E1, Code.UNAVAILABLE, "no decode", 1.0), 0.1) == []
    assert kinds(state.handle(MembersChanged(2, (P, D)), 0.5)) == ["DispatchAsked"]
    state.handle(DispatchRefused("r", E1, Code.UNAVAILABLE, "no decode", 1.0), 0.6)
    state.handle(Tick(), 9.9)
    failed = find(state.handle(DispatchRefused("r", E1, Code.UNAVAILABLE, "no decode", 1.0), 10.1), Fail)
    assert (failed.code, failed.message) == (Code.UNAVAILABLE, "no decode")


def test_a_place_whose_connection_is_not_up_is_waited_for() -> None:
    state = gateway(P)
    state.handle(Submitted(request()), 0.0)
    assert state.handle(Dispatched("r", E1, P.endpoint, D.endpoint), 0.1) == []
    assert kinds(state.handle(InstanceFound(D.ref), 0.2)) == ["DispatchAsked"]


def test_bypass_serves_while_the_controller_is_away() -> None:
    state = gateway(P, D, controller=False)
    effects = state.handle(Submitted(request()), 0.0)
    assert [(e.to, type(e.event)) for e in effects if isinstance(e, Send)] == [(P.ref, Submit)]
    assert CONTROLLER not in [
        e.to for e in state.handle(made(0, 50, finish=FinishReason.STOP), 1.0) if hasattr(e, "to")
    ]


def test_a_silent_controller_is_bypassed_and_its_late_answer_ignored() -> None:
    state = gateway(P, D, dispatch_timeout_s=2.0)
    state.handle(Submitted(request()), 0.0)
    assert kinds(state.handle(Tick(), 2.0)) == ["Submit"]
    assert state.handle(Dispatched("r", E1, P2.endpoint, D2.endpoint), 2.1) == []


def test_losing_the_controller_sends_what_waits_for_it_by_bypass() -> None:
    state = gateway(P, D)
    state.handle(Submitted(request()), 0.0)
    assert kinds(state.handle(ControllerLost(), 0.5)) == ["Submit"]


def test_a_new_controller_that_knows_nobody_yet_harms_nothing() -> None:
    state = started()
    state.handle(ControllerLost(), 0.2)
    state.handle(ControllerFound(), 0.3)
    assert state.handle(MembersChanged(1, ()), 0.4) == []
    assert state.streams["r"].running


def test_a_life_the_controller_gave_up_loses_its_requests_and_is_told() -> None:
    state = started()
    effects = state.handle(MembersChanged(2, (D,), (P.ref,)), 0.5)
    assert [e.to for e in effects if isinstance(e, Send) and isinstance(e.event, Abandon)] == [P.ref, D.ref]
    assert "DispatchAsked" in kinds(effects)


def test_failed_attempts_are_retried_elsewhere_a_bounded_number_of_times() -> None:
    state = started(max_attempts=3, retry_pause_s=0.0)
    now = 1.0
    for attempt in (1, 2):
        failed = AttemptFailed(P.ref, "r", first_epoch(attempt), Code.UNAVAILABLE, "no room", True, D.ref)
        effects = state.handle(failed, now)
        if "DispatchAsked" not in kinds(effects):
            effects = state.handle(Tick(), now)
        assert find(effects, DispatchAsked).avoid == (D.ref,)
        state.handle(Dispatched("r", first_epoch(attempt + 1), P.endpoint, D.endpoint), now)
        now += 1.0
    failed = AttemptFailed(P.ref, "r", first_epoch(3), Code.UNAVAILABLE, "no room", True, D.ref)
    assert "gave up after 3 attempts: no room" in find(state.handle(failed, now), Fail).message


def test_an_attempt_that_failed_for_good_is_told_as_it_is() -> None:
    state = started()
    failed = AttemptFailed(P.ref, "r", E1, Code.INVALID_ARGUMENT, "too long", False)
    assert find(state.handle(failed, 0.5), Fail).message == "too long"


def test_a_failure_of_an_older_epoch_than_the_owner_is_ignored() -> None:
    state = started()
    state.handle(made(0, 50, epoch=E1 + 1, source=D), 0.5)
    assert state.handle(AttemptFailed(P.ref, "r", E1, Code.UNAVAILABLE, "no answer", True, D.ref), 0.6) == []


def test_the_stream_limit() -> None:
    state = gateway(P, D, max_streams=1)
    state.handle(Submitted(request("a")), 0.0)
    failed = find(state.handle(Submitted(request("b")), 0.1), Fail)
    assert failed.code is Code.RESOURCE_EXHAUSTED and failed.retry_after_s > 0


def test_bypass_spreads_by_its_own_count() -> None:
    state = gateway(P, P2, D, D2, controller=False)
    places = []
    for id in ("a", "b"):
        effects = state.handle(Submitted(request(id)), 0.0)
        places.append((effects[0].to, find(effects, Submit).decode.ref))  # type: ignore[union-attr]
    assert places == [(P.ref, D.ref), (P2.ref, D2.ref)]


def test_bypass_avoids_what_is_not_connected() -> None:
    state = gateway(P, P2, D, controller=False)
    state.handle(InstanceLost(P.ref, "gone"), 0.0)
    effects = state.handle(Submitted(request()), 0.1)
    assert effects[0].to == InstanceRef("p2", 1)  # type: ignore[union-attr]
