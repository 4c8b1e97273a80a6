"""A client's stream: nothing lost when its reader lags, and an end however it comes to one."""

from __future__ import annotations

import pytest

from distserve.core.effects import Account, Complete, Deliver, Fail
from distserve.core.types import Code, FinishReason, Timings, Token
from distserve.gateway.backend import CompleteEvent, RequestFailed, TokensEvent
from distserve.gateway.client_stream import ClientStream

ACCOUNT = Account("p", "d", 1, 3, 2, 0.1, 0.2, Timings())


class Held:
    """A stream, the machine's side of its cancellation, and a clock."""

    def __init__(self) -> None:
        self.now = 10.0
        self.cancelled: list[FinishReason] = []
        self.stream = ClientStream("r", self._cancel, lambda: self.now)

    def _cancel(self, finish: FinishReason) -> None:
        self.cancelled.append(finish)
        self.stream.take(Complete("r~1", finish, ACCOUNT))

    def deliver(self, first: int, *ids: int) -> None:
        self.stream.take(Deliver("r~1", first, tuple(Token(i) for i in ids)))


async def test_a_lagging_reader_gets_all_tokens_in_one_event() -> None:
    held = Held()
    held.deliver(0, 5)
    held.deliver(1, 6, 7)
    assert await anext(held.stream) == TokensEvent(0, (Token(5), Token(6), Token(7)))
    held.deliver(3, 8)
    held.stream.take(Complete("r~1", FinishReason.LENGTH, ACCOUNT))
    assert await anext(held.stream) == TokensEvent(3, (Token(8),))
    assert await anext(held.stream) == CompleteEvent(FinishReason.LENGTH, ACCOUNT)
    with pytest.raises(StopAsyncIteration):
        await anext(held.stream)
    assert held.cancelled == []


async def test_a_failure_comes_after_the_tokens_before_it() -> None:
    held = Held()
    held.deliver(0, 5)
    held.stream.take(Fail("r~1", Code.UNAVAILABLE, "nobody", 2.0))
    assert await anext(held.stream) == TokensEvent(0, (Token(5),))
    with pytest.raises(RequestFailed, match="nobody") as caught:
        await anext(held.stream)
    assert (caught.value.code, caught.value.retry_after_s) == (Code.UNAVAILABLE, 2.0)
    assert await held.stream.aclose() is None


async def test_closing_cancels_once_and_gives_the_account() -> None:
    held = Held()
    held.deliver(0, 5)
    assert await held.stream.aclose(FinishReason.STOP) == ACCOUNT
    assert await held.stream.aclose() == ACCOUNT
    assert held.cancelled == [FinishReason.STOP]
    with pytest.raises(StopAsyncIteration):
        await anext(held.stream)


async def test_unread_since_the_first_token_left_behind() -> None:
    held = Held()
    assert held.stream.unread_since is None
    held.deliver(0, 5)
    held.now = 11.0
    held.deliver(1, 6)
    assert held.stream.unread_since == 10.0
    await anext(held.stream)
    assert held.stream.unread_since is None


async def test_cut_off_drops_what_was_unread_and_says_why() -> None:
    held = Held()
    held.deliver(0, 5)
    held.stream.cut_off(RequestFailed(Code.RESOURCE_EXHAUSTED, "not read"))
    assert held.cancelled == [FinishReason.CANCELLED]
    with pytest.raises(RequestFailed, match="not read"):
        await anext(held.stream)
