"""Overflow prefill: while prefill queues are long, a prompt is read where it will be decoded, and nobody starves."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Sequence

import pytest

from distserve.core.effects import Effect, RunStep
from distserve.core.events import (
    DispatchAsked,
    Dispatched,
    GatewayJoined,
    InstanceLeft,
    Joined,
    PrefillFinished,
    Reported,
    RequestEnded,
)
from distserve.core.types import InstanceRef, Load, Member, Placement, Role, StepPlan
from distserve.sched.cluster import ClusterState
from distserve.sched.config import ClusterConfig
from distserve.sched.dispatch import DEPTH
from distserve.sched.instance import InstanceState
from tests.sched.factory import EPOCH, GATEWAY, Make, P, find, kinds, member, request, reserve, step_done, submit

MARGIN = 40
FREE = Load(kv_free=512, kv_total=512)
HAND_OFF = ("p", "d", Placement.DISAGGREGATED)
HERE = ("d", "d", Placement.OVERFLOW)
D = member("d", Role.DECODE, blocks=512)


def cluster(*members: Member, margin: int = MARGIN, **config: int) -> ClusterState:
    state = ClusterState(ClusterConfig(overflow_prefill_tokens=margin, **config))
    state.handle(GatewayJoined(GATEWAY), 0.0)
    for one in members:
        state.handle(Joined(one, FREE), 0.0)
    return state


def pool(prefills: Sequence[str] = ("p",), decodes: Sequence[str] = ("d",), **config: int) -> ClusterState:
    made = [member(p, Role.PREFILL, blocks=512) for p in prefills]
    return cluster(*made, *(member(d, Role.DECODE, blocks=512) for d in decodes), **config)


def sent(state: ClusterState, id: str, prompt: int = 20, **more: object) -> tuple[str, str, Placement | None]:
    asked = DispatchAsked(GATEWAY, id, EPOCH, "m", prompt, prompt + 5, **more)  # type: ignore[arg-type]
    answer = find(state.handle(asked, 1.0), Dispatched)
    state.check()
    return answer.prefill.ref.id, answer.decode.ref.id, answer.placement


def reports(state: ClusterState, id: str, queued: int) -> None:
    state.handle(Reported(InstanceRef(id, 1), Load(queued_tokens=queued, kv_free=512, kv_total=512)), 1.0)


# ── the rule ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_burst_spills_over_prompt_by_prompt_and_the_decode_instance_takes_no_more_than_its_share() -> None:
    state = pool()
    ways = [sent(state, f"r{i}") for i in range(20)]
    assert ways[:3] == [HAND_OFF] * 3, "before each of them at most the margin is owed"
    assert ways[3:17] == [HERE, HAND_OFF] * 7, "in turn, so that one side stays a margin ahead of the other"
    assert ways[17:] == [HAND_OFF] * 3, "140 are owed here, beyond three margins"


def test_it_ends_where_the_queue_does() -> None:
    state = pool()
    for i in range(4):
        sent(state, f"r{i}")
    state.handle(PrefillFinished(GATEWAY, "r0", EPOCH), 2.0)
    assert sent(state, "after") == HAND_OFF, "40 are owed: the margin, not more"
    assert state.members["d"].owed == 20
    state.handle(PrefillFinished(GATEWAY, "r3", EPOCH), 2.0)
    assert state.members["d"].owed == 0, "what overflowed is owed by who reads it, until it is read"
    assert state.members["d"].held == 5 * 25


def test_off_by_default() -> None:
    state = pool(margin=ClusterConfig().overflow_prefill_tokens)
    assert [sent(state, f"r{i}", 200) for i in range(20)] == [HAND_OFF] * 20


def test_a_prompt_that_would_finish_little_earlier_is_handed_off() -> None:
    """64 of its tokens are cached at the prefill instance: it must owe 64 and the margin more than the other."""
    for more, way in ((-1, HAND_OFF), (0, HAND_OFF), (1, HERE)):
        state = pool(margin=10)
        state.members["p"].remember([7], 10)
        reports(state, "p", 64 + 5 + 10 + more)
        reports(state, "d", 5)
        assert sent(state, "r", 100, prefix_hashes=(7, 8)) == way


def test_a_prefix_cached_at_the_decode_instance_counts_as_one_at_the_prefill_instance() -> None:
    state = pool(decodes=("d0", "d1"))
    before = sent(state, "first", 128, prefix_hashes=(1, 2))
    assert before == ("p", "d0", Placement.DISAGGREGATED)
    state.handle(RequestEnded(GATEWAY, "first"), 2.0)
    reports(state, "p", 150)
    reports(state, "d0", 30)  # d1 owes nothing, but would have to read the whole prompt
    assert sent(state, "again", 128, prefix_hashes=(1, 2)) == ("d0", "d0", Placement.OVERFLOW)
    assert sent(state, "other", 128, prefix_hashes=(3, 4)) == ("d1", "d1", Placement.OVERFLOW)


def test_of_many_decode_instances_the_shortest_queue_reads_and_the_first_wins_a_tie() -> None:
    state = pool(decodes=("d0", "d1", "d2"))
    reports(state, "p", 500)
    reports(state, "d0", 10)
    assert [sent(state, f"r{i}")[0] for i in range(3)] == ["d1", "d2", "d0"]
    assert sent(state, "tie")[0] == "d0", "20 are owed by each"


def test_of_many_prefill_instances_all_must_be_behind() -> None:
    state = pool(prefills=("p0", "p1"))
    reports(state, "p0", 500)
    assert [sent(state, f"r{i}")[0] for i in range(4)] == ["p1", "p1", "p1", "d"]


def test_a_mixed_instance_that_is_behind_overflows_too_but_never_to_itself() -> None:
    state = cluster(member("m", Role.MIXED, blocks=512))
    assert [sent(state, f"r{i}") for i in range(5)] == [("m", "m", Placement.COLOCATED)] * 5
    state.handle(Joined(D, FREE), 1.0)
    assert sent(state, "more") == HERE


def test_who_left_or_is_to_be_avoided_or_has_no_room_reads_nothing() -> None:
    state = pool(decodes=("d0", "d1"))
    state.handle(Joined(member("small", Role.DECODE, blocks=2), Load(kv_free=2, kv_total=2)), 0.0)
    reports(state, "p", 500)
    assert sent(state, "a", avoid=(InstanceRef("d0", 1),))[0] == "d1"
    state.handle(InstanceLeft(InstanceRef("d1", 1), "drained"), 2.0)
    reports(state, "d0", DEPTH * MARGIN + 1)
    assert sent(state, "b") == ("p", "d0", Placement.DISAGGREGATED), "d0 owes too much, small is too small"


def test_short_prompts_are_local_whether_or_not_anything_overflows() -> None:
    state = pool(local_prefill_tokens=10)
    assert sent(state, "short", 10) == ("d", "d", Placement.LOCAL)
    reports(state, "p", 500)
    assert sent(state, "short too", 10) == HERE
    assert sent(state, "long", 200) == HERE
    assert sent(state, "short still", 10) == ("d", "d", Placement.LOCAL)


@pytest.mark.parametrize("seed", range(20))
def test_bounds_hold_whatever_comes(seed: int) -> None:
    """Overflow only to a decode instance that owes a margin less, and at most some margins; none owes more than these
    and one prompt; and whoever is handed off found none such."""
    rng = random.Random(seed)
    margin = rng.choice([1, 50, 150])
    state = pool(
        [f"p{i}" for i in range(rng.randint(1, 3))], [f"d{i}" for i in range(rng.randint(1, 3))], margin=margin
    )
    opened: list[str] = []
    seen = set()
    for n in range(300):
        if opened and rng.random() < 0.4:
            done = opened.pop(rng.randrange(len(opened)))
            state.handle(rng.choice([PrefillFinished(GATEWAY, done, EPOCH), RequestEnded(GATEWAY, done)]), 1.0)
            continue
        owed = {name: s.owed for name, s in state.members.items()}
        prefill, decode, placement = sent(state, f"r{n}", rng.randint(1, 200))
        opened.append(f"r{n}")
        seen.add(placement)
        shortest = min(tokens for name, tokens in owed.items() if name[0] == "p")
        least = min(tokens for name, tokens in owed.items() if name[0] == "d")
        if placement is Placement.OVERFLOW:
            assert prefill == decode and owed[decode] == least <= DEPTH * margin and shortest - least > margin
        else:
            assert (prefill[0], decode[0], owed[prefill]) == ("p", "d", shortest)
            assert shortest - least <= margin or least > DEPTH * margin
        assert all(s.owed <= DEPTH * margin + 200 for name, s in state.members.items() if name[0] == "d")
    assert seen == {Placement.DISAGGREGATED, Placement.OVERFLOW}


# ── the decode instance ──────────────────────────────────────────────────────────────────────────────────────────────


def steps(state: InstanceState, effects: list[Effect]) -> Iterator[StepPlan]:
    """Answers one step after the other, and shows each before its answer; ends when none is asked for."""
    asked = deque(e for e in effects if isinstance(e, RunStep))
    while asked:
        run = asked.popleft()
        yield run.plan
        asked += [e for e in state.handle(step_done([run]), 1.0) if isinstance(e, RunStep)]
        state.check()


def test_streams_go_on_beside_a_prompt_that_overflowed(make: Make) -> None:
    """Every step makes a token of every stream, and computes no more than ``max_mixed_tokens``."""
    state = make(D, max_mixed_tokens=8)
    run = steps(state, state.handle(submit(request("stream", 8, 30), D), 0.0))
    next(run)
    state.handle(submit(request("overflowed", 40, 2), D), 0.1)
    read = 0
    for plan in run:
        counts = {item.request_id: len(item.token_ids) for item in plan.items}
        if len(counts) == 2:
            assert counts["stream"] == 1 and sum(counts.values()) <= 8
            read += counts["overflowed"]
    assert read == 40 + 1, "its prompt and its second token"


def test_a_move_is_let_in_beside_prompts_that_overflowed(make: Make) -> None:
    state = make(D, max_mixed_tokens=8)
    for name in "abc":
        state.handle(submit(request(name, 60), D), 0.0)
    effects = state.handle(reserve(request("moved", 20), P, D), 0.1)
    assert "OpenTicket" in kinds(effects), "it waits for room alone, not for others to be read"


@pytest.mark.parametrize("prompt_first", [True, False])
def test_prompts_and_moves_get_their_room_in_one_line(make: Make, prompt_first: bool) -> None:
    """A pool of 15 blocks, 12 of them taken: whoever came first is let in first, be it a prompt or a move."""
    small = member("d", Role.DECODE, blocks=15)
    state = make(small, headroom_share=0.0, prefix_cache=False)
    run = steps(state, state.handle(submit(request("full", 90, 4), small), 0.0))
    next(run)
    prompt, move = submit(request("prompt", 70), small), reserve(request("moved", 70), P, small)
    for event in (prompt, move) if prompt_first else (move, prompt):
        state.handle(event, 0.1)
    assert (len(state.residents.waiting), state.arrivals.open) == (1, 0), "there is room for neither"
    while "full" in state.residents.sequences:
        next(run, None)
    assert (len(state.residents.waiting), state.arrivals.open) == ((0, 0) if prompt_first else (1, 1))
