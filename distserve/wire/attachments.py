"""Who is attached to a server: one stream and one outbox each. Who attaches again replaces itself.

Lives on one asyncio loop. What a coming or a going means is for the machine behind the server.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

from distserve.core.events import Event
from distserve.core.types import GatewayRef, InstanceRef
from distserve.wire.channels import ACCEPTED_KEY, PROTOCOL, Hello, HelloRefused, read_hello, sentence
from distserve.wire.convert import WireError
from distserve.wire.stream import Deliver, Outbox, OutboxOverflow, converse
from distserve.wire.trust import OPEN, Trust

P = TypeVar("P")
Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(slots=True)
class _Attachment:
    outbox: Outbox[Event]
    talk: asyncio.Task[None]
    replaced: bool = False
    ended: bool = False  # by us
    gone: asyncio.Event = field(default_factory=asyncio.Event)


class ServerEnd:
    """The server's end of a control stream: take its hello, let it in, converse."""

    def __init__(self, incoming: AsyncIterator[Message], context: Context, trust: Trust = OPEN) -> None:
        self._incoming = incoming
        self._context = context
        self._trust = trust

    async def greet(self, me: InstanceRef | None, kind: type[InstanceRef] | type[GatewayRef]) -> Hello:
        """The hello of the stream, if it is one for us; otherwise ends the call with a sentence."""
        try:
            hello = read_hello(self._context.invocation_metadata(), me)
            if not isinstance(hello.sender, kind):
                raise HelloRefused(f"{hello.sender} opened a stream that is not for its kind")
        except HelloRefused as error:
            await self._context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        return hello

    async def converse(
        self, outbox: Outbox[Event], wrapper: type[Message], deliver: Deliver, turn: asyncio.Lock | None = None
    ) -> None:
        """Say that the hello was taken, then carry both directions, as the function of that name."""
        answer = self._trust.answer(self._context)
        await self._context.send_initial_metadata(((ACCEPTED_KEY, str(PROTOCOL)), *answer))
        await converse(self._incoming, self._context.write, outbox, wrapper, deliver, turn)

    async def guarded(self, serving: Awaitable[None]) -> None:
        """Serve; what the other side did wrong becomes the call's status."""
        try:
            await serving
        except WireError as error:
            await self._context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except OutboxOverflow as error:
            await self._context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        except Replaced as error:
            await self._context.abort(grpc.StatusCode.ABORTED, str(error))


class Replaced(Exception):
    """The same party has attached again; this stream of it is at its end."""


class Attachments(Generic[P]):
    """See the module."""

    def __init__(self, wrapper: Callable[[P], type[Message]], outbox: Callable[[], Outbox[Event]]) -> None:
        self._wrapper = wrapper
        self._outbox = outbox
        self._attached: dict[P, _Attachment] = {}

    def send(self, party: P, event: Event) -> None:
        """Queue an event; dropped if the party is not attached."""
        if (attachment := self._attached.get(party)) is not None:
            attachment.outbox.put(event)

    async def serve(
        self,
        party: P,
        end: ServerEnd,
        *,
        deliver: Deliver,
        came: Callable[[], None],
        went: Callable[[str], None],
    ) -> None:
        """Carry a party's stream to its end; raises as ``converse``. One that is replaced never ``went``.

        The party is told that it is in after ``came``, so that what it says elsewhere cannot come before that.
        """
        while (before := self._attached.get(party)) is not None:
            before.replaced = True
            before.talk.cancel()
            await before.gone.wait()
        outbox = self._outbox()
        talk = asyncio.ensure_future(end.converse(outbox, self._wrapper(party), deliver))
        mine = self._attached[party] = _Attachment(outbox, talk)
        why = "it said goodbye"
        try:
            came()
            await talk
        except asyncio.CancelledError as error:
            why = sentence(error)
            if mine.replaced and not _is_cancelled():
                raise Replaced(f"{party} has attached again, which ends this stream") from None
            if mine.ended and not _is_cancelled():
                why = "we are leaving"
                return
            raise
        except BaseException as error:
            why = sentence(error)
            raise
        finally:
            talk.cancel()
            del self._attached[party]
            if not mine.replaced:
                went(why)
            mine.gone.set()

    async def end(self) -> None:
        """End every stream well, and wait until it has ended: before the server stops, which would break them."""
        for attachment in list(self._attached.values()):
            attachment.ended = True
            attachment.talk.cancel()
            await attachment.gone.wait()

    async def emptied(self) -> None:
        """Wait until all that was queued is written."""
        for attachment in list(self._attached.values()):
            await attachment.outbox.emptied()


def _is_cancelled() -> bool:
    """Whether it is the running task itself that was cancelled, and not what it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
