"""The clients of a chaos run: requests whose every token is known, and a record of when each was heard of.

A request that is accepted ends in exactly the expected tokens, or with a status and a sentence, in time; anything else
is noted as a violation. Knows gRPC; no fault but its own client's.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from distserve.v1 import inference_pb2
from distserve.v1.inference_pb2_grpc import InferenceServiceStub
from tests.chaos.cluster import ChaosCluster, Kept
from tests.chaos.waiting import within
from tests.oracle import Oracle
from tests.tiny_models import VOCAB_SIZE

LONGEST_PROMPT, LONGEST_ANSWER = 160, 100
STATUS_KEY = "grpc-status-details-bin"
"""What a status that a gateway gave carries, and one that gRPC made of a broken connection does not."""

GUARD_S = 10.0
"""Beyond a request's deadline; by then it must have ended."""

REASONS = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""What a cluster in trouble may say to a request that is right."""


@dataclass(frozen=True, slots=True)
class Known:
    """A prompt and the answer that transformers gives, greedily."""

    prompt: list[int]
    answer: list[int]


def oracle(model: Path, count: int, seed: int) -> list[Known]:
    """Prompts of unequal lengths, some of which begin alike, and their answers."""
    answer = Oracle(model)
    draw = random.Random(seed)
    made: list[Known] = []
    for _ in range(count):
        prompt = [draw.randrange(3, VOCAB_SIZE) for _ in range(draw.randrange(5, LONGEST_PROMPT))]
        if made and draw.random() < 0.3:
            prompt = (draw.choice(made).prompt[:64] + prompt)[:LONGEST_PROMPT]
        made.append(Known(prompt, answer(prompt, LONGEST_ANSWER)))
    return made


@dataclass(frozen=True, slots=True)
class Ask:
    """One request as a client means it."""

    number: int
    known: Known
    wanted: int
    pick: float  # of the gateway
    leave_after: int | None = None  # tokens; 0: before the first
    vanish: bool = False  # when leaving: break the connection instead of cancelling
    timeout_s: float | None = None  # of its own; None: the gateway's


@dataclass(slots=True)
class Record:
    """When a request was heard of, on the monotonic clock: its beginning, every message, its end."""

    number: int
    heard: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Tally:
    """What became of the requests."""

    outcomes: Counter[str] = field(default_factory=Counter)
    sentences: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    resumed: int = 0
    moved_bytes: int = 0

    @property
    def ended(self) -> int:
        return self.outcomes.total()


class Asker:
    """Asks, checks, records. ``progress(number, tokens)`` hears of every message, and of the end with -1."""

    def __init__(
        self, cluster: ChaosCluster, progress: Callable[[int, int], None] = lambda number, tokens: None
    ) -> None:
        self.tally = Tally()
        self._cluster = cluster
        self._progress = progress

    async def ask(self, ask: Ask) -> str:
        """One request from its beginning to its end; what became of it."""
        gateway = await self._gateway(ask.pick)
        life = self._cluster.parts[gateway].lives
        record = Record(ask.number, [time.monotonic()])
        self.tally.records.append(record)
        channel = self._cluster.fresh_channel(gateway) if ask.vanish else self._cluster.channel(gateway)
        try:
            limit = (ask.timeout_s or self._cluster.limits.deadline_s) + GUARD_S
            outcome = await within(limit, self._stream(ask, record, channel))
        except TimeoutError:
            outcome = "hung"
            self._violate(ask, f"no end {GUARD_S:g} s after its deadline")
        except grpc.aio.AioRpcError as error:
            outcome = await self._failure(ask, error, self._cluster.parts[gateway], life)
        finally:
            if ask.vanish:
                await channel.close()
            record.heard.append(time.monotonic())
            self._progress(ask.number, -1)
        self.tally.outcomes[outcome] += 1
        return outcome

    async def _gateway(self, pick: float) -> str:
        """One that is up, as a load balancer would choose."""
        while not (up := self._cluster.gateways_up()):
            await self._cluster.parts[self._cluster.gateways[0]].came_back(0)
        return up[int(pick * len(up))]

    async def _stream(self, ask: Ask, record: Record, channel: grpc.aio.Channel) -> str:
        request = inference_pb2.GenerateRequest(request_id=f"chaos-{ask.number}")
        request.token_ids.ids.extend(ask.known.prompt)
        request.sampling.temperature = 0.0
        request.stopping.max_tokens = ask.wanted
        request.stopping.ignore_eos = True
        stub: Any = InferenceServiceStub(channel)
        call = stub.Generate(request, timeout=ask.timeout_s)
        got: list[int] = []
        if ask.leave_after == 0:
            await asyncio.sleep(ask.pick * 0.02)
            return self._leave(ask, call)
        async for response in call:
            record.heard.append(time.monotonic())
            if response.WhichOneof("event") == "delta":
                self._check(ask, got, response.delta)
                self._progress(ask.number, len(got))
                if ask.leave_after is not None and len(got) >= ask.leave_after:
                    return self._leave(ask, call)
            elif response.WhichOneof("event") == "summary":
                self.tally.resumed += response.summary.served.attempts > 1
                self.tally.moved_bytes += response.summary.served.kv_bytes_moved
        if got != ask.known.answer[: ask.wanted]:
            self._violate(ask, f"ended well with {len(got)} of {ask.wanted} tokens")
        return "exact"

    def _leave(self, ask: Ask, call: Any) -> str:
        if ask.vanish:
            return "left: vanished"
        call.cancel()
        return "left: cancelled"

    def _check(self, ask: Ask, got: list[int], delta: Any) -> None:
        if delta.first_token != len(got):
            self._violate(ask, f"index {delta.first_token} came after {len(got)} tokens")
        got.extend(delta.token_ids)
        if got != ask.known.answer[: len(got)]:
            self._violate(ask, f"one of the tokens up to {len(got) - 1} is wrong")

    async def _failure(self, ask: Ask, error: grpc.aio.AioRpcError, gateway: Kept, life: int) -> str:
        details = error.details() or ""
        from_gateway = any(key == STATUS_KEY for key, _ in error.trailing_metadata() or ())
        if error.code() is grpc.StatusCode.UNAVAILABLE and not from_gateway:
            try:
                await gateway.until(lambda k: k.lives > life or not k.up, GUARD_S, "dead")
            except AssertionError:
                self._violate(ask, f"its connection broke though its gateway lives: {details}")
            return "its gateway died"
        if ask.timeout_s is not None and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            return "its own deadline passed"
        if error.code() not in REASONS or not details:
            self._violate(ask, f"failed with {error.code().name}: {details!r}")
        self.tally.sentences[_shape(details)] += 1
        return f"refused: {error.code().name}"

    def _violate(self, ask: Ask, what: str) -> None:
        self.tally.violations.append(f"chaos-{ask.number}: {what}")


def _shape(sentence: str) -> str:
    """A sentence without its numbers, so that like ones count as one."""
    return "".join("#" if c.isdigit() else c for c in sentence)


def longest_gap(records: Sequence[Record], begin: float, end: float, slept: Sequence[tuple[float, float]]) -> float:
    """The longest silence that any client saw and that touches the time given, seconds.

    ``slept`` are times in which this process itself did not run; they are nobody else's fault and are not counted.
    """
    longest = 0.0
    for record in records:
        for before, after in zip(record.heard, record.heard[1:], strict=False):
            if after >= begin and before <= end:
                own = sum(max(0.0, min(after, e) - max(before, b)) for b, e in slept)
                longest = max(longest, after - before - own)
    return longest
