"""An instance's network side: the server, the streams, and the way between them and the step loop.

Lives on the asyncio loop, in the main thread. Turns what comes in into events for the inbox and what a turn says into
messages for whoever they are for; decides nothing about either.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc
import grpc.aio

from distserve.core.effects import Controller
from distserve.core.events import Draining, Event
from distserve.core.types import GatewayRef, InstanceRef, Load, Member
from distserve.instance.inbox import Inbox
from distserve.instance.loop import Turn
from distserve.instance.membership import Membership
from distserve.instance.peers import Peers
from distserve.instance.streams import GatewayStreams
from distserve.v1 import control_pb2 as pb
from distserve.v1.control_pb2_grpc import InstanceServiceServicer, add_InstanceServiceServicer_to_server
from distserve.wire.attachments import Context, ServerEnd
from distserve.wire.life import watched
from distserve.wire.trust import OPEN, Trust

T = TypeVar("T")
ANSWER_S = 30.0
"""How long a question may wait for the step that runs."""

EMPTYING_S = 1.0
"""How long the last messages may take to leave."""


@dataclass(frozen=True, slots=True)
class Answers:
    """What the step thread tells operators; run there, between two steps."""

    inspect: Callable[[str, float], pb.InspectResponse]
    kv_check: Callable[[], pb.KvCheckResponse]


@dataclass(slots=True)
class _Standing:
    """What the last turn left behind."""

    load: Load
    idle: asyncio.Event = field(default_factory=asyncio.Event)


class Network:
    """See the module. ``start`` once the instance can serve; ``close`` when its loop has ended, or is about to."""

    def __init__(
        self,
        controller: str,
        member: Member,
        load: Load,
        inbox: Inbox,
        *,
        welcomed: Callable[[], None],
        refused: Callable[[str], None],
        broke: Callable[[BaseException], None],
        trust: Trust = OPEN,
    ) -> None:
        self._broke = broke
        self._trust = trust
        self._member = member
        self._inbox = inbox
        self._now = _Standing(load)
        self._now.idle.set()
        self._gateways = GatewayStreams(member.ref, self._take_in)
        self._peers = Peers(member.endpoint, self._take_in, trust)
        self._membership = Membership(
            controller, member, lambda: self._now.load, self._take_in, welcomed, refused, trust
        )
        self._attendance: asyncio.Task[None] | None = None
        self._server: grpc.aio.Server | None = None

    async def start(self, server: grpc.aio.Server, answers: Answers) -> None:
        """Serve on a bound server and join the controller."""
        servicer = _InstanceService(self._member.ref, self._gateways, self._peers, self._inbox, answers, self._trust)
        add_InstanceServiceServicer_to_server(servicer, server)
        await server.start()
        self._server = server
        self._attendance = watched(self._membership.run(), self._broke)

    def on_turn(self, turn: Turn) -> None:
        """Send what a turn of the step loop said."""
        for send in turn.sends:
            match send.to:
                case GatewayRef():
                    self._gateways.send(send.to, send.event)
                case InstanceRef():
                    self._peers.send(send.to, send.event)
                case Controller():
                    raise TypeError(f"an instance's machine says nothing to the controller, but {send.event}")
        if turn.idle:
            self._now.idle.set()
        else:
            self._now.idle.clear()
        if turn.load != self._now.load:
            self._now.load = turn.load
            self._membership.load_changed()

    def refuse_new(self) -> None:
        """Take no new request and no new move any more."""
        self._gateways.refuse_new()
        self._inbox.put(Draining())

    async def idle(self) -> None:
        """Wait until the machine holds nothing for anybody."""
        await self._now.idle.wait()

    async def leave(self) -> None:
        """Say goodbye to the controller, and let the last messages go."""
        await self._membership.leave()
        try:
            async with asyncio.timeout(EMPTYING_S):
                await self._gateways.emptied()
        except TimeoutError:
            return

    async def close(self) -> None:
        """End every stream that still stands and free the port."""
        if self._attendance is not None:
            self._attendance.cancel()
            await asyncio.wait([self._attendance])
        await self._peers.close()
        with contextlib.suppress(TimeoutError):  # stopping the server breaks what is left
            async with asyncio.timeout(EMPTYING_S):
                await self._gateways.end()
        if self._server is not None:
            await self._server.stop(grace=None)

    def _take_in(self, event: Event) -> None:
        self._peers.learn(event)
        self._inbox.put(event)  # type: ignore[arg-type]  # a relation's wrapper holds only what its reader handles


class _InstanceService(InstanceServiceServicer):
    """Incoming calls."""

    def __init__(
        self,
        me: InstanceRef,
        gateways: GatewayStreams,
        peers: Peers,
        inbox: Inbox,
        answers: Answers,
        trust: Trust,
    ) -> None:
        self._me = me
        self._trust = trust
        self._gateways = gateways
        self._peers = peers
        self._inbox = inbox
        self._answers = answers

    async def AttachGateway(self, request_iterator: AsyncIterator[Any], context: Context) -> None:
        end = ServerEnd(request_iterator, context, self._trust)
        hello = await end.greet(self._me, GatewayRef)
        assert isinstance(hello.sender, GatewayRef)
        await end.guarded(self._gateways.attach(hello.sender, end))

    async def AttachPeer(self, request_iterator: AsyncIterator[Any], context: Context) -> None:
        end = ServerEnd(request_iterator, context, self._trust)
        hello = await end.greet(self._me, InstanceRef)
        await end.guarded(self._peers.accept(hello, end))

    async def Inspect(self, request: pb.InspectRequest, context: Context) -> pb.InspectResponse:
        return await self._ask(context, lambda: self._answers.inspect(request.request_id, time.monotonic()))

    async def KvCheck(self, request: pb.KvCheckRequest, context: Context) -> pb.KvCheckResponse:
        return await self._ask(context, self._answers.kv_check)

    async def _ask(self, context: Context, question: Callable[[], T]) -> T:
        try:
            async with asyncio.timeout(ANSWER_S):
                return await asyncio.wrap_future(self._inbox.ask(question))
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, f"{self._me} is in a step of over {ANSWER_S} s")
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"{self._me} is stopping")
        raise AssertionError("abort raises")
