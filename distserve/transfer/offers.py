"""The lanes that a handshake tries: what is offered, and how both ends open it. A lane that does not open at both is
released here, with the sentence that says why. Knows neither tickets nor which lane is tried first.
"""

from __future__ import annotations

import contextlib
import secrets
import time

import torch

from distserve.transfer.channel import Channel
from distserve.transfer.config import TransferConfig
from distserve.transfer.device_memory import cuda_memory as memory_of
from distserve.transfer.errors import Garbled, LaneFailed, TransferError
from distserve.transfer.group import GroupLane, join_store, open_store
from distserve.transfer.identity import KINDS, WIRE, Identity, LaneKind
from distserve.transfer.ipc import IpcSource, IpcTarget
from distserve.transfer.lane import Lane
from distserve.transfer.layout import Layout
from distserve.transfer.shm import Segment, ShmLane
from distserve.transfer.stage import ref_from_wire
from distserve.v1 import transfer_pb2 as pb

_HOST = torch.device("cpu")
_NO_MEMORY = "no device memory is left for staging"


# ── the source's side ────────────────────────────────────────────────────────────────────────────────────────────────


def take_offer(
    me: Identity, channel: Channel, offer: pb.TransferOffer, host: str, config: TransferConfig
) -> Lane | str:
    """Open the offered lane at this end, or say why not."""
    try:
        if not me.layout.row_bytes <= offer.slice_bytes <= offer.slot_bytes:
            return "a slice of the offered lane holds less than a row, or more than a slot"
        if offer.HasField("segment"):
            segment = Segment.attach(offer.segment.locator, offer.segment.proof, offer.slots, offer.slot_bytes)
            return ShmLane(segment, offer.slots, offer.slot_bytes)
        if offer.HasField("device_memory"):
            there = offer.device_memory
            memory = memory_of(me.device)
            lane = IpcSource.open(memory, me.device, there.handle, there.proof, offer.slots, offer.slot_bytes)
            channel.end_by_closing()
            return lane
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
    except torch.OutOfMemoryError:
        return _NO_MEMORY


# ── the destination's side ───────────────────────────────────────────────────────────────────────────────────────────


def proposal(kind: LaneKind, layout: Layout, config: TransferConfig) -> pb.TransferOffer:
    """The offer of a lane of this kind, but for where it is."""
    piece_bytes, slots = {
        LaneKind.SHM: (config.shm_piece_bytes, config.shm_slots),
        LaneKind.GLOO: (config.gloo_piece_bytes, config.group_slots),
        LaneKind.NCCL: (config.device_piece_bytes, config.device_slots),
        LaneKind.IPC: (config.device_piece_bytes, config.device_slots),
    }[kind]
    slot_bytes = layout.slot_bytes(piece_bytes)
    slice_bytes = slot_bytes if kind.on_device else config.slice_bytes  # a device has no cache to stay in, but launches
    return pb.TransferOffer(
        kind=WIRE[kind],
        slots=slots,
        slot_bytes=slot_bytes,
        slice_bytes=min(slot_bytes, max(layout.row_bytes, slice_bytes)),
    )


def make_offer(
    me: Identity,
    channel: Channel,
    hello: pb.TransferHello,
    offer: pb.TransferOffer,
    config: TransferConfig,
    deadline: float,
) -> Lane | str:
    """Offer a lane and open it at this end, or say why it did not open at both."""
    match KINDS[offer.kind]:
        case LaneKind.SHM:
            return _offer_segment(channel, offer, deadline)
        case LaneKind.IPC:
            return _offer_device_memory(me, channel, offer, deadline)
        case _:
            return _offer_group(me, channel, hello, offer, config, deadline)


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


def _offer_device_memory(me: Identity, channel: Channel, offer: pb.TransferOffer, deadline: float) -> Lane | str:
    """Propose memory of our GPU, or say why the source does not map it."""
    try:
        lane = IpcTarget.create(memory_of(me.device), channel.watch(), offer.slots, offer.slot_bytes)
    except LaneFailed as error:
        return str(error)
    with contextlib.ExitStack() as undo:
        undo.callback(lane.close)
        offer.device_memory.handle = lane.handle
        offer.device_memory.proof = lane.proof
        channel.send(pb.TransferFrame(offer=offer))
        answer = _answer(channel, deadline)
        if not answer.ok:
            return answer.reason
        undo.pop_all()
        return lane


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
    except torch.OutOfMemoryError:
        lane = _NO_MEMORY
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
