"""A gateway's control streams: one to the controller, one to every member. Dialled again whenever they break.

Knows addresses and streams. What a link's coming or going means is the machine's concern.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc

from distserve.core.events import (
    ControllerFound,
    ControllerLost,
    Event,
    GatewayJoined,
    InstanceFound,
    InstanceLost,
    MembersChanged,
)
from distserve.core.types import Endpoint, GatewayRef, InstanceRef
from distserve.v1.control_pb2 import GatewayToController, GatewayToInstance
from distserve.v1.control_pb2_grpc import ControllerServiceStub, InstanceServiceStub
from distserve.wire.channels import Backoff, Hello, sentence
from distserve.wire.convert import WireError
from distserve.wire.life import watched
from distserve.wire.stream import STREAM_ENDS, Deliver, DialledStream, Outbox, OutboxOverflow
from distserve.wire.trust import OPEN, Trust

log = logging.getLogger(__name__)
BREAKS = (*STREAM_ENDS, WireError, OutboxOverflow)
OUTBOX_LIMIT = 65_536
"""Unsent messages to one other side at which its stream is dropped."""

UNLISTED_S = 60.0
"""How long a life that no controller lists any more is still dialled: a restarted controller may not know it yet."""


class ControllerLink:
    """The stream to the controller. ``run`` is its one task."""

    def __init__(self, me: GatewayRef, address: str, deliver: Deliver, trust: Trust = OPEN) -> None:
        self._me = me
        self._trust = trust
        self._address = address
        self._deliver = deliver
        self._outbox: Outbox[Event] | None = None
        self._stream: DialledStream | None = None

    def send(self, event: Event) -> None:
        """Queue an event; dropped while there is no controller, as the machine expects."""
        if self._outbox is not None:
            self._outbox.put(event)

    async def run(self) -> None:
        """Stay attached until cancelled."""
        backoff = Backoff(self._me.incarnation)
        while True:
            hello = Hello(self._me)
            self._stream = DialledStream(self._address, ControllerServiceStub, "AttachGateway", hello, self._trust)
            try:
                await self._attend(self._stream, backoff)
                why = "it ended the stream"
            except BREAKS as error:
                why = sentence(error)
            finally:
                await self._stream.close()
            log.warning("no controller at %s: %s; dialling again", self._address, why)
            await asyncio.sleep(backoff.pause_s())

    async def _attend(self, stream: DialledStream, backoff: Backoff) -> None:
        await stream.accepted()
        backoff.reset()
        outbox: Outbox[Event] = Outbox(OUTBOX_LIMIT)
        outbox.put(GatewayJoined(self._me))
        self._outbox = outbox
        log.info("attached to the controller at %s", self._address)
        self._deliver(ControllerFound())
        try:
            await stream.converse(outbox, GatewayToController, self._deliver)
        finally:
            self._outbox = None
            self._deliver(ControllerLost())


@dataclass(slots=True)
class _Link:
    """The stream to one life of an instance, while it stands and between."""

    endpoint: Endpoint
    outbox: Outbox[Event] = field(default_factory=lambda: Outbox(OUTBOX_LIMIT))
    task: asyncio.Task[None] | None = None
    listed: bool = True
    unlisted_at: float = 0.0


class InstanceLinks:
    """The streams to all members."""

    def __init__(
        self, me: GatewayRef, deliver: Deliver, broke: Callable[[BaseException], None], trust: Trust = OPEN
    ) -> None:
        self._me = me
        self._trust = trust
        self._deliver = deliver
        self._broke = broke
        self._links: dict[InstanceRef, _Link] = {}

    def follow(self, event: MembersChanged) -> None:
        """Dial who is new; stop dialling who is gone. A stream that stands is left standing."""
        listed = {member.ref: member.endpoint for member in event.members}
        lives = {member.ref.id: member.ref for member in event.members}
        now = asyncio.get_running_loop().time()
        for ref, link in self._links.items():
            if link.listed and ref not in listed:
                link.listed, link.unlisted_at = False, now
            if ref in event.lost or lives.get(ref.id, ref) != ref:
                link.listed, link.unlisted_at = False, now - UNLISTED_S
        for ref, endpoint in listed.items():
            link = self._links.setdefault(ref, _Link(endpoint))
            link.listed = True
            if link.task is None:
                link.task = watched(self._run(ref, link), self._broke)

    def send(self, ref: InstanceRef, event: Event) -> None:
        """Queue an event for an instance; dropped when there is no stream, as the machine expects."""
        if (link := self._links.get(ref)) is not None:
            link.outbox.put(event)

    async def close(self) -> None:
        """Hang up on everybody."""
        tasks = [link.task for link in self._links.values() if link.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, ref: InstanceRef, link: _Link) -> None:
        """Keep a stream to one life, until it is gone for good."""
        backoff = Backoff(self._me.incarnation ^ ref.incarnation)
        try:
            while self._wanted(link):
                hello = Hello(self._me, to=ref)
                stream = DialledStream(link.endpoint.address, InstanceServiceStub, "AttachGateway", hello, self._trust)
                try:
                    await self._attend(stream, ref, link, backoff)
                    why = "it ended the stream"
                except BREAKS as error:
                    why = sentence(error)
                    if isinstance(error, grpc.aio.AioRpcError) and error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                        log.warning("%s will not be dialled again: %s", ref, why)
                        return
                finally:
                    await stream.close()
                log.info("no stream to %s: %s", ref, why)
                if self._wanted(link):
                    await asyncio.sleep(backoff.pause_s())
        finally:
            self._links.pop(ref, None)

    async def _attend(self, stream: DialledStream, ref: InstanceRef, link: _Link, backoff: Backoff) -> None:
        await stream.accepted()
        backoff.reset()
        link.outbox = Outbox(OUTBOX_LIMIT)
        log.info("attached to %s at %s", ref, link.endpoint.address)
        why = "it ended the stream"
        self._deliver(InstanceFound(ref))
        try:
            await stream.converse(link.outbox, GatewayToInstance, self._deliver)
        except BREAKS as error:
            why = sentence(error)
            raise
        finally:
            self._deliver(InstanceLost(ref, why))

    def _wanted(self, link: _Link) -> bool:
        return link.listed or asyncio.get_running_loop().time() - link.unlisted_at < UNLISTED_S
