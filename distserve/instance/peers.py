"""Control streams between instances: one conversation a pair, whoever dialled.

The source of a move dials; replies ride back on the same stream. When a pair's last stream breaks, one fresh dial
decides: it stands again, or this life of the peer is lost and the machine is told. Knows no move.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field

from distserve.core.events import Event, MembersChanged, PeerLost, ReserveAsked, Submit
from distserve.core.types import Endpoint, InstanceRef
from distserve.v1.control_pb2 import PeerMessage
from distserve.v1.control_pb2_grpc import InstanceServiceStub
from distserve.wire.attachments import ServerEnd
from distserve.wire.channels import Hello, sentence
from distserve.wire.convert import WireError
from distserve.wire.stream import STREAM_ENDS, Deliver, DialledStream, Outbox, OutboxOverflow
from distserve.wire.trust import OPEN, Trust

log = logging.getLogger(__name__)
OUTBOX_LIMIT = 16_384
"""Unsent messages to one peer at which it counts as lost."""

BREAKS = (*STREAM_ENDS, WireError, OutboxOverflow)


@dataclass(slots=True)
class _Peer:
    """One life of another instance, and the streams that stand with it."""

    ref: InstanceRef
    outbox: Outbox[Event] = field(default_factory=lambda: Outbox(OUTBOX_LIMIT))
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)  # of the streams that stand, one writes
    streams: int = 0
    dialling: asyncio.Task[None] | None = None


class Peers:
    """Every instance that was spoken to. Lives on the asyncio loop. ``deliver`` has ``learn`` see events too."""

    def __init__(self, me: Endpoint, deliver: Deliver, trust: Trust = OPEN) -> None:
        self._me = me
        self._trust = trust
        self._deliver = deliver
        self._peers: dict[InstanceRef, _Peer] = {}
        self._addresses: dict[InstanceRef, str] = {}
        self._closed = False

    def learn(self, event: Event) -> None:
        """Note where instances can be dialled, from what an event says of them; forget those that left."""
        match event:
            case Submit():
                self._addresses[event.decode.ref] = event.decode.address
            case ReserveAsked():
                self._addresses[event.source.ref] = event.source.address
            case MembersChanged(_, members, lost):
                self._addresses.update({member.ref: member.endpoint.address for member in members})
                for ref in lost:
                    self._addresses.pop(ref, None)

    def send(self, ref: InstanceRef, event: Event) -> None:
        """Queue a message for a peer, dialling it if no stream stands."""
        peer = self._peers.get(ref)
        if peer is None:
            if ref not in self._addresses:
                self._deliver(PeerLost(ref, f"nobody knows where {ref} is"))
                return
            peer = self._peers[ref] = _Peer(ref)
        peer.outbox.put(event)
        self._ensure(peer)

    async def accept(self, hello: Hello, end: ServerEnd) -> None:
        """Serve a stream that a peer dialled, until it ends. Raises as ``converse``."""
        assert isinstance(hello.sender, InstanceRef)
        if hello.endpoint is not None:
            self._addresses[hello.sender] = hello.endpoint.address
        peer = self._peers.setdefault(hello.sender, _Peer(hello.sender))
        peer.streams += 1
        try:
            await end.converse(peer.outbox, PeerMessage, self._deliver, peer.turn)
        finally:
            peer.streams -= 1
            if self._peers.get(peer.ref) is peer:
                self._ensure(peer)

    async def close(self) -> None:
        """Hang up on everybody."""
        self._closed = True
        tasks = [peer.dialling for peer in self._peers.values() if peer.dialling is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ensure(self, peer: _Peer) -> None:
        """Dial, unless a stream stands or is on its way."""
        if peer.streams == 0 and not self._closed and (peer.dialling is None or peer.dialling.done()):
            peer.dialling = asyncio.ensure_future(self._dial(peer))

    async def _dial(self, peer: _Peer) -> None:
        """Keep a stream that we dialled, for as long as dialling works. Ends with the loss of the peer."""
        while True:
            try:
                await self._converse(peer)
                why = "it hung up"
            except _NotReached as error:
                if peer.streams == 0:
                    self._lose(peer, str(error))
                return
            except BREAKS as error:
                why = sentence(error)
            log.info("stream to %s broke: %s", peer.ref, why)
            if peer.outbox.overflow.is_set():
                self._lose(peer, why)
                return
            if peer.streams > 0:
                return

    async def _converse(self, peer: _Peer) -> None:
        address = self._addresses.get(peer.ref)
        if address is None:
            raise _NotReached(f"{peer.ref} left the cluster")
        hello = Hello(self._me.ref, peer.ref, self._me)
        stream = DialledStream(address, InstanceServiceStub, "AttachPeer", hello, self._trust)
        try:
            try:
                await stream.accepted()
            except STREAM_ENDS as error:
                raise _NotReached(f"{peer.ref} cannot be reached at {address}: {sentence(error)}") from error
            peer.streams += 1
            try:
                await stream.converse(peer.outbox, PeerMessage, self._deliver, peer.turn)
            finally:
                peer.streams -= 1
        finally:
            await stream.close()

    def _lose(self, peer: _Peer, why: str) -> None:
        log.warning("peer %s lost: %s", peer.ref, why)
        self._peers.pop(peer.ref, None)
        self._addresses.pop(peer.ref, None)
        self._deliver(PeerLost(peer.ref, why))


class _NotReached(Exception):
    """A dial failed."""
