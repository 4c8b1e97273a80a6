"""One control stream, either end of it: an outbox that never makes its writer wait, and both directions at once.

Knows gRPC's reading and writing and the converter; no machine, no policy.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Generic, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

from distserve.core.events import Event
from distserve.wire.channels import ACCEPTED_KEY, CONNECT_TIMEOUT_S, Hello, dial
from distserve.wire.convert import from_wire, to_wire
from distserve.wire.trust import OPEN, Trust, method_path

E = TypeVar("E")
Deliver = Callable[[Event], None]
STREAM_ENDS = (grpc.aio.AioRpcError, grpc.aio.BaseError, asyncio.InvalidStateError, OSError, TimeoutError)
"""How a stream ends when its other side, or the way there, is gone."""

GOODBYE_S = 1.0
"""How long a goodbye waits for its answer."""


class OutboxOverflow(RuntimeError):
    """The other side reads too slowly; its stream is to be dropped."""


class Outbox(Generic[E]):
    """What waits to be written to one stream, in order. ``put`` never waits; past ``limit`` the stream is forfeit.

    ``weigh`` says how much an event counts against the limit; ``merge`` makes one event of two neighbours, or None
    if they must stay apart: so a writer that lags catches up in few messages. Lives on one asyncio loop.
    """

    def __init__(
        self, limit: int, weigh: Callable[[E], int] = lambda _: 1, merge: Callable[[E, E], E | None] = lambda a, b: None
    ) -> None:
        self.overflow = asyncio.Event()
        self._limit = limit
        self._weigh = weigh
        self._merge = merge
        self._weight = 0
        self._waiting: deque[E] = deque()
        self._filled = asyncio.Event()
        self._emptied = asyncio.Event()
        self._emptied.set()

    def put(self, event: E) -> None:
        """Add an event; what comes after an overflow is dropped, for the stream is at its end."""
        if self.overflow.is_set():
            return
        self._weight += self._weigh(event)
        if self._weight > self._limit:
            self._waiting.clear()
            self.overflow.set()
            return
        self._waiting.append(event)
        self._filled.set()
        self._emptied.clear()

    async def take(self) -> E:
        """The next event, merged with as many after it as go together."""
        while not self._waiting:
            self._emptied.set()
            self._filled.clear()
            await self._filled.wait()
        event = self._waiting.popleft()
        self._weight -= self._weigh(event)
        while self._waiting and (merged := self._merge(event, self._waiting[0])) is not None:
            self._weight -= self._weigh(self._waiting.popleft())
            event = merged
        return event

    async def emptied(self) -> None:
        """Wait until the writer has come back for more and found nothing."""
        await self._emptied.wait()


async def converse(
    incoming: AsyncIterator[Message],
    write: Callable[[Any], Awaitable[None]],
    outbox: Outbox[Any],
    wrapper: type[Message],
    deliver: Deliver,
    turn: asyncio.Lock | None = None,
) -> None:
    """Carry both directions of an open stream. Returns when the other side ends it well; raises when it breaks.

    Raises one of ``STREAM_ENDS``, ``WireError`` for what cannot be understood, or ``OutboxOverflow``. With ``turn``,
    writes only while it holds the lock: of several streams that share an outbox one writes, the others stand by.
    """
    tasks = (
        asyncio.ensure_future(_read(incoming, deliver)),
        asyncio.ensure_future(_write(write, outbox, wrapper, turn)),
        asyncio.ensure_future(_overflow(outbox)),
    )
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _read(incoming: AsyncIterator[Message], deliver: Deliver) -> None:
    async for message in incoming:
        deliver(from_wire(message))


async def _write(
    write: Callable[[Any], Awaitable[None]], outbox: Outbox[Any], wrapper: type[Message], turn: asyncio.Lock | None
) -> None:
    async with turn or asyncio.Lock():
        while True:
            await write(to_wire(wrapper, await outbox.take()))


async def _overflow(outbox: Outbox[Any]) -> None:
    await outbox.overflow.wait()
    raise OutboxOverflow("the other side reads too slowly")


class DialledStream:
    """The client's end of a control stream: dial, be accepted, converse, hang up. One use, on one asyncio loop."""

    def __init__(
        self,
        address: str,
        stub: Callable[[grpc.aio.Channel], Any],
        method: str,
        hello: Hello,
        trust: Trust = OPEN,
    ) -> None:
        self._address = address
        self._trust = trust
        self._channel = dial(address, trust)
        attach = getattr(stub(self._channel), method)
        metadata, self._proof = trust.prove(method_path(stub, method), hello.metadata())
        self._call: grpc.aio.StreamStreamCall[Any, Any] = attach(metadata=metadata)

    async def accepted(self) -> None:
        """Wait until the other side took the hello. Raises one of ``STREAM_ENDS`` with its sentence if it did not."""
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            metadata = await self._call.initial_metadata()
            if all(key != ACCEPTED_KEY for key, _ in metadata):  # a refused call has initial metadata too
                raise await self._failure()
            if not self._trust.is_answered(self._proof, metadata):
                raise _error(
                    grpc.StatusCode.UNAUTHENTICATED,
                    f"we refused {self._address}: it does not know our cluster secret; give both the same "
                    "--cluster-secret-file (or DISTSERVE_CLUSTER_SECRET)",
                )

    async def converse(
        self, outbox: Outbox[Any], wrapper: type[Message], deliver: Deliver, turn: asyncio.Lock | None = None
    ) -> None:
        """As the function of that name."""
        await converse(aiter(self._call), self._call.write, outbox, wrapper, deliver, turn)

    async def goodbye(self) -> None:
        """Half-close, so that the other side knows that we left on purpose, and let it end the stream."""
        try:
            async with asyncio.timeout(GOODBYE_S):
                await self._call.done_writing()
                await self._call.code()
        except STREAM_ENDS:
            return

    async def close(self) -> None:
        """Hang up. Idempotent."""
        self._call.cancel()
        await self._channel.close(None)

    async def _failure(self) -> grpc.aio.AioRpcError:
        code, details = await self._call.code(), await self._call.details()
        return _error(code, self._trust.explained(details or "", self._address))


def _error(code: grpc.StatusCode, details: str) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details, "")
