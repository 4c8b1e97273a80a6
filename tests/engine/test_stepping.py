"""Steps computed ahead by the engine's own thread: in order, following one another, and none after one that failed."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from distserve.core.types import CHOSEN_BEFORE, Sampling, StepItem, StepPlan, Token
from distserve.engine.config import EngineConfig
from distserve.engine.runner import Engine
from distserve.engine.stepping import Ahead, InTurn, StepOutput
from distserve.engine.stopping import StepGivenUp
from distserve.models.errors import ModelError
from distserve_kernels.cores import keep_to, usable_cores
from tests.engine.driver import complete, ids
from tests.tiny_models import VOCAB_SIZE, make_tiny

GREEDY = Sampling(temperature=0.0)
WAIT_S = 20.0


def plan(number: int, *items: StepItem) -> StepPlan:
    return StepPlan(number, items or (item("a", 10 * number),))


def item(name: str, token: int, *, sample: bool = True) -> StepItem:
    return StepItem(name, 5, (token,), (0,), sample, 1, GREEDY)


class Computer:
    """Chooses one more than the token it is given; notes what it was asked, and by whom."""

    def __init__(self, during: Callable[[int], None] = lambda number: None) -> None:
        self.during = during
        self.seen: list[tuple[int, list[int]]] = []
        self.threads: set[str] = set()

    def __call__(self, plan: StepPlan) -> StepOutput:
        self.threads.add(threading.current_thread().name)
        self.seen.append((plan.number, [i.token_ids[0] for i in plan.items]))
        self.during(plan.number)
        return StepOutput(tuple((i.request_id, Token(i.token_ids[0] + 1)) for i in plan.items if i.sample), 0.0)


def test_one_step_at_a_time_is_computed_by_who_waits() -> None:
    computer = Computer()
    steps = InTurn(computer)
    steps.submit(plan(1))
    assert computer.seen == []
    with pytest.raises(RuntimeError, match="step 2 was submitted while step 1 is outstanding"):
        steps.submit(plan(2))
    assert steps.wait().tokens == (("a", Token(11)),)
    assert computer.threads == {threading.current_thread().name}
    with pytest.raises(RuntimeError, match="no step is outstanding"):
        steps.wait()


def test_submitting_does_not_wait() -> None:
    go_on = threading.Event()
    computer = Computer(lambda number: assert_(go_on.wait(WAIT_S)))
    steps = Ahead(computer, 2)
    steps.submit(plan(1))
    steps.submit(plan(2))
    with pytest.raises(RuntimeError, match="step 3 was submitted while 2 steps are outstanding"):
        steps.submit(plan(3))
    go_on.set()
    assert [steps.wait().tokens[0][1].id for _ in range(2)] == [11, 21]
    assert [number for number, _ in computer.seen] == [1, 2]
    assert threading.current_thread().name not in computer.threads
    steps.close()


def assert_(held: bool) -> None:
    assert held


def test_an_item_that_follows_takes_the_last_token_chosen_for_its_request() -> None:
    computer = Computer()
    steps = Ahead(computer, 3)
    steps.submit(plan(1, item("a", 10), item("b", 50)))
    steps.submit(plan(2, item("a", CHOSEN_BEFORE), item("c", 70, sample=False)))
    steps.submit(plan(3, item("b", CHOSEN_BEFORE), item("a", CHOSEN_BEFORE)))
    steps.wait()
    steps.submit(plan(4, item("b", CHOSEN_BEFORE)))
    for _ in range(3):
        steps.wait()
    assert computer.seen == [(1, [10, 50]), (2, [11, 70]), (3, [51, 12]), (4, [52])]
    steps.submit(plan(5, item("a", CHOSEN_BEFORE)))  # of the last step but one, which is over: known all the same
    assert steps.wait().tokens == (("a", Token(14)),)
    steps.close()


@pytest.mark.parametrize("error", [StepGivenUp("asked"), ValueError("broken")])
def test_what_is_behind_a_step_that_did_not_end_is_not_computed(error: Exception) -> None:
    def fail(number: int) -> None:
        if number == 1:
            raise error

    computer = Computer(fail)
    steps = Ahead(computer, 3)
    steps.submit(plan(1))
    steps.submit(plan(2))
    with pytest.raises(type(error), match=str(error)):
        steps.wait()
    steps.submit(plan(3))  # by one who has not heard of it yet
    for _ in range(2):
        with pytest.raises(StepGivenUp):
            steps.wait()
    assert [number for number, _ in computer.seen] == [1]
    steps.submit(plan(4, item("a", CHOSEN_BEFORE)))
    with pytest.raises(StepGivenUp, match="step 4 follows one that chose no token for a"):
        steps.wait()
    steps.submit(plan(5))
    assert steps.wait().tokens == (("a", Token(51)),)
    steps.close()


def test_a_thread_has_the_settings_of_the_one_that_loaded() -> None:
    before = torch.get_num_threads()
    found = []
    try:
        torch.set_num_threads(2 if before == 1 else 1)
        wanted = torch.get_num_threads()
        steps = Ahead(Computer(lambda number: found.append(torch.get_num_threads())), 2)
        steps.submit(plan(1))
        steps.wait()
        steps.close()
    finally:
        torch.set_num_threads(before)
    assert found == [wanted]


def test_a_thread_keeps_to_the_cores_of_the_one_that_submits() -> None:
    core = min(usable_cores())
    found: list[set[int]] = []

    def step() -> None:
        steps = Ahead(Computer(lambda number: found.append(os.sched_getaffinity(0))), 2)
        steps.submit(plan(1))
        steps.wait()
        steps.close()

    with ThreadPoolExecutor(1, initializer=keep_to, initargs=((core,),)) as loop:
        loop.submit(step).result(WAIT_S)
    assert found == [{core}]


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_a_real_engine_makes_the_same_tokens_ahead(tmp_path: Path, kernels: str) -> None:
    directory = make_tiny("llama", tmp_path)
    prompt = [(7 * i) % (VOCAB_SIZE - 3) + 3 for i in range(30)]
    wanted = ids(complete(Engine.load(EngineConfig(str(directory), kernels=kernels, pool_blocks=8)), prompt, 6))
    engine = Engine.load(EngineConfig(str(directory), kernels=kernels, pool_blocks=8, steps_in_flight=2))
    assert engine.depth == 2
    table = (3, 1, 5)
    engine.submit(StepPlan(1, (StepItem("a", 0, tuple(prompt), table, True, 0, GREEDY),)))
    made = []
    for n in range(1, 6):
        engine.submit(StepPlan(n + 1, (StepItem("a", 29 + n, (CHOSEN_BEFORE,), table, True, n, GREEDY),)))
        made.append(engine.wait().tokens[0][1].id)
    made.append(engine.wait().tokens[0][1].id)
    engine.close()
    assert made == wanted


def test_no_step_in_flight_is_refused() -> None:
    with pytest.raises(ModelError, match="steps_in_flight must be at least 1"):
        EngineConfig("x", steps_in_flight=0)
