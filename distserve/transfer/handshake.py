"""How two movers become a link: they name each other, check that their KV fits, and open a lane both can use.

The source dials; the destination proposes lanes, best first, until one opens at both ends. Whatever does not fit is
refused with one sentence that names both sides. Every wait has a deadline; a lane that did not come to be is released
here.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

from distserve.core.types import InstanceRef, Ticket
from distserve.kv.shard import KvPart, Parallel, Route
from distserve.transfer.channel import Channel
from distserve.transfer.config import TransferConfig
from distserve.transfer.device_memory import gpu_of
from distserve.transfer.errors import Garbled, NoTicket, PeerGone, Refused, refusal_of
from distserve.transfer.identity import KINDS, WIRE, Identity, LaneKind
from distserve.transfer.lane import Lane
from distserve.transfer.layout import MAX_SLOT_BYTES, Layout
from distserve.transfer.offers import make_offer, proposal, take_offer
from distserve.transfer.parts import common_part, rank_to_wire
from distserve.transfer.pledge import demand, keep, sign
from distserve.transfer.shm import host_identity
from distserve.transfer.stage import ref_from_wire, ref_to_wire
from distserve.v1 import transfer_pb2 as pb

VERSION = 2
MAX_SLOTS = 256
_NEEDS = {
    LaneKind.SHM: "run on one host",
    LaneKind.NCCL: "keep their KV on two GPUs",
    LaneKind.IPC: "run on one host and both keep their KV on GPUs",
}


@dataclass(slots=True)
class Link:
    """One end of an open link."""

    channel: Channel
    lane: Lane
    kind: LaneKind
    peer: InstanceRef
    part: KvPart  # what it carries
    source_layout: Layout  # of that part
    slot_bytes: int
    slice_bytes: int

    def close(self) -> None:
        """Release socket and lane."""
        if self.kind is LaneKind.IPC:  # the closed socket says that its memory is mapped here no more
            self.lane.close()
        self.channel.close()
        self.lane.close()


# ── the source's side ────────────────────────────────────────────────────────────────────────────────────────────────


def dial(
    me: Identity,
    ticket: Ticket,
    address: str,
    generation: int,
    config: TransferConfig,
    opened: Callable[[Channel], None],
    route: Route,
    parallel: Parallel,
) -> Link:
    """Open a link to the ticket's destination at ``address`` ("host:port"). TransferError when there is none to be had.

    It carries what ``route`` says to one rank of the destination, whose layout is ``parallel``.

    ``opened`` is told of the channel as soon as there is one, so that another thread can interrupt the rest.
    """
    destination = ticket.destination
    host, port = split_address(address)
    deadline = time.monotonic() + config.handshake_s
    try:
        sock = socket.create_connection((host, port), timeout=config.handshake_s)
    except TimeoutError:
        raise PeerGone(f"{destination} at {address} did not answer within {config.handshake_s:g} s") from None
    except UnicodeError as error:  # a host that is no name: an empty label, or one too long
        raise PeerGone(f"{destination} cannot be reached at {address!r}: {error}") from None
    except (OSError, ValueError) as error:
        raise PeerGone(f"{destination} cannot be reached at {address!r}: {getattr(error, 'strerror', error)}") from None
    with contextlib.ExitStack() as undo:
        channel = Channel(sock, config.stall_s)
        undo.callback(channel.close)
        opened(channel)
        hello = _hello(me, destination, generation)
        hello.destination_rank.CopyFrom(rank_to_wire(parallel, route.destination))
        sign(hello, ticket, config.keys)
        channel.send(pb.TransferFrame(hello=hello))
        keep(channel, hello, ticket, config.keys, deadline)
        offer = _expect_offer(channel, deadline)
        while True:
            lane = take_offer(me, channel, offer, host, config)
            if isinstance(lane, str):
                answer = pb.TransferAnswer(reason=lane)
            else:
                undo.callback(lane.close)
                answer = pb.TransferAnswer(ok=True)
            channel.send(pb.TransferFrame(answer=answer))
            frame = _expect(channel, deadline)
            if frame.HasField("ready") and not isinstance(lane, str):
                undo.pop_all()
                return Link(
                    channel,
                    lane,
                    KINDS[offer.kind],
                    destination,
                    route.part,
                    me.layout.of_part(route.part),
                    offer.slot_bytes,
                    offer.slice_bytes,
                )
            if not frame.HasField("offer"):
                raise Garbled("an offer or a last word was expected in the handshake")
            offer = _checked_offer(frame.offer)


def _hello(me: Identity, destination: InstanceRef, generation: int) -> pb.TransferHello:
    shape = me.layout
    return pb.TransferHello(
        version=VERSION,
        source=ref_to_wire(me.ref),
        destination=ref_to_wire(destination),
        fingerprint=me.fingerprint,
        layout=pb.TransferLayout(
            layers=shape.layers,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            dtype=shape.dtype,
            block_size=shape.block_size,
        ),
        kind=WIRE[me.kind],
        generation=generation,
        host=host_identity(),
        cuda=me.device.type == "cuda",
        gpu=gpu_of(me.device),
        source_rank=rank_to_wire(me.cut.parallel, me.rank),
    )


def _expect(channel: Channel, deadline: float) -> pb.TransferFrame:
    frame = channel.receive(max(0.0, deadline - time.monotonic()))
    if frame.HasField("refusal"):
        raise refusal_of(frame.refusal)
    return frame


def _expect_offer(channel: Channel, deadline: float) -> pb.TransferOffer:
    frame = _expect(channel, deadline)
    if not frame.HasField("offer"):
        raise Garbled("an offer was expected in the handshake")
    return _checked_offer(frame.offer)


def _checked_offer(offer: pb.TransferOffer) -> pb.TransferOffer:
    if offer.kind not in KINDS or not 1 <= offer.slots <= MAX_SLOTS or not 1 <= offer.slot_bytes <= MAX_SLOT_BYTES:
        raise Garbled("the peer offered a lane that cannot be")
    return offer


# ── the destination's side ───────────────────────────────────────────────────────────────────────────────────────────


def accept(
    me: Identity, sock: socket.socket, config: TransferConfig, ticket_of: Callable[[str], Ticket | None]
) -> Link:
    """Answer whoever dialled. TransferError when no link came of it; the socket is closed then."""
    with contextlib.ExitStack() as undo:
        channel = Channel(sock, config.stall_s)
        undo.callback(channel.close)
        try:
            link = _agree(me, channel, config, ticket_of)
        except Refused as error:
            refusal = pb.TransferRefusal(reason=str(error), ticket=isinstance(error, NoTicket))
            channel.send(pb.TransferFrame(refusal=refusal))
            raise
        undo.pop_all()
        return link


def _agree(me: Identity, channel: Channel, config: TransferConfig, ticket_of: Callable[[str], Ticket | None]) -> Link:
    deadline = time.monotonic() + config.handshake_s
    frame = channel.receive(config.handshake_s)
    if not frame.HasField("hello"):
        raise Garbled("the first frame was no hello")
    hello = frame.hello
    whole = _checked_hello(me, hello)
    kinds = _candidates(me, hello)
    demand(channel, hello, ticket_of(hello.move_id), me.ref, config.keys, deadline)
    part = common_part(hello, me.ref, me.cut, me.rank)
    layout = whole.of_part(part)
    why = ""
    for kind in kinds:
        offer = proposal(kind, layout, config)
        lane = make_offer(me, channel, hello, offer, config, deadline)
        if not isinstance(lane, str):
            with contextlib.ExitStack() as undo:
                undo.callback(lane.close)
                channel.send(pb.TransferFrame(ready=pb.TransferReady()))
                undo.pop_all()
            peer = ref_from_wire(hello.source)
            return Link(channel, lane, kind, peer, part, layout, offer.slot_bytes, offer.slice_bytes)
        why = f"{kind}: {lane}"
    raise Refused(f"{ref_from_wire(hello.source)} and {me.ref} found no way to move KV between them ({why})")


def _checked_hello(me: Identity, hello: pb.TransferHello) -> Layout:
    """The source's layout, if its KV fits here; Refused otherwise."""
    source = ref_from_wire(hello.source)
    if hello.version != VERSION:
        raise Refused(
            f"{source} speaks version {hello.version} of the transfer protocol and {me.ref} version {VERSION}; "
            "run the same release of distserve on both"
        )
    if ref_from_wire(hello.destination) != me.ref:
        raise Refused(f"{source} asked for {ref_from_wire(hello.destination)} but reached {me.ref}")
    if hello.fingerprint != me.fingerprint:
        raise Refused(
            f"{source} serves a model with fingerprint {hello.fingerprint} and {me.ref} one with {me.fingerprint}; "
            "KV moves only between instances of the same model"
        )
    shape = hello.layout
    layout = Layout(shape.layers, shape.kv_heads, shape.head_dim, shape.dtype, shape.block_size)
    if differs := layout.mismatch(me.layout):
        raise Refused(f"the KV of {source} does not fit that of {me.ref}: {differs}")
    if layout.block_size < 1 or layout.row_bytes > MAX_SLOT_BYTES:
        raise Refused(
            f"{source} has blocks of {layout.block_size} tokens, which {me.ref} cannot stage; choose another block size"
        )
    return layout


