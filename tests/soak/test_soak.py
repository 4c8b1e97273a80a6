"""Thousands of requests while clients leave and instances die: none hangs, none leaks, no token is wrong.

``make soak``. Smaller or other runs: SOAK_REQUESTS (2000), SOAK_SEED (1), SOAK_CONCURRENCY (16), SOAK_KILL_EVERY (50
requests ended between two deaths), SOAK_LAYOUT ("--prefill 2 --decode 2").
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from distserve.launch.cluster import Cluster
from distserve.v1 import admin_pb2, inference_pb2
from distserve.v1.admin_pb2_grpc import AdminServiceStub
from distserve.v1.inference_pb2_grpc import InferenceServiceStub
from tests.oracle import Oracle
from tests.tiny_models import VOCAB_SIZE, make_tiny

REQUESTS = int(os.environ.get("SOAK_REQUESTS", "2000"))
SEED = int(os.environ.get("SOAK_SEED", "1"))
CONCURRENCY = int(os.environ.get("SOAK_CONCURRENCY", "16"))
KILL_EVERY = int(os.environ.get("SOAK_KILL_EVERY", "50"))
LAYOUT = os.environ.get("SOAK_LAYOUT", "--prefill 2 --decode 2").split()

PROMPTS, LONGEST_PROMPT, LONGEST_ANSWER = 60, 120, 100
CANCEL_SHARE = 0.2
REQUEST_TIMEOUT_S = 300.0
SETTLE_S = 60.0

pytestmark = [pytest.mark.soak, pytest.mark.timeout(7200)]


@dataclass(frozen=True, slots=True)
class Known:
    """A prompt and the answer that transformers gives, greedily."""

    prompt: list[int]
    answer: list[int]


@dataclass(slots=True)
class Tally:
    """What became of the requests."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    kills: Counter[str] = field(default_factory=Counter)
    resumed: int = 0

    @property
    def ended(self) -> int:
        return self.outcomes.total()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def known(model: Path) -> list[Known]:
    answer = Oracle(model)
    rng = random.Random(SEED)
    made = []
    for _ in range(PROMPTS):
        prompt = [rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randrange(5, LONGEST_PROMPT))]
        made.append(Known(prompt, answer(prompt, LONGEST_ANSWER)))
    return made


