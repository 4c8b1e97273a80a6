"""The controller's machine: membership, leases, dispatch, admission."""

from __future__ import annotations

from dataclasses import replace

from distserve.core.events import (
    DispatchAsked,
    Dispatched,
    DispatchRefused,
    GatewayJoined,
    GatewayLeft,
    InstanceLeft,
    JoinAsked,
    Joined,
    JoinRefused,
    MembersChanged,
    PrefillFinished,
    Reported,
    RequestEnded,
    Tick,
)
from distserve.core.types import Code, InstanceRef, Load, Member, Role
from distserve.sched.cluster import ClusterState
from distserve.sched.config import ClusterConfig
from tests.sched.factory import EPOCH, GATEWAY, find, kinds, member

FREE = Load(kv_free=32, kv_total=32)


def cluster(*members: Member, **config: float) -> ClusterState:
    state = ClusterState(ClusterConfig(**config))  # type: ignore[arg-type]
    state.handle(GatewayJoined(GATEWAY), 0.0)
    for one in members:
        state.handle(Joined(one, FREE), 0.0)
    return state


def ask(state: ClusterState, id: str = "r", prompt: int = 20, total: int = 30, **more: object) -> DispatchAsked:
    return DispatchAsked(GATEWAY, id, more.pop("epoch", EPOCH), "m", prompt, total, **more)  # type: ignore[arg-type]


def sent_to(state: ClusterState, id: str = "r", **more: object) -> tuple[str, str]:
    answer = find(state.handle(ask(state, id, **more), 1.0), Dispatched)  # type: ignore[arg-type]
    state.check()
    return answer.prefill.ref.id, answer.decode.ref.id


def test_prompts_go_to_the_shortest_predicted_queue_and_then_the_most_free_kv() -> None:
    state = cluster(*(member(p, Role.PREFILL) for p in ("p0", "p1")), *(member(d, Role.DECODE) for d in ("d0", "d1")))
    assert sent_to(state, "a", prompt=100, total=110) == ("p0", "d0")
    assert sent_to(state, "b", prompt=10, total=20) == ("p1", "d1")
    assert sent_to(state, "c", prompt=10, total=20) == ("p1", "d1")
    state.handle(PrefillFinished(GATEWAY, "a", EPOCH), 2.0)
    assert sent_to(state, "d", prompt=10, total=20) == ("p0", "d1")


def test_a_finished_request_counts_no_more() -> None:
    state = cluster(member("p", Role.PREFILL), member("d", Role.DECODE))
    sent_to(state, "a")
    assert state.open_requests == 1
    state.handle(RequestEnded(GATEWAY, "a"), 2.0)
    assert state.open_requests == 0
    assert not state.members["p"].prefilling and not state.members["d"].decoding


def test_reported_queues_count_too() -> None:
    state = cluster(member("p0", Role.PREFILL), member("p1", Role.PREFILL), member("d", Role.DECODE))
    state.handle(Reported(InstanceRef("p0", 1), Load(queued_tokens=500, kv_free=32, kv_total=32)), 1.0)
    assert sent_to(state)[0] == "p1"


def test_a_cached_prefix_draws_the_prompt_to_it() -> None:
    state = cluster(member("p0", Role.PREFILL), member("p1", Role.PREFILL), member("d", Role.DECODE))
    hashes = (11, 12, 13)
    first = sent_to(state, "a", prompt=200, total=210, prefix_hashes=hashes)
    state.handle(RequestEnded(GATEWAY, "a"), 2.0)
    sent_to(state, "b", prompt=40, total=50)  # gives the first a short queue, shorter than the prefix it holds
    assert sent_to(state, "c", prompt=200, total=210, prefix_hashes=hashes) == first


def test_a_mixed_instance_decodes_what_it_prefilled() -> None:
    state = cluster(member("m0", Role.MIXED), member("m1", Role.MIXED))
    assert [sent_to(state, id) for id in ("a", "b")] == [("m0", "m0"), ("m1", "m1")]


def test_small_prompts_may_be_prefilled_where_they_decode() -> None:
    state = cluster(member("p", Role.PREFILL), member("d", Role.DECODE), local_prefill_tokens=16)
    assert sent_to(state, "small", prompt=16) == ("d", "d")
    assert sent_to(state, "large", prompt=17) == ("p", "d")


def test_lives_to_avoid_are_used_only_when_nobody_else_is_there() -> None:
    state = cluster(member("p", Role.PREFILL), member("d0", Role.DECODE), member("d1", Role.DECODE))
    bad = InstanceRef("d0", 1)
    assert sent_to(state, "a", avoid=(bad,)) == ("p", "d1")
    state.handle(InstanceLeft(InstanceRef("d1", 1)), 2.0)
    assert sent_to(state, "a", avoid=(bad,)) == ("p", "d0")


def test_refusals_say_what_is_missing() -> None:
    state = cluster(member("p", Role.PREFILL))
    refused = find(state.handle(ask(state), 1.0), DispatchRefused)
    assert (refused.code, refused.retry_after_s > 0) == (Code.UNAVAILABLE, True)
    assert "decode" in refused.message
    state = cluster(member("p", Role.PREFILL), member("d", Role.DECODE))
    refused = find(state.handle(ask(state, total=1000), 1.0), DispatchRefused)
    assert refused.code is Code.INVALID_ARGUMENT
    assert "1000" in refused.message and "256" in refused.message


