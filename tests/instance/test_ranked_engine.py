"""An instance of several ranks as an engine, among scripted ranks: what is told to whom, when, and what goes wrong."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from distserve.core.types import Sampling, StepItem, StepPlan, Token
from distserve.instance.ranks.engine import RankedEngine


@dataclass
class Ranks:
    """Rank 0's own share and the crew in one, noting the order of all they are asked."""

    samples: bool = False
    fails_at: int = 0
    log: list[Any] = field(default_factory=list)

    def start(self, plan: StepPlan) -> None:
        self.log.append(("told", plan.number))

    def run(self, plan: StepPlan) -> list[Token]:
        if plan.number == self.fails_at:
            raise RuntimeError("no luck")
        self.log.append(("ran", plan.number))
        return [Token(plan.number)] if self.samples else []

    def tokens(self, number: int) -> list[Token]:
        self.log.append(("waited", number))
        return [Token(number)]

    def fall(self, why: str) -> None:
        self.log.append(why)


def plan(number: int) -> StepPlan:
    return StepPlan(number, (StepItem(f"r{number}", 0, (5,), (0,), True, 0, Sampling(0.0)),))


def engine(ranks: Ranks, depth: int) -> RankedEngine:
    return RankedEngine(ranks, ranks, depth)  # type: ignore[arg-type]


def test_the_first_stage_goes_on_to_the_next_step_before_the_last_has_ended() -> None:
    ranks = Ranks()
    made = engine(ranks, 2)
    made.submit(plan(1))
    made.submit(plan(2))
    with pytest.raises(RuntimeError, match="step 3 was submitted while 2 steps are outstanding"):
        made.submit(plan(3))
    assert [made.wait().tokens, made.wait().tokens] == [(("r1", Token(1)),), (("r2", Token(2)),)]
    assert ranks.log == [("told", 1), ("ran", 1), ("told", 2), ("ran", 2), ("waited", 1), ("waited", 2)]


def test_one_stage_chooses_its_tokens_itself() -> None:
    ranks = Ranks(samples=True)
    made = engine(ranks, 1)
    made.submit(plan(1))
    assert made.wait().tokens == (("r1", Token(1)),)
    assert ranks.log == [("told", 1), ("ran", 1)]


def test_a_share_that_fails_ends_the_instance_in_its_turn() -> None:
    ranks = Ranks(fails_at=2)
    made = engine(ranks, 2)
    made.submit(plan(1))
    made.submit(plan(2))
    assert "rank 0 failed in step 2: no luck" in ranks.log
    assert made.wait().tokens == (("r1", Token(1)),)
    with pytest.raises(RuntimeError, match="no luck"):
        made.wait()


def test_a_step_of_nothing_is_told_to_nobody() -> None:
    ranks = Ranks()
    made = engine(ranks, 1)
    made.submit(StepPlan(1, ()))
    assert made.wait().tokens == ()
    assert ranks.log == []
