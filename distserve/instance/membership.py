"""An instance's standing with the controller: dial, join, report, and dial again whenever the stream ends.

Reports have their own timer, on the network's thread: a long step never looks like a death.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from distserve.core.events import (
    ControllerFound,
    ControllerLost,
    Event,
    JoinAsked,
    Joined,
    JoinRefused,
    Reported,
    Welcomed,
)
from distserve.core.types import Load, Member
from distserve.v1.control_pb2 import InstanceToController
from distserve.v1.control_pb2_grpc import ControllerServiceStub
from distserve.wire.channels import Backoff, Hello, sentence
from distserve.wire.convert import WireError
from distserve.wire.stream import STREAM_ENDS, Deliver, DialledStream, Outbox, OutboxOverflow
from distserve.wire.trust import OPEN, Trust

log = logging.getLogger(__name__)
SHORTEST_GAP_S = 0.1
"""Between two reports, however fast the load changes."""

WELCOME_S = 10.0
"""How long the controller may take to answer a join."""

OUTBOX_LIMIT = 1024


class Membership:
    """See the module. ``run`` is its one task; ``refused`` is called when the controller will not have us."""

    def __init__(
        self,
        address: str,
        member: Member,
        load: Callable[[], Load],
        deliver: Deliver,
        welcomed: Callable[[], None],
        refused: Callable[[str], None],
        trust: Trust = OPEN,
    ) -> None:
        self._trust = trust
        self._address = address
        self._member = member
        self._load = load
        self._deliver = deliver
        self._welcomed = welcomed
        self._refused = refused
        self._changed = asyncio.Event()
        self._lease: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._stream: DialledStream | None = None
        self._outbox: Outbox[Event] = Outbox(OUTBOX_LIMIT)
        self._leaving = False

    def load_changed(self) -> None:
        """There is something new to report."""
        self._changed.set()

    async def run(self) -> None:
        """Stay a member until cancelled."""
        backoff = Backoff(self._member.ref.incarnation)
        while not self._leaving:
            hello = Hello(self._member.ref, endpoint=self._member.endpoint)
            self._stream = DialledStream(self._address, ControllerServiceStub, "AttachInstance", hello, self._trust)
            try:
                await self._attend(self._stream, backoff)
                why = "it ended the stream"
            except (*STREAM_ENDS, WireError, OutboxOverflow) as error:
                why = sentence(error)
            finally:
                await self._stream.close()
            if not self._leaving:
                log.warning("no controller at %s: %s; dialling again", self._address, why)
                await asyncio.sleep(backoff.pause_s())

    async def leave(self) -> None:
        """Say goodbye while ``run`` still runs, so that nobody has to wait for the lease; ``run`` ends then."""
        self._leaving = True
        if self._stream is not None:
            await self._stream.goodbye()

    async def _attend(self, stream: DialledStream, backoff: Backoff) -> None:
        """One stream's life."""
        await stream.accepted()
        outbox = self._outbox = Outbox(OUTBOX_LIMIT)
        outbox.put(Joined(self._member, self._load()))
        self._lease = asyncio.get_running_loop().create_future()
        self._deliver(ControllerFound())
        reports = asyncio.ensure_future(self._report(outbox, backoff))
        talk = asyncio.ensure_future(stream.converse(outbox, InstanceToController, self._take_in))
        try:
            await asyncio.wait((talk, reports), return_when=asyncio.FIRST_COMPLETED)
            for task in (talk, reports):
                if task.done():
                    task.result()
        finally:
            for task in (talk, reports):
                task.cancel()
            await asyncio.gather(talk, reports, return_exceptions=True)
            self._deliver(ControllerLost())

    async def _report(self, outbox: Outbox[Event], backoff: Backoff) -> None:
        """On change at most every ``SHORTEST_GAP_S``, and at least three times a lease."""
        async with asyncio.timeout(WELCOME_S):
            lease_s = await asyncio.shield(self._lease)
        backoff.reset()
        while True:
            try:
                async with asyncio.timeout(lease_s / 3):
                    await self._changed.wait()
            except TimeoutError:
                pass
            self._changed.clear()
            outbox.put(Reported(self._member.ref, self._load()))
            await asyncio.sleep(SHORTEST_GAP_S)

    def _take_in(self, event: Event) -> None:
        match event:
            case Welcomed(lease_s):
                log.info("%s joined the controller at %s", self._member.ref, self._address)
                if not self._lease.done():
                    self._lease.set_result(lease_s)
                self._welcomed()
            case JoinAsked():
                log.warning("%s was taken for dead; joining again", self._member.ref)
                self._outbox.put(Joined(self._member, self._load()))
            case JoinRefused(reason):
                log.error("the controller refused this instance: %s", reason)
                self._refused(reason)
        self._deliver(event)
