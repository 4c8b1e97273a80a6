"""A step that hangs is noticed though heartbeats go on; one that is only busy is not, and nobody waking is idle."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from distserve.core.types import StepPlan
from distserve.instance.options import InstanceOptions
from distserve.instance.watchdog import WatchedEngine

WAIT_S = 20.0


class Output:
    tokens = ()
    forward_s = 0.0


class Engine:
    """Runs until told to go on; tells when it began."""

    depth = 2

    def __init__(self, free: bool) -> None:
        self.go_on = threading.Event()
        self.began = threading.Event()
        self.given_up = 0
        self.plans: list[StepPlan] = []
        if free:
            self.go_on.set()

    def submit(self, plan: StepPlan) -> None:
        self.plans.append(plan)

    def wait(self) -> Output:
        plan = self.plans.pop(0)
        self.began.set()
        assert self.go_on.wait(WAIT_S)
        if plan.number == 13:
            raise RuntimeError("no luck")
        return Output()

    def give_up(self, number: int) -> None:
        self.given_up = number


@contextmanager
def watched(engine: Engine, limit_s: float) -> Iterator[tuple[WatchedEngine, list[str], threading.Event]]:
    said: list[str] = []
    late = threading.Event()

    def on_late(words: str) -> None:
        said.append(words)
        late.set()

    made = WatchedEngine(engine, limit_s, on_late)
    try:
        yield made, said, late
    finally:
        engine.go_on.set()
        made.close()
        assert not made._thread.is_alive()


def step_of(engine: WatchedEngine, number: int) -> object:
    engine.submit(StepPlan(number, ()))
    return engine.wait()


def test_a_step_that_hangs_is_told_once_in_a_sentence() -> None:
    engine = Engine(free=False)
    with watched(engine, 0.05) as (made, said, late):
        step = threading.Thread(target=step_of, args=(made, 7))
        step.start()
        assert late.wait(WAIT_S)
        engine.go_on.set()
        step.join(WAIT_S)
    (words,) = said
    assert "step 7 has run for 0.05 s" in words
    assert "--step-timeout" in words


def test_steps_that_end_are_never_late_and_the_next_hang_is_still_seen() -> None:
    engine = Engine(free=True)
    with watched(engine, 0.3) as (made, said, late):
        for number in range(200):
            if number == 13:
                with pytest.raises(RuntimeError):
                    step_of(made, number)
            else:
                assert step_of(made, number) is not None
        assert not late.wait(0.5), "idle for longer than the limit is not late"
        engine.go_on.clear()
        step = threading.Thread(target=step_of, args=(made, 201))
        step.start()
        assert late.wait(WAIT_S)
        engine.go_on.set()
        step.join(WAIT_S)
    assert len(said) == 1


def test_giving_a_step_up_goes_through_while_it_runs() -> None:
    engine = Engine(free=False)
    with watched(engine, 60.0) as (made, said, _):
        step = threading.Thread(target=step_of, args=(made, 7))
        step.start()
        assert engine.began.wait(WAIT_S)
        made.give_up(7)
        assert engine.given_up == 7
        engine.go_on.set()
        step.join(WAIT_S)
    assert said == []


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"advertise": "here"}, "--advertise here: HOST:PORT is needed"),
        ({"advertise_data": ":9"}, "--advertise-data :9: HOST:PORT is needed"),
        ({"advertise": "h:70000"}, "--advertise h:70000"),
        ({"step_timeout_s": 0.0}, "--step-timeout 0: more than 0 is needed"),
    ],
)
def test_options_that_cannot_be_are_refused_in_a_sentence(changed: dict[str, object], words: str) -> None:
    options = InstanceOptions(id="i", model="m", model_name="m", controller="h:1", **changed)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=words):
        options.check()
    InstanceOptions(id="i", model="m", model_name="m", controller="h:1", advertise="[::1]:5").check()


def test_a_step_behind_another_has_its_time_from_when_that_one_ends() -> None:
    engine = Engine(free=True)
    with watched(engine, 60.0) as (made, said, _):
        for number in (7, 8):
            made.submit(StepPlan(number, ()))
        first = made._running
        assert first is not None and first[0] == 7
        made.wait()
        second = made._running
        assert second is not None and second[0] == 8 and second[1] >= first[1]
        made.wait()
        assert made._running is None
        assert not said