def test_overload_refuses_new_requests_but_never_resumed_ones() -> None:
    state = cluster(member("p", Role.PREFILL), member("d", Role.DECODE), max_queued_tokens=30)
    sent_to(state, "a", prompt=31, total=40)
    refused = find(state.handle(ask(state, "b"), 1.0), DispatchRefused)
    assert (refused.code, refused.retry_after_s > 0) == (Code.RESOURCE_EXHAUSTED, True)
    assert sent_to(state, "b", epoch=EPOCH * 2) == ("p", "d")


def test_the_open_request_limit() -> None:
    state = cluster(member("m", Role.MIXED), max_open_requests=1)
    sent_to(state, "a")
    assert find(state.handle(ask(state, "b"), 1.0), DispatchRefused).code is Code.RESOURCE_EXHAUSTED


def test_silence_past_the_lease_is_death_and_everybody_hears_of_it() -> None:
    state = cluster(member("p", Role.PREFILL), member("d", Role.DECODE), lease_s=10.0)
    state.handle(Reported(InstanceRef("d", 1), FREE), 5.0)
    assert state.next_deadline() == 10.0
    effects = state.handle(Tick(), 10.0)
    assert kinds(effects) == ["MembersChanged", "MembersChanged"]  # the gateway and the survivor
    changed = effects[0].event  # type: ignore[union-attr]
    assert isinstance(changed, MembersChanged)
    assert ([m.ref.id for m in changed.members], changed.lost) == (["d"], (InstanceRef("p", 1),))


def test_a_controller_that_did_not_run_blames_nobody_for_silence() -> None:
    state = cluster(member("p", Role.PREFILL), member("d", Role.DECODE), lease_s=10.0)
    assert state.handle(Tick(), 60.0) == []  # stopped for 50 s: what was said meanwhile is still to be read
    state.handle(Reported(InstanceRef("d", 1), FREE), 60.1)
    assert state.next_deadline() == 65.0, "half a lease to be heard in"
    (changed,) = {e.event for e in state.handle(Tick(), 65.0)}  # type: ignore[union-attr]
    assert isinstance(changed, MembersChanged)
    assert changed.lost == (InstanceRef("p", 1),)


def test_a_life_taken_for_dead_is_asked_to_join_again_and_is_no_longer_lost() -> None:
    state = cluster(member("p", Role.PREFILL), lease_s=10.0)
    state.handle(Tick(), 10.0)
    assert kinds(state.handle(Reported(InstanceRef("p", 1), FREE), 11.0)) == ["JoinAsked"]
    changed = [e.event for e in state.handle(Joined(member("p", Role.PREFILL), FREE), 12.0)]  # type: ignore[union-attr]
    assert not any(isinstance(e, JoinAsked) for e in changed)
    assert [e.lost for e in changed if isinstance(e, MembersChanged)] == [(), ()]


def test_a_new_life_replaces_the_old_one() -> None:
    state = cluster(member("p", Role.PREFILL))
    effects = state.handle(Joined(member("p", Role.PREFILL, incarnation=2), FREE), 1.0)
    changed = [e.event for e in effects if kinds([e]) == ["MembersChanged"]]  # type: ignore[union-attr]
    assert changed[0].lost == (InstanceRef("p", 1),)  # type: ignore[union-attr]
    assert state.handle(Reported(InstanceRef("p", 1), FREE), 2.0) != []  # the old life is nobody now


def test_two_live_processes_under_one_id_do_not_take_turns() -> None:
    state = cluster(member("p", Role.PREFILL, incarnation=2))
    refused = find(state.handle(Joined(member("p", Role.PREFILL, incarnation=1), FREE), 1.0), JoinRefused)
    assert "p#1" in refused.reason and "p#2" in refused.reason
    assert state.members["p"].member.ref.incarnation == 2


def test_other_weights_under_the_same_name_are_refused_naming_both_sides() -> None:
    state = cluster(member("p", Role.PREFILL))
    refused = find(state.handle(Joined(member("d", Role.DECODE, fingerprint="other"), FREE), 1.0), JoinRefused)
    assert all(word in refused.reason for word in ("d#1", "other", "p#1", "fp"))


def test_kv_of_another_dtype_is_refused_naming_both_sides() -> None:
    state = cluster(member("p", Role.PREFILL))
    other = member("d", Role.DECODE)
    other = replace(other, spec=replace(other.spec, kv_dtype="fp8_e4m3"))
    refused = find(state.handle(Joined(other, FREE), 1.0), JoinRefused)
    assert all(word in refused.reason for word in ("d#1", "fp8_e4m3", "p#1", "float32", "--kv-cache-dtype"))


def test_another_wire_version_is_refused() -> None:
    state = ClusterState(ClusterConfig(version="7"))
    assert "'7'" in find(state.handle(Joined(member("p", Role.PREFILL), FREE), 1.0), JoinRefused).reason


def test_a_lost_gateway_leaves_no_request_counted() -> None:
    state = cluster(member("m", Role.MIXED))
    sent_to(state, "a")
    state.handle(GatewayLeft(GATEWAY), 2.0)
    assert state.open_requests == 0
    state.check()
