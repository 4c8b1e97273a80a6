"""The gateways attached to an instance: one outbox each, so that none can stall a step or another gateway.

Knows streams and the converter. What a gateway's coming or going means is the machine's concern.
"""

from __future__ import annotations

import logging

from distserve.core.events import AttemptFailed, Event, GatewayAttached, GatewayLost, Submit, TokensMade
from distserve.core.types import Code, GatewayRef, InstanceRef
from distserve.v1.control_pb2 import InstanceToGateway
from distserve.wire.attachments import Attachments, ServerEnd
from distserve.wire.stream import Deliver, Outbox

log = logging.getLogger(__name__)
OUTBOX_LIMIT = 262_144
"""Unsent outputs of one gateway at which its stream is dropped (some 20 MiB)."""

MESSAGE_LIMIT = 4096
"""Outputs in one message at most, when a lagging gateway catches up."""


def weight(event: Event) -> int:
    """How much an event counts against an outbox: its tokens, and one for itself."""
    return 1 + sum(len(output.tokens) for output in event.outputs) if isinstance(event, TokensMade) else 1


def merged(first: Event, second: Event) -> TokensMade | None:
    """Two steps' tokens as one message; None for anything else, or if it would grow too long."""
    if not (isinstance(first, TokensMade) and isinstance(second, TokensMade)):
        return None
    if len(first.outputs) + len(second.outputs) > MESSAGE_LIMIT:
        return None
    return TokensMade(first.source, first.outputs + second.outputs)


class GatewayStreams:
    """All gateways that are attached now. Lives on the asyncio loop."""

    def __init__(self, me: InstanceRef, deliver: Deliver) -> None:
        self._me = me
        self._deliver = deliver
        self._closing = False
        self._attached: Attachments[GatewayRef] = Attachments(
            lambda _: InstanceToGateway, lambda: Outbox(OUTBOX_LIMIT, weight, merged)
        )

    def send(self, gateway: GatewayRef, event: Event) -> None:
        """Queue an event for a gateway; dropped if it is not attached, for its requests have ended then."""
        self._attached.send(gateway, event)

    async def attach(self, gateway: GatewayRef, end: ServerEnd) -> None:
        """Serve a gateway's stream until it ends. Raises as ``converse``."""

        def came() -> None:
            log.info("gateway %s attached", gateway)
            self._deliver(GatewayAttached(gateway))

        def went(why: str) -> None:
            log.info("gateway %s lost: %s", gateway, why)
            self._deliver(GatewayLost(gateway))

        await self._attached.serve(gateway, end, deliver=self._take_in, came=came, went=went)

    def refuse_new(self) -> None:
        """From now on answer every new request with "elsewhere, please"."""
        self._closing = True

    async def emptied(self) -> None:
        """Wait until all that was queued is written."""
        await self._attached.emptied()

    async def end(self) -> None:
        """End every stream, well."""
        await self._attached.end()

    def _take_in(self, event: Event) -> None:
        if self._closing and isinstance(event, Submit):
            message = f"{self._me} is shutting down"
            failed = AttemptFailed(
                self._me, event.request.id, event.epoch, Code.UNAVAILABLE, message, retriable=True, culprit=self._me
            )
            self.send(event.gateway, failed)
            return
        self._deliver(event)
