"""How two movers become a link: they name each other, check that their KV fits, and open a lane both can use.

The source dials; the destination proposes lanes, best first, until one opens at both ends. Whatever does not fit is
refused with one sentence that names both sides. Every wait has a deadline; a lane that did not come to be is released
here.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import torch

from distserve.core.types import InstanceRef, Ticket
from distserve.kv.shard import KvCut, KvPart, Parallel, Route
from distserve.transfer.channel import Channel
from distserve.transfer.config import TransferConfig
from distserve.transfer.errors import Garbled, LaneFailed, NoTicket, PeerGone, Refused, TransferError, refusal_of
from distserve.transfer.group import GroupLane, join_store, open_store
from distserve.transfer.lane import Lane
from distserve.transfer.layout import MAX_SLOT_BYTES, Layout
from distserve.transfer.parts import common_part, rank_to_wire
from distserve.transfer.pledge import demand, keep, sign
from distserve.transfer.shm import Segment, ShmLane, host_identity
from distserve.transfer.stage import ref_from_wire, ref_to_wire
from distserve.v1 import transfer_pb2 as pb

VERSION = 2
MAX_SLOTS = 256
_HOST = torch.device("cpu")


class LaneKind(StrEnum):
    """How payload travels; ``AUTO`` lets the pair choose."""

    AUTO = "auto"
    SHM = "shm"
    GLOO = "gloo"
    NCCL = "nccl"


_WIRE: dict[LaneKind, pb.TransferLaneKind] = {
    LaneKind.AUTO: pb.TRANSFER_LANE_KIND_AUTO,
    LaneKind.SHM: pb.TRANSFER_LANE_KIND_SHM,
    LaneKind.GLOO: pb.TRANSFER_LANE_KIND_GLOO,
    LaneKind.NCCL: pb.TRANSFER_LANE_KIND_NCCL,
}
_KINDS = {wire: kind for kind, wire in _WIRE.items()}


@dataclass(frozen=True, slots=True)
class Identity:
    """What one end says of itself."""

    ref: InstanceRef
    fingerprint: str
    layout: Layout  # of the whole instance
    kind: LaneKind
    device: torch.device  # of the pool
    cut: KvCut
    rank: int


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
            lane = _take_offer(me, channel, offer, host, config)
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
                    _KINDS[offer.kind],
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
        kind=_WIRE[me.kind],
        generation=generation,
        host=host_identity(),
        cuda=me.device.type == "cuda",
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
    if offer.kind not in _KINDS or not 1 <= offer.slots <= MAX_SLOTS or not 1 <= offer.slot_bytes <= MAX_SLOT_BYTES:
        raise Garbled("the peer offered a lane that cannot be")
    return offer


def _take_offer(
    me: Identity, channel: Channel, offer: pb.TransferOffer, host: str, config: TransferConfig
) -> Lane | str:
    """Open the offered lane at this end, or say why not."""
    try:
        if not me.layout.row_bytes <= offer.slice_bytes <= offer.slot_bytes:
            return "a slice of the offered lane holds less than a row, or more than a slot"
        if offer.HasField("segment"):
            segment = Segment.attach(offer.segment.locator, offer.segment.proof, offer.slots, offer.slot_bytes)
            return ShmLane(segment, offer.slots, offer.slot_bytes)
        store = join_store(host, offer.group.port, config.handshake_s)
        return GroupLane.open(
            store,
            offer.group.prefix,
            is_source=True,
            interface=channel.local_host,
            slots=offer.slots,
            slot_bytes=offer.slot_bytes,
            device=me.device if offer.kind == pb.TRANSFER_LANE_KIND_NCCL else _HOST,
            timeout_s=config.handshake_s,
        )
    except LaneFailed as error:
        return str(error)


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
        offer = _proposal(kind, layout, config)
        if kind is LaneKind.SHM:
            lane = _offer_segment(channel, offer, deadline)
        else:
            lane = _offer_group(me, channel, hello, offer, config, deadline)
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
    theirs = _KINDS.get(hello.kind, LaneKind.AUTO)
    forced = {theirs, me.kind} - {LaneKind.AUTO}
    if len(forced) > 1:
        raise Refused(f"{source} was told to use {theirs} and {me.ref} to use {me.kind}; tell both the same")
    same_host = hello.host == host_identity()
    both_cuda = hello.cuda and me.device.type == "cuda"
    possible = [LaneKind.NCCL] * both_cuda + [LaneKind.SHM] * same_host + [LaneKind.GLOO]
    if not forced:
        return possible
    if forced <= set(possible):
        return [*forced]
    kind = next(iter(forced))
    need = "run on one host" if kind is LaneKind.SHM else "both keep their KV on GPUs"
    raise Refused(f"{source} and {me.ref} were told to use {kind}, for which they must {need}; use auto or gloo")


def _proposal(kind: LaneKind, layout: Layout, config: TransferConfig) -> pb.TransferOffer:
    """The offer of a lane of this kind, but for where it is."""
    piece_bytes, slots = {
        LaneKind.SHM: (config.shm_piece_bytes, config.shm_slots),
        LaneKind.GLOO: (config.gloo_piece_bytes, config.group_slots),
        LaneKind.NCCL: (config.nccl_piece_bytes, config.group_slots),
    }[kind]
    slot_bytes = layout.slot_bytes(piece_bytes)
    return pb.TransferOffer(
        kind=_WIRE[kind],
        slots=slots,
        slot_bytes=slot_bytes,
        slice_bytes=min(slot_bytes, max(layout.row_bytes, config.slice_bytes)),
    )


def _offer_segment(channel: Channel, offer: pb.TransferOffer, deadline: float) -> Lane | str:
    """Propose shared memory and open it at this end, or say why it did not open."""
    try:
        segment = Segment.create(offer.slots, offer.slot_bytes)
    except OSError as error:
        return f"no shared memory to be had: {error.strerror}"
    with contextlib.ExitStack() as undo:
        undo.callback(segment.close)
        offer.segment.locator = segment.locator
        offer.segment.proof = segment.proof
        channel.send(pb.TransferFrame(offer=offer))
        answer = _answer(channel, deadline)
        if not answer.ok:
            return answer.reason
        segment.mapped_by_both()
        undo.pop_all()
        return ShmLane(segment, offer.slots, offer.slot_bytes)


def _offer_group(
    me: Identity,
    channel: Channel,
    hello: pb.TransferHello,
    offer: pb.TransferOffer,
    config: TransferConfig,
    deadline: float,
) -> Lane | str:
    """Propose a process group and join it at this end, or say why it did not come to be."""
    try:
        store, port = open_store(channel.local_host, config.handshake_s)
    except (OSError, RuntimeError) as error:
        return f"no store for a process group: {error}"
    source = ref_from_wire(hello.source)
    offer.group.port = port
    offer.group.prefix = f"distserve/{source}/{me.ref}/{hello.generation}/{secrets.token_hex(8)}"
    channel.send(pb.TransferFrame(offer=offer))
    lane: Lane | str
    try:
        lane = GroupLane.open(
            store,
            offer.group.prefix,
            is_source=False,
            interface=channel.local_host,
            slots=offer.slots,
            slot_bytes=offer.slot_bytes,
            device=me.device if offer.kind == pb.TRANSFER_LANE_KIND_NCCL else _HOST,
            timeout_s=max(0.001, deadline - time.monotonic()),
        )
    except LaneFailed as error:
        lane = str(error)
    try:
        answer = _answer(channel, deadline)
    except TransferError:
        if not isinstance(lane, str):
            lane.close()
        raise
    if answer.ok or isinstance(lane, str):
        return lane
    lane.close()
    return answer.reason


def _answer(channel: Channel, deadline: float) -> pb.TransferAnswer:
    frame = channel.receive(max(0.001, deadline - time.monotonic()))
    if not frame.HasField("answer"):
        raise Garbled("an answer was expected in the handshake")
    return frame.answer


def split_address(address: str) -> tuple[str, int]:
    """ "host:port" in two; PeerGone when it is no such thing, as with any address that leads nowhere."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not (port.isascii() and port.isdigit()) or len(port) > 5 or int(port) > 65535:
        raise PeerGone(f"{address!r} is no address of the form host:port")
    return host.strip("[]"), int(port)
