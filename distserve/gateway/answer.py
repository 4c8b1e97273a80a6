"""From the backend's token streams to a client's answer: text, log probabilities, stop texts, several choices.

Owns the life of an admitted plan's streams: whoever stops reading early closes them all. Knows nothing of HTTP or
gRPC; the events here are what both turn into their own words.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from distserve.core.effects import Account
from distserve.core.types import Code, FinishReason, Request, Token
from distserve.gateway.backend import Backend, CompleteEvent, RequestFailed, RequestStream, StreamEvent
from distserve.gateway.detokenize import Detokenizer, StopFinder
from distserve.gateway.plan import Plan


@dataclass(frozen=True, slots=True)
class Piece:
    """What is new of one index. ``text`` may lag behind ``tokens``; ``offsets`` say, for each token, at which character
    of the index's text it begins."""

    index: int
    first_token: int
    tokens: tuple[Token, ...]
    text: str
    offsets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Ended:
    """One index is complete. ``matched``: the stop text or stop token that ended it."""

    index: int
    reason: FinishReason
    matched: str | int | None
    output_tokens: int
    account: Account | None


AnswerEvent = Piece | Ended


@dataclass(slots=True)
class Choice:
    """One index's text so far: tokens in, pieces out. Its outcome is a function of the tokens alone."""

    index: int
    request: Request
    detokenizer: Detokenizer
    stops: StopFinder
    include_stop: bool
    tokens: int = 0
    chars: int = 0  # of whole characters, held back or not
    matched: str | int | None = None
    stop_tokens: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        self.stop_tokens = frozenset(self.request.stopping.stop_token_ids)

    def take(self, tokens: Sequence[Token]) -> Piece:
        """The piece that these next tokens make. Tokens past the one that ends the answer are dropped."""
        first, taken, text, offsets = self.tokens, [], [], []
        for token in tokens:
            taken.append(token)
            offsets.append(self.chars)
            text.append(self._take_one(token.id))
            if self.matched is not None:
                break
        return Piece(self.index, first, tuple(taken), "".join(text), tuple(offsets))

    def rest(self) -> str:
        """The text held back, once no more tokens come."""
        if isinstance(self.matched, str):
            return ""
        shown, stop = self._search(self.detokenizer.finish())
        if stop:
            self.matched = stop
            return shown
        return shown + self.stops.finish()

    def _take_one(self, token_id: int) -> str:
        self.tokens += 1
        if token_id in self.stop_tokens:
            self.matched = token_id
            return self.detokenizer.push(token_id) if self.include_stop else ""
        text = self.detokenizer.push(token_id)
        self.chars += len(text)
        if self.tokens < self.request.stopping.min_tokens:
            return text
        shown, stop = self._search(text)
        if stop:
            self.matched = stop
        return shown

    def _search(self, text: str) -> tuple[str, str]:
        shown, stop = self.stops.push(text)
        return (shown + stop, stop) if stop and self.include_stop else (shown, stop)


class Answer:
    """The answer to one plan, as it is made. Iterate it, and ``aclose`` it on every way out.

    Iteration raises ``RequestFailed``; the other choices are cancelled then. Ends when every index has ended.
    """

    def __init__(self, plan: Plan, streams: Sequence[RequestStream], closed: Callable[[], None] = lambda: None) -> None:
        self.plan = plan
        self.choices = tuple(_choice(plan, i) for i in range(len(streams)))
        self._streams = tuple(streams)
        self._closed = closed
        self._events = self._one() if len(streams) == 1 else self._many()

    def __aiter__(self) -> AsyncIterator[AnswerEvent]:
        return self._events

    async def aclose(self) -> None:
        """Cancel what still runs. Idempotent."""
        try:
            await self._events.aclose()
            await _close(self._streams)
        finally:
            self._closed()

    @property
    def completion_tokens(self) -> int:
        return sum(choice.tokens for choice in self.choices)

    async def _one(self) -> AsyncGenerator[AnswerEvent, None]:
        async for event in self._streams[0]:
            for made in await self._advance(0, event):
                yield made
                if isinstance(made, Ended):
                    return
        raise _cut_short(self._streams[0].request_id)

    async def _many(self) -> AsyncGenerator[AnswerEvent, None]:
        """All streams at once. The queue is short, so that a slow reader leaves tokens where they are bounded."""
        queue: asyncio.Queue[AnswerEvent | Exception] = asyncio.Queue(len(self._streams))
        pumps = [asyncio.create_task(self._pump(i, queue)) for i in range(len(self._streams))]
        open_streams = len(pumps)
        try:
            while open_streams:
                event = await queue.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                open_streams -= isinstance(event, Ended)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump(self, index: int, queue: asyncio.Queue[AnswerEvent | Exception]) -> None:
        try:
            async for event in self._streams[index]:
                for made in await self._advance(index, event):
                    await queue.put(made)
                    if isinstance(made, Ended):
                        return
            raise _cut_short(self._streams[index].request_id)
        except Exception as failure:  # of any kind, a bug too: whoever reads the queue would wait for ever
            await queue.put(failure)

    async def _advance(self, index: int, event: StreamEvent) -> list[AnswerEvent]:
        choice = self.choices[index]
        if isinstance(event, CompleteEvent):
            return _complete(choice, event)
        piece = choice.take(event.tokens)
        if not isinstance(choice.matched, str):
            return [piece]
        account = await self._streams[index].aclose(FinishReason.STOP)
        return [piece, Ended(index, FinishReason.STOP, choice.matched, choice.tokens, account)]


async def open_answer(plan: Plan, backend: Backend, closed: Callable[[], None] = lambda: None) -> Answer:
    """Submit every request of the plan. Raises ``RequestFailed``, with nothing left running, if one is refused.

    ``closed`` is called, once or more, when the answer is closed.
    """
    streams: list[RequestStream] = []
    try:
        for request in plan.requests:
            streams.append(await backend.submit(request, plan.tokenize_s))
        return Answer(plan, streams, closed)
    except BaseException:
        await _close(streams)
        raise


def _complete(choice: Choice, event: CompleteEvent) -> list[AnswerEvent]:
    if event.finish is FinishReason.CANCELLED:
        raise RequestFailed(Code.CANCELLED, f"Request {choice.request.id} was cancelled.")
    if event.finish is FinishReason.ERROR:
        raise RequestFailed(Code.INTERNAL, f"Request {choice.request.id} ended with an error.")
    text = choice.rest()
    reason = event.finish if choice.matched is None else FinishReason.STOP
    ended = Ended(choice.index, reason, choice.matched, choice.tokens, event.account)
    return [Piece(choice.index, choice.tokens, (), text, ()), ended] if text else [ended]


def _cut_short(request_id: str) -> RequestFailed:
    return RequestFailed(Code.INTERNAL, f"The answer to request {request_id} broke off without an end.")


def _choice(plan: Plan, index: int) -> Choice:
    detokenizer = Detokenizer(plan.served.codec, plan.skip_special_tokens)
    return Choice(index, plan.requests[index], detokenizer, StopFinder(plan.stop), plan.include_stop)


async def _close(streams: Sequence[RequestStream]) -> None:
    """Close all, also when closing one fails; the first failure is raised at the end."""
    results = await asyncio.gather(*(stream.aclose() for stream in streams), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
