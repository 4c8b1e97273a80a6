"""Readiness: what a canary must have done, and when another is sent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from distserve.core.effects import Account
from distserve.core.types import (
    Code,
    Endpoint,
    FinishReason,
    InstanceRef,
    Member,
    ModelSpec,
    Request,
    Role,
    Timings,
    Token,
)
from distserve.gateway.backend import CompleteEvent, RequestFailed, StreamEvent, TokensEvent
from distserve.gateway.canary import Canary

SPEC = ModelSpec("m", "f", 100, 512, (2,), 2, 2, 16, "float32", 16, 64)
GOOD = Account("p#1", "d#1", 1, 8, 2, 0.1, 0.2, Timings(kv_bytes_moved=4096))


def member(name: str, role: Role, life: int = 1) -> Member:
    return Member(Endpoint(InstanceRef(name, life), f"{name}:1"), role, SPEC)


class Answer:
    """A stream that says what it was told to."""

    request_id = "canary"

    def __init__(self, events: list[StreamEvent | RequestFailed]) -> None:
        self._events = events

    async def __aiter__(self) -> AsyncIterator[StreamEvent]:
        for event in self._events:
            if isinstance(event, RequestFailed):
                raise event
            yield event

    async def aclose(self, finish: FinishReason = FinishReason.CANCELLED) -> Account | None:
        return None


class Gateway:
    """Answers canaries as scripted; good ones when the script is at its end."""

    def __init__(self, *script: list[StreamEvent | RequestFailed]) -> None:
        self.script = list(script)
        self.requests: list[Request] = []
        self.members: list[Member] = []
        self.changes: asyncio.Queue[bool] = asyncio.Queue()
        self.canary = Canary(self, lambda: self.members, self.changes.put_nowait, timeout_s=5.0, seed=1)

    async def submit(self, request: Request, tokenize_s: float) -> Answer:
        self.requests.append(request)
        return Answer(self.script.pop(0) if self.script else good(GOOD))

    def now(self, *members: Member) -> None:
        self.members = list(members)
        self.canary.paths_changed()


def good(account: Account) -> list[StreamEvent | RequestFailed]:
    return [TokensEvent(0, (Token(1),)), TokensEvent(1, (Token(2),)), CompleteEvent(FinishReason.LENGTH, account)]


@pytest.fixture
async def run():
    """Runs a gateway's canary for the time of a test."""
    tasks = []

    def start(gateway: Gateway) -> Gateway:
        tasks.append(asyncio.create_task(gateway.canary.run()))
        return gateway

    yield start
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


PREFILL, DECODE = member("p", Role.PREFILL), member("d", Role.DECODE)


async def test_ready_after_a_canary_went_the_whole_way(run) -> None:
    gateway = run(Gateway())
    gateway.now(PREFILL)
    assert not gateway.canary.ready()
    gateway.now(PREFILL, DECODE)
    assert await gateway.changes.get()
    assert gateway.canary.ready()
    (request,) = gateway.requests
    assert (request.sampling.temperature, request.stopping.max_tokens, request.stopping.min_tokens) == (0.0, 2, 2)
    assert all(token < SPEC.vocab_size for token in request.prompt_token_ids)


@pytest.mark.parametrize(
    "bad",
    [
        good(Account("p#1", "d#1", 1, 8, 2, 0.1, 0.2, Timings())),  # no KV moved
        good(Account("p#1", "p#1", 2, 8, 2, 0.1, 0.2, Timings(kv_bytes_moved=1))),  # a second attempt hid a failure
        [TokensEvent(0, (Token(1),)), CompleteEvent(FinishReason.LENGTH, GOOD)],
        [RequestFailed(Code.UNAVAILABLE, "nobody")],
    ],
)
async def test_a_canary_that_went_wrong_is_sent_again(run, bad) -> None:
    gateway = run(Gateway(bad))
    gateway.now(PREFILL, DECODE)
    assert await gateway.changes.get()
    assert len(gateway.requests) == 2
    assert gateway.requests[0].prompt_token_ids != gateway.requests[1].prompt_token_ids


async def test_readiness_goes_with_the_path_and_comes_back_with_a_new_canary(run) -> None:
    gateway = run(Gateway())
    gateway.now(PREFILL, DECODE)
    assert await gateway.changes.get()
    gateway.now(PREFILL)
    assert not await gateway.changes.get()
    gateway.now(PREFILL, member("d", Role.DECODE, life=2))
    assert await gateway.changes.get()
    assert len(gateway.requests) == 2


async def test_losing_one_of_two_keeps_readiness_without_a_new_canary(run) -> None:
    gateway = run(Gateway())
    other = member("d2", Role.DECODE)
    gateway.now(PREFILL, DECODE, other)
    assert await gateway.changes.get()
    gateway.now(PREFILL, other)
    await asyncio.sleep(0)
    assert gateway.canary.ready()
    assert len(gateway.requests) == 1
    assert gateway.changes.empty()


async def test_one_failure_does_not_end_a_readiness_that_was_and_two_do(run) -> None:
    bad: list[StreamEvent | RequestFailed] = [RequestFailed(Code.INTERNAL, "broken")]
    gateway = run(Gateway(good(GOOD), bad, bad))
    gateway.now(PREFILL, DECODE)
    assert await gateway.changes.get()
    gateway.now(PREFILL, DECODE, member("d2", Role.DECODE))
    assert not await gateway.changes.get()
    assert len(gateway.requests) == 3
    assert await gateway.changes.get()