@pytest.fixture(scope="module")
def cluster(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    log_path = tmp_path_factory.mktemp("soak") / "serve.log"
    arguments = ["--model", str(model), *LAYOUT, "--kv-tokens", "1024", "--threads-per-rank", "1"]
    with log_path.open("w") as log, Cluster(arguments, log=log, start_timeout_s=300) as running:
        print(f"\nsoak: seed {SEED}, log in {log_path}", file=sys.stderr)
        yield running


class Soak:
    """One run: workers that ask, and one that kills."""

    def __init__(self, channel: grpc.aio.Channel, known: list[Known]) -> None:
        self._inference: Any = InferenceServiceStub(channel)
        self._admin: Any = AdminServiceStub(channel)
        self._known = known
        self.tally = Tally()
        self._moved = asyncio.Event()

    async def run(self) -> None:
        numbers = iter(range(REQUESTS))
        killer = asyncio.create_task(self._kill())
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(CONCURRENCY):
                    group.create_task(self._work(numbers))
        finally:
            killer.cancel()
            await asyncio.gather(killer, return_exceptions=True)

    async def _work(self, numbers: Iterator[int]) -> None:
        for number in numbers:
            outcome = await self._ask(number)
            self.tally.outcomes[outcome] += 1
            self._moved.set()
            if self.tally.ended % 100 == 0:
                kills = self.tally.kills.total()
                print(f"soak: {self.tally.ended} ended {dict(self.tally.outcomes)}, {kills} deaths", file=sys.stderr)

    async def _ask(self, number: int) -> str:
        """One request; what became of it. A wrong token is noted, whatever else happened."""
        rng = random.Random(SEED * 1_000_003 + number)
        known = rng.choice(self._known)
        wanted = rng.randrange(1, LONGEST_ANSWER + 1)
        leave_after = rng.randrange(0, wanted) if rng.random() < CANCEL_SHARE else None
        request = inference_pb2.GenerateRequest(request_id=f"soak-{number}")
        request.token_ids.ids.extend(known.prompt)
        request.sampling.temperature = 0.0
        request.stopping.max_tokens = wanted
        request.stopping.ignore_eos = True
        call = self._inference.Generate(request, timeout=REQUEST_TIMEOUT_S)
        got: list[int] = []
        try:
            if leave_after == 0:
                await asyncio.sleep(rng.random() * 0.02)
                call.cancel()
                return "left"
            async for response in call:
                match response.WhichOneof("event"):
                    case "delta":
                        self._check(number, known, got, response.delta)
                        if leave_after is not None and len(got) >= leave_after:
                            call.cancel()
                            return "left"
                    case "summary":
                        self.tally.resumed += response.summary.served.attempts > 1
        except grpc.aio.AioRpcError as error:
            return f"{error.code().name}: {error.details()}"
        if got != known.answer[:wanted]:
            self.tally.wrong.append(f"soak-{number}: {len(got)} of {wanted} tokens")
        return "completed"

    def _check(self, number: int, known: Known, got: list[int], delta: Any) -> None:
        if delta.first_token != len(got):
            self.tally.wrong.append(f"soak-{number}: index {delta.first_token} came after {len(got)} tokens")
        got.extend(delta.token_ids)
        if got != known.answer[: len(got)]:
            self.tally.wrong.append(f"soak-{number}: token {len(got) - 1} is wrong")

    async def _kill(self) -> None:
        """A death after every so many ends. Never of the last of its role: with nobody left, refusing is right."""
        rng = random.Random(SEED)
        due = KILL_EVERY
        while True:
            while self.tally.ended < due:
                self._moved.clear()
                await self._moved.wait()
            up = await self._up()
            roles = Counter(i.role for i in up)
            spare = [i for i in up if roles[i.role] > 1]
            due = self.tally.ended + (KILL_EVERY if spare else 1)
            if spare:
                victim = rng.choice(spare)
                number = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
                os.kill(victim.pid, number)
                self.tally.kills[number.name] += 1

    async def _up(self) -> list[Any]:
        answer = await self._admin.ListInstances(admin_pb2.ListInstancesRequest(), timeout=30)
        return [i for i in answer.instances if i.connected and i.state == "ready"]

    async def whole(self) -> list[Any]:
        """The instances, once all are connected."""
        expected = sum(int(n) for n in LAYOUT[1::2])
        deadline = time.monotonic() + SETTLE_S
        while time.monotonic() < deadline:
            here = await self._up()
            if len(here) == expected:
                return here
            await asyncio.sleep(0.25)
        raise AssertionError(f"not all of {expected} instances came back within {SETTLE_S:g} s")

    async def clean(self) -> list[Any]:
        """The ledgers, once nothing is held, or as they are when that takes too long."""
        deadline = time.monotonic() + SETTLE_S
        while True:
            answer = await self._admin.KvCheck(admin_pb2.ClusterKvCheckRequest(), timeout=60)
            if all(i.idle_and_clean for i in answer.instances) or time.monotonic() > deadline:
                return list(answer.instances)
            await asyncio.sleep(0.5)


async def test_requests_survive_cancels_and_deaths(cluster: Cluster, known: list[Known]) -> None:
    began = time.monotonic()
    async with grpc.aio.insecure_channel(cluster.grpc_address) as channel:
        soak = Soak(channel, known)
        await soak.run()
        await soak.whole()
        ledgers = await soak.clean()
    tally = soak.tally
    print(
        f"soak: {tally.ended} requests in {time.monotonic() - began:.0f} s: {dict(tally.outcomes)}; "
        f"deaths {dict(tally.kills)}, {tally.resumed} answers resumed elsewhere",
        file=sys.stderr,
    )
    assert tally.wrong == []
    assert tally.ended == REQUESTS, "every request ended"
    assert set(tally.outcomes) <= {"completed", "left"}
    assert [(i.instance, i.problem) for i in ledgers if not i.idle_and_clean] == []
    assert tally.kills.total() > 0 or KILL_EVERY >= REQUESTS
