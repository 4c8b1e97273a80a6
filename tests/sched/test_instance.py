"""One instance alone: batches, preemption, deadlines, abandoning; repeats and stale words are harmless."""

from __future__ import annotations

from distserve.core.effects import Effect, RunStep
from distserve.core.events import (
    Abandon,
    Abandoned,
    AttemptFailed,
    GatewayLost,
    StepFailed,
    Tick,
    TokensMade,
)
from distserve.core.types import Code, FinishReason, Role
from tests.sched.factory import (
    EPOCH,
    GATEWAY,
    D,
    M,
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

# ── running here ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_colocated_request_runs_to_its_length_and_frees_everything(make: Make) -> None:
    state = make(M)
    effects = run_to_idle(state, state.handle(submit(request(max_tokens=3), M), 0.0))
    outputs = [o for e in effects for o in getattr(getattr(e, "event", None), "outputs", ())]
    assert [t.id for o in outputs for t in o.tokens] == [50, 51, 52]
    assert [o.first_index for o in outputs] == [0, 1, 2]
    assert outputs[-1].finish is FinishReason.LENGTH
    assert_all_free(state)


def test_a_stop_token_ends_and_min_tokens_bans_it_before(make: Make) -> None:
    state = make(M)
    effects = state.handle(submit(request(max_tokens=9, min_tokens=2, stop_token_ids=(52,)), M), 0.0)
    assert find(effects, RunStep).plan.items[0].banned == (52,)
    done = run_to_idle(state, effects)
    assert find(done[-1:], TokensMade).outputs[0].finish is FinishReason.STOP
    plans = [e.plan.items[0].banned for e in done if isinstance(e, RunStep)]
    assert plans == [(52,), (52,), ()]


def test_prompts_are_chunked_beside_decodes(make: Make) -> None:
    state = make(M, max_mixed_tokens=8, prefill_chunk=16, prefix_cache=False)
    first = state.handle(submit(request("a", 10, 9), M), 0.0)
    second = state.handle(step_done(first), 0.1)
    assert [len(i.token_ids) for i in find(second, RunStep).plan.items] == [1]
    state.handle(submit(request("b", 20, 2), M), 0.2)
    mixed = find(state.handle(step_done(second), 0.3), RunStep).plan
    assert [(i.request_id, len(i.token_ids), i.sample) for i in mixed.items] == [("a", 1, True), ("b", 7, False)]


def test_a_prefill_batch_takes_prompts_of_unequal_length_up_to_its_budget(make: Make) -> None:
    state = make(P, max_batch_tokens=30, prefill_chunk=30)
    state.handle(submit(request("zero", 8, 2), D), 0.0)
    for name, length in (("a", 12), ("b", 3), ("c", 40)):
        state.handle(submit(request(name, tuple(range(length))), D), 0.0)
    plan = find(state.handle(StepFailed(1, "boom"), 0.1), RunStep).plan
    assert [(i.request_id, len(i.token_ids)) for i in plan.items] == [("a", 12), ("b", 3), ("c", 15)]


def test_a_full_pool_preempts_the_youngest_and_everybody_finishes(make: Make) -> None:
    small = member("m", Role.MIXED, blocks=9)
    state = make(small, prefix_cache=False, headroom_share=0.0)
    effects = state.handle(submit(request("old", 20, 30), small), 0.0)
    state.handle(submit(request("young", tuple(range(20)), 30), small), 0.0)
    run_to_idle(state, effects)
    assert state.residents.preemptions >= 1
    assert_all_free(state)


def test_a_prefix_hit_computes_only_the_rest(make: Make) -> None:
    state = make(M)
    run_to_idle(state, state.handle(submit(request("a", 24, 1), M), 0.0))
    plan = find(state.handle(submit(request("b", 24, 1), M), 1.0), RunStep).plan
    assert (plan.items[0].start, len(plan.items[0].token_ids)) == (16, 8)  # the last token is always computed


def test_a_resumed_attempt_computes_what_was_delivered_and_goes_on_from_there(make: Make) -> None:
    state = make(M)
    effects = state.handle(submit(request(prompt=10, max_tokens=5), M, delivered=(7, 8)), 0.0)
    item = find(effects, RunStep).plan.items[0]
    assert (item.token_ids[-2:], item.output_index) == ((7, 8), 2)
    outputs = [e for e in run_to_idle(state, effects) if "TokensMade" in kinds([e])]
    assert len(outputs) == 3


def test_a_repeated_submit_changes_nothing(make: Make) -> None:
    state = make(M)
    state.handle(submit(request(), M), 0.0)
    assert state.handle(submit(request(), M), 0.1) == []
    assert state.ignored == 1


def test_a_failed_step_gives_its_requests_up_and_frees_them(make: Make) -> None:
    state = make(M)
    state.handle(submit(request(), M), 0.0)
    failed = find(state.handle(StepFailed(1, "out of memory"), 0.1), AttemptFailed)
    assert (failed.code, failed.retriable) == (Code.INTERNAL, True)
    assert "out of memory" in failed.message
    assert_all_free(state)


def test_a_request_too_long_for_the_pool_is_refused_with_both_numbers(make: Make) -> None:
    failed = find(make(M).handle(submit(request(prompt=300, max_tokens=10), M), 0.0), AttemptFailed)
    assert not failed.retriable
    assert "310" in failed.message and "256" in failed.message


def test_the_deadline_ends_what_waits_and_what_runs(make: Make) -> None:
    state = make(M, max_sequences=1)
    state.handle(submit(request("a"), M), 0.0)
    state.handle(submit(request("b"), M), 0.0)
    effects: list[Effect] = []
    while state.residents.sequences:  # earlier ones are for what is merely remembered
        due = state.next_deadline()
        assert due is not None
        effects += state.handle(Tick(), due)
    assert due == 102.0  # the gateway's deadline acts first
    assert [e.event.code for e in effects if "AttemptFailed" in kinds([e])] == [Code.DEADLINE_EXCEEDED] * 2  # type: ignore[union-attr]


# ── abandoning ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_abandon_during_a_step_frees_the_blocks_only_after_it(make: Make) -> None:
    state = make(M, prefix_cache=False)
    effects = state.handle(submit(request(), M), 0.0)
    assert find(state.handle(Abandon(GATEWAY, "r", EPOCH), 0.1), Abandoned).epoch == EPOCH
    assert state.residents.ledger.free < state.residents.ledger.total
    assert state.handle(step_done(effects), 0.2) == []
    assert_all_free(state)


def test_abandon_before_submit_is_remembered(make: Make) -> None:
    state = make(M)
    state.handle(Abandon(GATEWAY, "r", EPOCH), 0.0)
    assert kinds(state.handle(submit(request(), M), 0.1)) == ["Abandoned"]
    assert kinds(state.handle(submit(request(), M, epoch=EPOCH * 2), 0.2)) == ["RunStep"]


def test_a_lost_gateway_takes_its_requests_with_it(make: Make) -> None:
    state = make(D)
    state.handle(reserve(request("in"), P, D), 0.0)
    assert kinds(state.handle(GatewayLost(GATEWAY), 0.1)) == ["CloseTicket", "MoveEnded"]
    assert_all_free(state)