def _candidates(me: Identity, hello: pb.TransferHello) -> list[LaneKind]:
    """The lanes worth trying between the two, best first; Refused when a forced one cannot be."""
    source = ref_from_wire(hello.source)
    theirs = KINDS.get(hello.kind, LaneKind.AUTO)
    forced = {theirs, me.kind} - {LaneKind.AUTO}
    if len(forced) > 1:
        raise Refused(f"{source} was told to use {theirs} and {me.ref} to use {me.kind}; tell both the same")
    same_host = hello.host == host_identity()
    both_cuda = hello.cuda and me.device.type == "cuda"
    gpu = gpu_of(me.device)
    ipc, one_gpu = same_host and bool(gpu and hello.gpu), same_host and bool(gpu) and gpu == hello.gpu
    possible = [LaneKind.IPC] * ipc + [LaneKind.NCCL] * (both_cuda and not one_gpu)
    possible += [LaneKind.SHM] * same_host + [LaneKind.GLOO]
    if not forced:
        return possible
    if forced <= set(possible):
        return [*forced]
    kind = next(iter(forced))
    need = _NEEDS[kind]
    raise Refused(f"{source} and {me.ref} were told to use {kind}, for which they must {need}; use auto or gloo")


def split_address(address: str) -> tuple[str, int]:
    """ "host:port" in two; PeerGone when it is no such thing, as with any address that leads nowhere."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not (port.isascii() and port.isdigit()) or len(port) > 5 or int(port) > 65535:
        raise PeerGone(f"{address!r} is no address of the form host:port")
    return host.strip("[]"), int(port)
