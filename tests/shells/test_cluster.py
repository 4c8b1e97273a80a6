"""The live cluster: real processes, model and KV bytes; tokens must be those of transformers, whatever happens."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from pathlib import Path

import pytest

from distserve.core.types import FinishReason, Role
from distserve.gateway.backend import TokensEvent
from tests.oracle import Oracle
from tests.shells.cluster import answer, cluster, request
from tests.tiny_models import VOCAB_SIZE, make_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def oracle(model: Path) -> Oracle:
    return Oracle(model)


def prompts(count: int, seed: int = 1) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, VOCAB_SIZE) for _ in range(draw.randrange(5, 120))] for _ in range(count)]


@pytest.mark.parametrize(("transfer", "chunk"), [("shm", 32), ("gloo", 512)])  # 32: KV leaves while prompts are read
async def test_tokens_of_transformers_through_prefill_handoff_and_decode(model, oracle, transfer, chunk) -> None:
    asked = prompts(6)
    machine = {"prefill_chunk": chunk}
    async with cluster(model, Role.PREFILL, Role.DECODE, transfer=transfer, machine=machine) as held:
        got = await asyncio.gather(*(answer(held.shell, request(f"r{i}", p, 24)) for i, p in enumerate(asked)))
        for prompt, (tokens, end) in zip(asked, got, strict=True):
            assert tokens == oracle(prompt, 24)
            assert end.account.prefill_instance.startswith("prefill-0#")
            assert end.account.decode_instance.startswith("decode-1#")
            assert end.account.timings.kv_bytes_moved > 0
        await held.clean()


async def test_mixed_instances_answer_without_a_handoff(model, oracle) -> None:
    asked = prompts(4, seed=2)
    async with cluster(model, Role.MIXED) as held:
        got = await asyncio.gather(*(answer(held.shell, request(f"r{i}", p, 16)) for i, p in enumerate(asked)))
        for prompt, (tokens, end) in zip(asked, got, strict=True):
            assert tokens == oracle(prompt, 16)
            assert end.account.prefill_instance == end.account.decode_instance
            assert end.account.timings.kv_bytes_moved == 0
        await held.clean()


async def first_tokens(stream, count: int) -> list[int]:
    tokens: list[int] = []
    async for event in stream:
        assert isinstance(event, TokensEvent)
        tokens += [token.id for token in event.tokens]
        if len(tokens) >= count:
            return tokens
    raise AssertionError("the stream ended early")


async def rest(stream, tokens: list[int]) -> list[int]:
    async for event in stream:
        if isinstance(event, TokensEvent):
            assert event.first_index == len(tokens)
            tokens += [token.id for token in event.tokens]
        else:
            assert event.finish is FinishReason.LENGTH
            return tokens
    raise AssertionError("the stream had no end")


async def test_deaths_and_returns_are_not_seen_by_clients(model, oracle) -> None:
    asked = prompts(6, seed=3)
    async with cluster(model, Role.PREFILL, Role.DECODE, Role.DECODE) as held:
        # a decode instance dies under its streams: they go on elsewhere, at the next index
        streams = [await held.shell.submit(request(f"r{i}", p, 140), 0.0) for i, p in enumerate(asked)]
        begun = [await first_tokens(stream, 4) for stream in streams]
        held.parts["decode-1"].process.kill()
        for prompt, stream, tokens in zip(asked, streams, begun, strict=True):
            assert await rest(stream, tokens) == oracle(prompt, 140)
        assert await held.parts["decode-1"].ended() == -signal.SIGKILL
        # it comes back as a fresh life, and is used again
        held.start("decode-1", Role.DECODE)
        await held.parts["decode-1"].said("joined")
        await held.clean()
        # the prefill instance dies: what decodes goes on, what is new waits for its return
        old = await held.shell.submit(request("old", asked[0], 140), 0.0)
        begun_old = await first_tokens(old, 4)
        held.parts["prefill-0"].process.kill()
        new = asyncio.create_task(answer(held.shell, request("new", asked[1], 12)))
        assert await rest(old, begun_old) == oracle(asked[0], 140)
        held.start("prefill-0", Role.PREFILL)
        tokens, _ = await new
        assert tokens == oracle(asked[1], 12)
        assert len(await held.clean()) == 3


async def test_cancel_in_any_phase_leaves_nothing_behind_and_the_cluster_sleeps_then(model) -> None:
    asked = prompts(12, seed=4)
    async with cluster(model, Role.PREFILL, Role.DECODE) as held:
        streams = [await held.shell.submit(request(f"r{i}", p, 300), 0.0) for i, p in enumerate(asked)]
        view = await held.shell.where("r3")
        assert view is not None
        assert view.request_id == "r3"
        for number, stream in enumerate(streams):
            if number % 3:
                await first_tokens(stream, 1 + number % 4)
            account = await stream.aclose()
            assert account is not None
            assert account.prompt_tokens == len(asked[number])
        assert await held.shell.where("r3") is None
        assert not await held.shell.cancel("r3")
        await held.clean()
        views = await held.shell.instances()
        assert [v.state for v in views] == ["ready", "ready"]
        assert {v.pid for v in views} == {part.pid for part in held.parts.values()}
        # CPU time, not wall time: a loaded machine does not change it
        pids = [os.getpid(), *(part.pid for part in held.parts.values())]
        await asyncio.sleep(0.5)
        before = sum(cpu_s(pid) for pid in pids)
        await asyncio.sleep(3.0)
        assert sum(cpu_s(pid) for pid in pids) - before <= 0.02 * 3.0


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def test_an_instance_that_hangs_loses_its_requests_and_rejoins_when_it_wakes(model, oracle) -> None:
    asked = prompts(4, seed=6)
    async with cluster(model, Role.MIXED, Role.MIXED, lease_s=1.5) as held:
        await held.parts["mixed-1"].said("joined")
        streams = [await held.shell.submit(request(f"r{i}", p, 250), 0.0) for i, p in enumerate(asked)]
        begun = [await first_tokens(stream, 3) for stream in streams]
        held.parts["mixed-1"].process.send_signal(signal.SIGSTOP)
        try:
            for prompt, stream, tokens in zip(asked, streams, begun, strict=True):
                assert await rest(stream, tokens) == oracle(prompt, 250)
        finally:
            held.parts["mixed-1"].process.send_signal(signal.SIGCONT)
        await held.parts["mixed-1"].said("joined")
        assert len(await held.clean()) == 2
