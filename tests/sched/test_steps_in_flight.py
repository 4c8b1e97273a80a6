"""Several steps in flight: who may be planned before the last step is done, and what is made of what comes back."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from distserve.core.effects import Effect, RunStep, SendStage
from distserve.core.events import (
    Abandon,
    AttemptFailed,
    ReserveGranted,
    StepAbandoned,
    StepDone,
    StepFailed,
    TokensMade,
)
from distserve.core.types import CHOSEN_BEFORE, Request, Role, Sampling, StepPlan, Ticket, Token
from distserve.sched.instance import InstanceState
from tests.sched.factory import EPOCH, GATEWAY, Make, assert_all_free, find, kinds, member, request, submit

P, D = member("p", Role.PREFILL), member("d", Role.DECODE)
M = member("m", Role.MIXED)
EOS = 2
AHEAD = {"steps_in_flight": 2, "follow_up": True}


class Driven:
    """A machine and its engine: steps end, oldest first, when told to; token ids are 50 + output index."""

    def __init__(self, state: InstanceState) -> None:
        self.state = state
        self.outstanding: deque[StepPlan] = deque()
        self.now = 0.0

    def handle(self, event) -> list[Effect]:
        self.now += 0.1
        effects = self.state.handle(event, self.now)
        self.state.check()
        self.outstanding += [e.plan for e in effects if isinstance(e, RunStep)]
        return effects

    def submit(self, *asked: Request, decode=M) -> None:
        for each in asked:
            self.handle(submit(each, decode))

    def done(self, **instead: int) -> list[Effect]:
        plan = self.outstanding.popleft()
        made = [(i.request_id, Token(instead.get(i.request_id, 50 + i.output_index))) for i in plan.items if i.sample]
        return self.handle(StepDone(plan.number, tuple(made), 0.01))

    def decoding(self, count: int, **asked: object) -> None:
        """``count`` sequences with their first tokens made."""
        self.submit(*(request(f"r{i}", 4, 40, **asked) for i in range(count)))
        while any(not s.decoding for s in self.state.residents.running) or self.state.residents.waiting:
            self.done()

    @property
    def ids(self) -> list[list[str]]:
        return [[item.request_id for item in plan.items] for plan in self.outstanding]

    def run_out(self) -> None:
        while self.outstanding:
            self.done()
        assert_all_free(self.state)


# ── following ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_token_after_one_that_is_not_known_is_planned(make: Make) -> None:
    d = Driven(make(M, **AHEAD))
    d.submit(request("a", 20, 5))
    first, second = d.outstanding
    assert (first.items[0].start, len(first.items[0].token_ids), first.items[0].follows) == (0, 20, False)
    (item,) = second.items
    assert item.follows
    assert (item.start, item.token_ids, item.output_index, item.sample) == (20, (CHOSEN_BEFORE,), 1, True)
    third = find(d.done(), RunStep).plan
    assert (third.items[0].start, third.items[0].output_index) == (21, 2)
    assert d.state.residents.sequences["a"].computed == 20, "what is planned is not there yet"
    d.run_out()


def test_nobody_follows_a_token_that_ends_it_by_length(make: Make) -> None:
    d = Driven(make(M, **AHEAD))
    d.submit(request("a", 20, 2), request("b", 20, 1))
    assert d.ids == [["a"], ["a"]]
    d.done()
    assert d.ids == [["a"], ["b"]], "a's second token is its last"
    d.done()
    assert d.ids == [["b"]]
    d.run_out()
    assert d.state.steps.count == 3


def test_nobody_follows_a_prompt_that_is_handed_off(make: Make) -> None:
    d = Driven(make(P, prefill_chunk=8, **AHEAD))
    d.submit(request("a", 20, 5), decode=D)
    assert [(p.items[0].start, p.items[0].sample) for p in d.outstanding] == [(0, False), (8, False)]
    d.done()
    assert [(p.items[0].start, p.items[0].sample) for p in d.outstanding] == [(8, False), (16, True)]
    d.done()
    assert len(d.outstanding) == 1
    assert "TokensMade" in kinds(d.done())
    assert not d.outstanding


def test_only_kv_that_is_there_is_sent(make: Make) -> None:
    """The next chunk is on its way through; the move carries what the last one left."""
    d = Driven(make(P, prefill_chunk=8, **AHEAD))
    d.submit(request("a", 30, 5), decode=D)
    ticket = Ticket(f"a/{EPOCH}/1", "a", EPOCH, P.ref, D.ref, "fp", 9, 0, 30, 10.0)
    assert "SendStage" not in kinds(d.handle(ReserveGranted(ticket)))
    stage = find(d.done(), SendStage)
    assert (stage.start, stage.end) == (0, 8)


def test_penalties_hold_all_up_instead_of_splitting_the_batch(make: Make) -> None:
    d = Driven(make(M, **AHEAD))
    d.decoding(2)
    penalized = replace(request("p", 4, 4), sampling=Sampling(0.0, frequency_penalty=0.5))
    d.submit(penalized)
    while d.state.residents.sequences["p"].output_len < 2:
        assert not any("p" in ids for ids in d.ids[:-1]), "something is planned behind it"
        d.done()
    assert d.ids == [["r0", "r1", "p"]], "all together, one step at a time"
    (item,) = [i for i in d.outstanding[0].items if i.request_id == "p"]
    assert (item.token_ids, item.output) == ((51,), (50, 51))
    d.done()
    assert len(d.outstanding) == 2, "it has ended; the others follow again"
    d.run_out()


def test_stop_tokens_are_banned_by_count_alone(make: Make) -> None:
    d = Driven(make(M, **AHEAD))
    d.submit(request("a", 4, 9, min_tokens=2, stop_token_ids=(EOS,)))
    assert [plan.items[0].banned for plan in d.outstanding] == [(EOS,), (EOS,)]
    d.done()
    assert d.outstanding[1].items[0].banned == ()
    d.run_out()


def test_a_row_behind_a_stop_token_is_dropped_and_its_blocks_wait_for_it(make: Make) -> None:
    d = Driven(make(M, **AHEAD))
    d.submit(request("a", 8, 9, stop_token_ids=(EOS,)))
    made = find(d.done(a=EOS), TokensMade)
    assert [t.id for t in made.outputs[0].tokens] == [EOS]
    assert "a" not in d.state.residents.sequences
    assert d.state.residents.zombies, "the next step still writes its blocks"
    assert kinds(d.done()) == []
    assert not d.state.residents.zombies
    assert_all_free(d.state)
    assert d.state.residents.ledger.evictable == 1, "of 8 tokens computed and the stop token, which fills no block"


def test_three_in_flight_drop_two_rows(make: Make) -> None:
    d = Driven(make(M, steps_in_flight=3, follow_up=True))
    d.submit(request("a", 8, 9, stop_token_ids=(EOS,)))
    assert [plan.items[0].start for plan in d.outstanding] == [0, 8, 9]
    d.done(a=EOS)
    d.done()
    assert d.state.residents.zombies
    d.done()
    assert_all_free(d.state)


def test_room_that_somebody_would_have_to_give_way_for_is_waited_for(make: Make) -> None:
    """Two sequences fill the pool: nothing is planned ahead, and the next step preempts as ever."""
    d = Driven(make(member("m", Role.MIXED, blocks=4), prefix_cache=False, **AHEAD))
    d.submit(request("a", 7, 20), request("b", 7, 20))
    while len(d.outstanding) > 1:
        d.done()
    assert d.ids == [["a", "b"]]
    assert d.state.residents.preemptions == 0
    d.done()
    assert d.state.residents.preemptions == 1
    d.run_out()


# ── disjoint batches ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_each_step_in_flight_has_its_share_and_nobody_starves(make: Make) -> None:
    d = Driven(make(M, steps_in_flight=2))
    d.decoding(5)
    turns: dict[str, int] = {}
    for _ in range(12):
        assert len(d.outstanding) == 2
        first, second = (set(ids) for ids in d.ids)
        assert not first & second
        assert not any(item.follows for plan in d.outstanding for item in plan.items)
        assert max(len(first), len(second)) <= 3
        for name in first:
            turns[name] = turns.get(name, 0) + 1
        d.done()
    assert max(turns.values()) - min(turns.values()) <= 1
    d.run_out()


def test_one_sequence_alone_has_one_step(make: Make) -> None:
    d = Driven(make(M, steps_in_flight=2))
    d.decoding(1)
    assert d.ids == [["r0"]]
    d.run_out()


def test_the_chunks_of_a_prompt_follow_one_another(make: Make) -> None:
    d = Driven(make(M, steps_in_flight=3, prefill_chunk=8))
    d.submit(request("a", 30, 3))
    assert [plan.items[0].start for plan in d.outstanding] == [0, 8, 16]
    d.done()
    assert [(p.items[0].start, p.items[0].sample) for p in d.outstanding] == [(8, False), (16, False), (24, True)]
    d.done()
    assert len(d.outstanding) == 2, "its first token is not known"
    d.run_out()


def test_a_long_prompt_is_not_read_at_once_beside_next_tokens_of_another_step(make: Make) -> None:
    d = Driven(make(M, steps_in_flight=2, max_batch_tokens=64, max_mixed_tokens=16, prefill_chunk=64))
    d.decoding(1)
    assert d.ids == [["r0"]]
    d.submit(request("long", 60, 3))
    assert [len(item.token_ids) for item in d.outstanding[1].items] == [16]
    d.run_out()


# ── what comes back ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_outcomes_are_taken_in_order_and_once(make: Make) -> None:
    d = Driven(make(M, **AHEAD))
    d.submit(request("a", 8, 9))
    for number in (2, 3, 0):
        assert d.state.handle(StepDone(number, (("a", Token(1)),), 0.1), 1.0) == []
    assert d.state.steps.ignored == 3
    d.done()
    assert d.state.handle(StepDone(1, (("a", Token(1)),), 0.1), 1.0) == []
    assert d.state.residents.sequences["a"].tokens[-1] == 50
    d.run_out()


def test_what_is_behind_a_step_that_failed_does_not_count(make: Make) -> None:
    d = Driven(make(M, steps_in_flight=2))
    d.decoding(2)
    assert d.ids == [["r0"], ["r1"]]
    first, second = d.outstanding
    before = list(d.state.residents.sequences["r1"].tokens)
    effects = d.handle(StepFailed(first.number, "boom"))
    assert find(effects, AttemptFailed).request_id == "r0"
    assert "RunStep" not in kinds(effects), "not before the step behind it has ended"
    d.outstanding.clear()
    again = d.handle(StepDone(second.number, (("r1", Token(7)),), 0.1))  # an engine that computed it all the same
    assert kinds(again) == ["RunStep"]
    assert d.state.residents.sequences["r1"].tokens == before
    assert d.outstanding[0].items[0].start == len(before) - 1
    d.run_out()


def test_a_step_given_up_is_planned_again_with_all_behind_it(make: Make) -> None:
    made = {}
    for disturbed in (False, True):
        d = Driven(make(M, **AHEAD))
        d.submit(request("a", 20, 6), request("b", 9, 6))
        out = []
        while d.outstanding:
            if disturbed and d.state.steps.count % 3 == 0:
                for plan in list(d.outstanding):
                    assert plan is d.outstanding[0]
                    d.outstanding.popleft()
                    d.handle(StepAbandoned(plan.number))
            effects = d.done()
            out += [(o.request_id, o.first_index, o.tokens) for e in effects if kinds([e]) == ["TokensMade"]
                    for o in e.event.outputs]  # fmt: skip
        assert_all_free(d.state)
        made[disturbed] = sorted(out)
    assert made[True] == made[False]
    assert len(made[True]) == 12


def test_a_step_is_awaited_while_anybody_waits_for_it_or_for_those_behind_it(make: Make) -> None:
    d = Driven(make(M, steps_in_flight=2))
    d.decoding(2)
    awaiting = d.state.awaiting()
    assert awaiting.number == d.outstanding[0].number
    assert not awaiting.hear(Abandon(GATEWAY, "r0", EPOCH)), "r1's step would end with it"
    assert awaiting.hear(Abandon(GATEWAY, "r1", EPOCH))
    d.handle(Abandon(GATEWAY, "r0", EPOCH))
    d.handle(Abandon(GATEWAY, "r1", EPOCH))
    assert d.state.awaiting().nobody
    for plan in d.outstanding:
        d.state.handle(StepAbandoned(plan.number), 9.0)
    assert_all_free(d.state)


def test_a_later_attempt_beside_what_is_left_of_an_earlier_one(make: Make) -> None:
    """Its blocks are its own though steps name the same request; tokens of the earlier one are not taken for its."""
    d = Driven(make(M, **AHEAD))
    d.submit(request("a", 8, 9))
    d.handle(Abandon(GATEWAY, "a", EPOCH))
    d.handle(submit(request("a", 8, 9), M, epoch=EPOCH + 1))
    old = {block for plan in d.outstanding for block in plan.items[0].blocks}
    d.done()
    d.done()
    assert d.state.residents.sequences["a"].output_len == 0
    assert not old & set(d.outstanding[0].items[0].blocks)
    d.run_out()
