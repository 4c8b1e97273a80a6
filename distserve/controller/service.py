"""The controller's shell: the cluster machine, and the streams of the instances and gateways that are attached.

Lives on one asyncio loop. A stream that ends is an event; everything else the machine decides.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any

from google.protobuf.message import Message

from distserve.core.effects import Effect, Send
from distserve.core.events import ClusterEvent, Event, GatewayJoined, GatewayLeft, InstanceLeft, Joined, Reported
from distserve.core.types import GatewayRef, InstanceRef
from distserve.sched.cluster import ClusterState
from distserve.v1 import control_pb2 as pb
from distserve.v1.control_pb2_grpc import ControllerServiceServicer
from distserve.wire.attachments import Attachments, Context, ServerEnd
from distserve.wire.convert import WireError
from distserve.wire.host import MachineHost, Observer
from distserve.wire.stream import Outbox
from distserve.wire.trust import OPEN, Trust

log = logging.getLogger(__name__)
Party = InstanceRef | GatewayRef
OUTBOX_LIMIT = 65_536
"""Unsent messages to one party at which its stream is dropped."""


class ControllerService(ControllerServiceServicer):
    """See the module."""

    def __init__(self, machine: ClusterState, observers: Sequence[Observer] = (), trust: Trust = OPEN) -> None:
        self._trust = trust
        self._host = MachineHost(machine, self._perform, observers)
        self._attached: Attachments[Party] = Attachments(_wrapper, lambda: Outbox(OUTBOX_LIMIT))

    def close(self) -> None:
        """Let nothing more happen; the server breaks the streams."""
        self._host.close()

    async def AttachInstance(self, request_iterator: AsyncIterator[Any], context: Context) -> None:
        """A member's stream."""
        await self._attach(InstanceRef, ServerEnd(request_iterator, context, self._trust))

    async def AttachGateway(self, request_iterator: AsyncIterator[Any], context: Context) -> None:
        """A gateway's stream."""
        await self._attach(GatewayRef, ServerEnd(request_iterator, context, self._trust))

    async def _attach(self, kind: type[InstanceRef] | type[GatewayRef], end: ServerEnd) -> None:
        hello = await end.greet(None, kind)
        await end.guarded(self._serve(hello.sender, end))

    async def _serve(self, party: Party, end: ServerEnd) -> None:
        def went(why: str) -> None:
            log.info("%s left: %s", party, why)
            self._host.handle(_left(party, why))

        await self._attached.serve(
            party,
            end,
            deliver=lambda event: self._take_in(party, event),
            came=lambda: None,  # its first event says so, with more to it
            went=went,
        )

    def _take_in(self, party: Party, event: Event) -> None:
        """Nobody speaks for another."""
        match event:
            case Joined(member, _):
                speaker: Party = member.ref
                log.info("%s joins: %s of %r at %s", speaker, member.role, member.spec.name, member.endpoint.address)
            case GatewayJoined(gateway):
                speaker = gateway
                log.info("gateway %s joins", speaker)
            case _:
                speaker = event.ref if isinstance(event, Reported) else getattr(event, "gateway", party)
        if speaker != party:
            raise WireError(f"{party} sent what only {speaker} may send")
        self._host.handle(event)

    def _perform(self, effect: Effect) -> None:
        match effect:
            case Send(InstanceRef() | GatewayRef() as to, event):
                self._attached.send(to, event)
            case _:
                raise TypeError(f"a controller does not perform {effect}")


def _wrapper(party: Party) -> type[Message]:
    return pb.ControllerToInstance if isinstance(party, InstanceRef) else pb.ControllerToGateway


def _left(party: Party, why: str) -> ClusterEvent:
    return InstanceLeft(party, why) if isinstance(party, InstanceRef) else GatewayLeft(party, why)
