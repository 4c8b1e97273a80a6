"""Several steps in flight over real engines: tokens are those of transformers all the same, whatever ends on the way.

On one rank the steps follow one another: the next token is planned before the last is known. That this really happened
is read off the instances' journals, which must also replay to the same effects.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from distserve.core.effects import RunStep
from distserve.core.events import StepAbandoned, StepDone
from distserve.core.types import FinishReason, Request, Role, Stopping
from distserve.gateway.backend import CompleteEvent
from distserve.gateway.process import RunningGateway
from distserve.observe.journal import read, replay
from distserve.sched.config import InstanceConfig
from tests.e2e.inprocess import all_free, cluster
from tests.e2e.test_path_equality import prompts
from tests.oracle import Oracle
from tests.shells.cluster import request
from tests.shells.test_life import fresh_machine
from tests.tiny_models import make_tiny

P, D, M = Role.PREFILL, Role.DECODE, Role.MIXED
LAYOUTS = {"1P1D": (P, D), "1M": (M,)}
OUTPUT = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("qwen3", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def oracle(model: Path) -> Oracle:
    return Oracle(model)


async def answers(running: RunningGateway, asked: list[Request]) -> list[tuple[list[int], FinishReason]]:
    return await asyncio.gather(*(_answer(running, each) for each in asked))


async def _answer(running: RunningGateway, asked: Request) -> tuple[list[int], FinishReason]:
    tokens: list[int] = []
    async for event in await running.shell.submit(asked, 0.0):
        if isinstance(event, CompleteEvent):
            return tokens, event.finish
        assert event.first_index == len(tokens)
        tokens += [token.id for token in event.tokens]
    raise AssertionError("the stream had no end")


def what_happened(folder: Path) -> Counter[str]:
    """Counts over all journals of a folder, every one of which replays."""
    seen: Counter[str] = Counter()
    for path in folder.iterdir():
        assert replay(path, fresh_machine) > 10
        outstanding = 0
        for entry in read(path):
            outstanding -= isinstance(entry.event, StepDone | StepAbandoned)
            for plan in [e.plan for e in entry.effects if isinstance(e, RunStep)]:
                outstanding += 1
                seen["followed"] += sum(item.follows for item in plan.items)
                seen["most in flight"] = max(seen["most in flight"], outstanding)
        assert outstanding == 0
    return seen


@pytest.mark.parametrize("steps", [2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
async def test_tokens_are_those_of_transformers(model: Path, oracle: Oracle, layout: str, steps: int, tmp_path) -> None:
    """Some end by a stop token, others by length, together."""
    asked, wanted = [], []
    for i, prompt in enumerate(prompts()):
        each, answer = request(f"r{i}", prompt, OUTPUT - i), oracle(prompt, OUTPUT - i)
        if i % 2:
            stop = answer[len(answer) // 2]
            each = replace(each, stopping=Stopping(OUTPUT - i, stop_token_ids=(stop,)))
            answer = answer[: answer.index(stop) + 1]
        asked.append(each)
        wanted.append(answer)
    small = InstanceConfig(prefill_chunk=48)
    async with cluster(
        model, LAYOUTS[layout], transfer="shm", steps_in_flight=steps, machine=small, journals=tmp_path
    ) as running:
        given = await answers(running, asked)
        await all_free(running)
    assert [tokens for tokens, _ in given] == wanted
    ends = [FinishReason.STOP if i % 2 and len(w) < OUTPUT - i else FinishReason.LENGTH for i, w in enumerate(wanted)]
    assert [end for _, end in given if end is FinishReason.STOP] and [end for _, end in given][::2] == ends[::2]
    seen = what_happened(tmp_path)
    assert seen["most in flight"] == steps
    assert seen["followed"] > OUTPUT


async def test_penalties_wait_for_their_tokens_and_change_nobody_elses(model: Path, oracle: Oracle, tmp_path) -> None:
    asked = [request(f"r{i}", prompt, OUTPUT) for i, prompt in enumerate(prompts())]
    asked[2] = replace(asked[2], sampling=replace(asked[2].sampling, repetition_penalty=1.8))
    asked[4] = replace(asked[4], stopping=Stopping(40))  # goes on alone: then it is followed
    made = []
    for steps in (1, 2):
        folder = tmp_path / str(steps)
        async with cluster(model, (M,), transfer="shm", steps_in_flight=steps, journals=folder) as running:
            made.append(await answers(running, asked))
            await all_free(running)
    assert made[0] == made[1]
    assert made[1][2][0] != oracle(prompts()[2], OUTPUT), "the penalty does something"
    assert made[1][4][0] == oracle(prompts()[4], 40)
    assert what_happened(tmp_path / "2")["followed"] > 10


async def test_cancels_leave_nothing_behind(model: Path, oracle: Oracle, tmp_path) -> None:
    async with cluster(model, (P, D), transfer="shm", steps_in_flight=3, journals=tmp_path) as running:
        for turn in range(4):
            streams = [await running.shell.submit(request(f"c{turn}-{i}", p, 90), 0.0) for i, p in enumerate(prompts())]
            stays = asyncio.create_task(_answer(running, request(f"s{turn}", prompts()[1], OUTPUT)))
            for stream in streams[turn:]:
                await anext(stream)
            for stream in streams:
                await stream.aclose()
            assert (await stays)[0] == oracle(prompts()[1], OUTPUT)
            await all_free(running)
    assert what_happened(tmp_path)["followed"] > 0
