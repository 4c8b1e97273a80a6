"""Two movers of one process: what is stored, what is refused, and what is left when they close."""

from __future__ import annotations

import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import xxhash

from distserve.core.types import InstanceRef
from distserve.transfer import (
    Mover,
    StageCorrupt,
    StageFailed,
    StageSent,
    TransferConfig,
    handshake,
)
from distserve.transfer.channel import Channel
from distserve.transfer.errors import LaneFailed
from distserve.transfer.pledge import keep, sign
from distserve.transfer.shm import Segment, host_identity
from distserve.v1 import transfer_pb2 as pb
from tests.transfer.pairs import BLOCKS, KINDS, TOTAL, A, B, Pair
from tests.transfer.peers import WAIT_S, Local, copy_tokens, make_pool, make_ticket


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("here", "there"), [(16, 16), (16, 24), (8, 16), (32, 7)])
@pytest.mark.parametrize("piece_bytes", [700, 1 << 20])
def test_stages_arrive_bit_for_bit(
    make: Callable[..., Pair], kind: str, here: int, there: int, piece_bytes: int
) -> None:
    pair = make(kind, here, there, have=5, shm_piece_bytes=piece_bytes, gloo_piece_bytes=piece_bytes)
    pair.open()
    pair.stored(5, 6)
    pair.stored(6, 128)
    pair.stored(128, 129)
    pair.stored(129, TOTAL, final=True)
    assert pair.source.mover.counts()[f"links_out_{kind}"] == 1


def test_auto_shares_memory_on_one_host(make: Callable[..., Pair]) -> None:
    pair = make("auto")
    pair.open()
    pair.stored(0, TOTAL)
    assert pair.target.mover.counts()["links_in_shm"] == 1


def test_auto_uses_a_group_between_two_hosts(make: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake, "host_identity", lambda: threading.current_thread().name)  # differs at the two ends
    pair = make("auto")
    pair.open()
    pair.stored(0, TOTAL)
    assert pair.target.mover.counts()["links_in_gloo"] == 1
    forced = make("shm")
    forced.open()
    assert "run on one host" in forced.fails("refused", 0, TOTAL).detail


def test_auto_falls_back_when_memory_cannot_be_mapped(
    make: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    create = Segment.create

    def elsewhere(slots: int, slot_bytes: int) -> Segment:
        segment = create(slots, slot_bytes)
        segment.locator = "999999999:3"  # as a process of another container would be seen
        return segment

    monkeypatch.setattr(Segment, "create", elsewhere)
    pair = make("auto")
    pair.open()
    pair.stored(0, TOTAL)
    assert pair.target.mover.counts()["links_in_gloo"] == 1
    forced = make("shm")
    forced.open()
    assert "cannot be opened from here" in forced.fails("refused", 0, TOTAL).detail


@pytest.mark.parametrize("name", ["temporary file", "memory file"])
def test_a_segment_is_mapped_by_both_and_found_by_nobody_later(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "temporary file":
        monkeypatch.delattr("os.memfd_create")
    segment = Segment.create(2, 4096)
    other = Segment.attach(segment.locator, segment.proof, 2, 4096)
    segment.mapped_by_both()
    segment.slots(2, 4096)[1].fill_(5)
    assert other.slots(2, 4096)[1].tolist() == [5] * 4096 and other.slots(2, 4096)[0].tolist() == [0] * 4096
    for proof, slots in ((segment.proof, 2), (b"x" * 16, 2), (segment.proof, 3)):
        with pytest.raises(LaneFailed):
            Segment.attach(segment.locator, proof, slots, 4096)
    segment.close()
    other.close()


@pytest.mark.parametrize("locator", ["", "../etc/passwd", "/dev/zero", "1:2:3", "distserve-kv-../../x", "self:1"])
def test_a_locator_of_another_form_is_not_opened(locator: str) -> None:
    with pytest.raises(LaneFailed, match="names no shared memory"):
        Segment.attach(locator, b"x" * 16, 1, 4096)


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_byte_is_refused_and_the_stage_can_be_sent_again(make: Callable[..., Pair], kind: str) -> None:
    pair = make(kind)
    pair.open()
    pair.stored(0, 16)
    pair.faults.flip = {0}
    assert pair.fails("checksum", 16, TOTAL).retriable
    event = pair.target.event()
    assert isinstance(event, StageCorrupt) and (event.move_id, event.nonce) == ("move-1", pair.ticket.nonce)
    pair.faults.flip = set()
    pair.stored(16, TOTAL, final=True)
    assert pair.target.mover.counts()["stages_refused_checksum"] == 1
    assert pair.source.mover.counts()[f"links_out_{kind}"] == 1  # the link was not to blame


def test_a_flipped_byte_in_a_later_piece_fails_the_stage(make: Callable[..., Pair]) -> None:
    pair = make()
    pair.open()
    pair.faults.flip = {2}
    pair.send(0, TOTAL)
    event = pair.source.event()
    assert isinstance(event, StageFailed) and event.reason == "checksum"
    assert isinstance(pair.target.event(), StageCorrupt)


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_piece_is_refused(make: Callable[..., Pair], kind: str) -> None:
    pair = make(kind)
    pair.open()
    pair.faults.shorten = {0}
    pair.fails("checksum", 0, TOTAL)
    assert isinstance(pair.target.event(), StageCorrupt)
    pair.faults.shorten = set()
    pair.stored(0, TOTAL)


@pytest.mark.parametrize(
    "forged",
    [
        {"nonce": 9},
        {"epoch": 2},
        {"request_id": "another"},
        {"move_id": "unknown"},
        {"fingerprint": "another"},
        {"source": InstanceRef("a", 2)},
        {"source": InstanceRef("c", 1)},
    ],
    ids=lambda forged: next(iter(forged)),
)
def test_a_forged_ticket_writes_nothing(make: Callable[..., Pair], forged: dict[str, Any]) -> None:
    pair = make()
    pair.open()
    stranger = replace(pair.ticket, **forged)
    failed = pair.fails("ticket", 0, 64, ticket=stranger)
    assert not failed.retriable
    assert re.search("no open ticket for move|does not know the ticket", failed.detail)  # there is no link for it
    pair.stored(0, 64)
    assert not pair.fails("ticket", 64, TOTAL, ticket=stranger).retriable
    assert pair.target.mover.counts()["stages_refused_ticket"] == 1  # and none on a link that stands
    pair.stored(64, TOTAL)


@pytest.mark.parametrize(("start", "end"), [(0, 64), (32, 96), (65, 96), (64, TOTAL + 1), (4, 5)])
def test_a_stage_out_of_order_or_range_writes_nothing(make: Callable[..., Pair], start: int, end: int) -> None:
    pair = make(have=5)
    pair.open()
    pair.stored(5, 64)
    pair.fails("ticket", start, end)
    pair.stored(64, TOTAL, final=True)


def test_a_closed_ticket_writes_nothing(make: Callable[..., Pair]) -> None:
    pair = make()
    pair.open()
    pair.stored(0, 64)
    pair.target.mover.close_ticket("move-1")
    pair.target.mover.close_ticket("move-1")
    pair.fails("ticket", 64, TOTAL)


def test_nothing_follows_the_final_stage(make: Callable[..., Pair]) -> None:
    pair = make()
    pair.open()
    pair.stored(0, 64, final=True)
    pair.fails("ticket", 64, TOTAL)


@pytest.mark.parametrize("kind", KINDS)
def test_closing_a_ticket_is_a_fence(make: Callable[..., Pair], kind: str) -> None:
    pair = make(kind)
    pair.open()
    reached, go_on = pair.faults.pause(4)
    pair.send(0, TOTAL)
    assert reached.wait(WAIT_S)
    pair.target.mover.close_ticket("move-1")
    pair.expected = pair.target.pool.clone()
    go_on.set()
    event = pair.source.event()
    assert isinstance(event, StageFailed) and event.reason == "ticket"
    pair.unchanged()


@pytest.mark.parametrize("kind", KINDS)
def test_aborting_is_a_fence_and_spares_the_link(make: Callable[..., Pair], kind: str) -> None:
    pair = make(kind)
    pair.open()
    reached, go_on = pair.faults.pause(2)
    pair.send(0, 200)
    pair.send(200, TOTAL)
    assert reached.wait(WAIT_S)
    pair.source.mover.abort_send("move-1")
    before = pair.source.pool.clone()
    pair.source.pool.view(torch.uint8).fill_(0)  # the blocks belong to somebody else now
    go_on.set()
    pair.faults.at = {}
    other = replace(pair.ticket, move_id="move-2", nonce=5)
    pair.target.mover.close_ticket("move-1")
    pair.target.mover.open_ticket(other, pair.there)
    pair.source.pool.copy_(before)
    pair.send(0, TOTAL, True, other)
    event = pair.source.event()
    assert isinstance(event, StageSent) and event.move_id == "move-2"
    copy_tokens(pair.source.pool, pair.here, pair.expected, pair.there, 0, TOTAL)
    pair.unchanged()
    assert pair.source.mover.counts()[f"links_out_{kind}"] == 1
    assert pair.source.mover.counts()["stages_aborted"] == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_dropped_link_fails_all_that_waits_and_is_made_anew(make: Callable[..., Pair], kind: str) -> None:
    pair = make(kind)
    pair.open()

    def drop() -> None:
        pair.faults.at = {}
        raise LaneFailed("pulled by a test")

    pair.faults.at[3] = drop
    pair.send(0, 200)
    pair.send(200, TOTAL)
    for start, end in ((0, 200), (200, TOTAL)):
        event = pair.source.event()
        assert isinstance(event, StageFailed) and event.retriable
        assert (event.reason, event.start, event.end) == ("peer", start, end)
    pair.expected = pair.target.pool.clone()
    pair.stored(0, 200)
    pair.stored(200, TOTAL)
    assert pair.source.mover.counts()[f"links_out_{kind}"] == 2


def test_a_stage_has_a_deadline(make: Callable[..., Pair]) -> None:
    pair = make(stage_s=0.05)
    pair.open()
    pair.faults.at[1] = lambda: time.sleep(0.1)
    pair.send(0, TOTAL)
    event = pair.source.event()
    assert isinstance(event, StageFailed) and event.reason == "timeout"


def test_an_idle_link_is_closed_and_opened_again(make: Callable[..., Pair]) -> None:
    pair = make(idle_s=0.05)
    pair.open()
    pair.stored(0, 64)
    for thread in [t for t in threading.enumerate() if t.name.startswith(("kv-out", "kv-in"))]:
        thread.join(WAIT_S)
        assert not thread.is_alive()
    pair.stored(64, TOTAL)


def test_a_fault_of_ours_leaves_no_stage_waiting(make: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    pair = make()
    pair.open()
    seen: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", seen.append)

    def broken() -> None:
        pair.faults.at = {}
        raise ZeroDivisionError("a bug")

    pair.faults.at[0] = broken
    assert "ZeroDivisionError: a bug" in pair.fails("internal", 0, TOTAL).detail
    pair.stored(0, TOTAL)
    assert [args.exc_type for args in seen] == [ZeroDivisionError]


def test_a_lost_peer_fails_what_waits_for_it(make: Callable[..., Pair]) -> None:
    pair = make()
    pair.open()
    pair.stored(0, 16)
    reached, go_on = pair.faults.pause(1)
    pair.send(16, TOTAL)
    assert reached.wait(WAIT_S)
    pair.source.mover.peer_lost(B)
    go_on.set()
    event = pair.source.event()
    assert isinstance(event, StageFailed) and event.reason == "peer"


def test_closing_reports_what_was_queued(make: Callable[..., Pair]) -> None:
    pair = make()
    pair.open()
    reached, go_on = pair.faults.pause(1)
    pair.send(0, 200)
    pair.send(200, TOTAL)
    assert reached.wait(WAIT_S)
    closing = threading.Thread(target=pair.source.close)
    closing.start()
    for thread in [t for t in threading.enumerate() if t.name == f"kv-accept {A}"]:
        thread.join(WAIT_S)  # the last that is told to end: the links know by then
    go_on.set()
    closing.join(WAIT_S)
    pair.send(250, TOTAL)  # too late
    events = [pair.source.event() for _ in range(3)]
    assert [(e.reason, e.start) for e in events if isinstance(e, StageFailed)] == [
        ("closed", 0),
        ("closed", 200),
        ("closed", 250),
    ]


def refused(pair: Pair, **ticket: Any) -> str:
    return pair.fails("refused", 0, 64, ticket=replace(pair.ticket, **ticket)).detail


def test_ends_that_do_not_fit_are_refused_with_a_sentence(make: Callable[..., Pair]) -> None:
    pair = make()
    pair.open()
    detail = refused(pair, destination=InstanceRef("b", 8))
    assert "a#1 asked for b#8 but reached b#7" in detail
    address = pair.target.mover.address
    strangers = [
        (Local(InstanceRef("c", 1), make_pool(1, 40, 16), fingerprint="other"), ["c#1", "b#7", "other", "same model"]),
        (Local(InstanceRef("c", 2), make_pool(1, 40, 16, torch.bfloat16)), ["c#2", "b#7", "bfloat16 and float32"]),
        (Local(InstanceRef("c", 3), torch.zeros(40, 3, 2, 4, 16, 8)), ["c#3", "b#7", "kv_heads 4 and 2"]),
        (Local(InstanceRef("c", 4), make_pool(1, 40, 16), kind="gloo"), ["c#4", "gloo", "b#7", "shm"]),
    ]
    for stranger, words in strangers:
        ticket = replace(pair.ticket, source=stranger.ref)
        stranger.mover.send_stage(ticket, address, 0, 64, tuple(range(10)), False)
        event = stranger.event()
        stranger.close()
        assert isinstance(event, StageFailed) and event.reason == "refused" and not event.retriable
        assert all(word in event.detail for word in words), event.detail
    pair.unchanged()


def test_a_stage_without_checksums_is_not_taken_where_they_are_on(make: Callable[..., Pair]) -> None:
    pair = make()
    pair.open()
    plain = Local(InstanceRef("a", 1), make_pool(1, BLOCKS, 16), config=TransferConfig(checksum=False))
    plain.mover.send_stage(pair.ticket, pair.target.mover.address, 0, 64, pair.here, False)
    event = plain.event()
    plain.close()
    assert isinstance(event, StageFailed) and event.reason == "protocol"
    pair.unchanged()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere", "127.0.0.1:http", "127.0.0.1:99999"])
def test_an_address_that_leads_nowhere(make: Callable[..., Pair], address: str) -> None:
    pair = make()
    pair.source.mover.send_stage(pair.ticket, address, 0, 64, pair.here, False)
    event = pair.source.event()
    assert isinstance(event, StageFailed) and event.reason == "peer" and address in event.detail


def frame(message: pb.TransferFrame | None = None, data: bytes = b"") -> bytes:
    """A message, or any bytes, as a frame on the socket."""
    data = message.SerializeToString() if message else data
    return struct.pack("<IIQ", len(data), len(data) ^ 0xFFFFFFFF, xxhash.xxh3_64_intdigest(data)) + data


GARBAGE = {
    "random": bytes(range(256)) * 20,
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "a huge length": struct.pack("<IIQ", 0xFFFFFFFF, 0, 0),
    "a length that is not its complement's": struct.pack("<IIQ", 9, 9, 0) + b"\xff" * 9,
    "no message": frame(data=b"\xff" * 9),
    "an empty frame": frame(data=b""),
    "half a frame": frame(data=b"x" * 100)[:20],
    "a wrong checksum": struct.pack("<IIQ", 1, 0xFFFFFFFE, 7) + b"x",
    "a piece first": frame(pb.TransferFrame(piece=pb.TransferPiece(nbytes=1 << 40))),
    "an empty hello": frame(pb.TransferFrame(hello=pb.TransferHello())),
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_on_the_control_port_ends_with_its_connection(make: Callable[..., Pair], garbage: bytes) -> None:
    pair = make(handshake_s=0.2)
    pair.open()
    host, port = pair.target.mover.address.split(":")
    with socket.create_connection((host, int(port)), timeout=WAIT_S) as stranger:
        stranger.sendall(garbage)
        drain(stranger)
    pair.stored(0, TOTAL)


def drain(sock: socket.socket) -> None:
    """Read until the other end closes, in whatever way."""
    try:
        while sock.recv(1 << 16):
            pass
    except ConnectionResetError:
        return


def test_garbage_on_an_open_link_ends_the_link_only(make: Callable[..., Pair]) -> None:
    pair = make()
    pair.open()
    host, port = pair.target.mover.address.split(":")
    hello = pb.TransferHello(
        version=handshake.VERSION,
        source=pb.TransferPeer(id="a", incarnation=1),
        destination=pb.TransferPeer(id="b", incarnation=7),
        fingerprint="model",
        layout=pb.TransferLayout(layers=3, kv_heads=2, head_dim=8, dtype="float32", block_size=16),
        kind=pb.TRANSFER_LANE_KIND_SHM,
        host=host_identity(),
    )
    for last in (
        pb.TransferFrame(piece=pb.TransferPiece(stage=1, nbytes=1 << 40)),
        pb.TransferFrame(piece=pb.TransferPiece(stage=1, nbytes=-1)),
        pb.TransferFrame(ready=pb.TransferReady()),
        pb.TransferFrame(begin=pb.TransferStageBegin(stage=-1, start=-5, end=1 << 60)),
        pb.TransferFrame(),
    ):
        with socket.create_connection((host, int(port)), timeout=WAIT_S) as stranger:
            channel = Channel(stranger, WAIT_S)
            sign(hello, pair.ticket, ())
            channel.send(pb.TransferFrame(hello=hello))
            keep(channel, hello, pair.ticket, (), time.monotonic() + WAIT_S)
            assert channel.receive(WAIT_S).HasField("offer")
            channel.send(pb.TransferFrame(answer=pb.TransferAnswer(ok=True)))
            assert channel.receive(WAIT_S).HasField("ready")
            channel.send(last)
            stranger.shutdown(socket.SHUT_WR)
            drain(stranger)
    pair.stored(0, TOTAL)


def test_too_many_connections_are_turned_away(make: Callable[..., Pair]) -> None:
    pair = make(max_links=2)
    host, port = pair.target.mover.address.split(":")
    held = [socket.create_connection((host, int(port)), timeout=WAIT_S) for _ in range(3)]
    assert held[2].recv(1) == b""
    for sock in held:
        sock.close()


def test_what_cannot_be_is_said_at_once() -> None:
    pool = make_pool(1, 4, 16)
    for kind, words in (("nccl", "between GPUs"), ("pigeon", "use one of auto, shm, gloo, nccl")):
        with pytest.raises(ValueError, match=words):
            Mover(A, pool, 16, fingerprint="model", report=print, kind=kind)
    one = Local(B, pool)
    ticket = make_ticket(1, A, B, 64)
    with pytest.raises(ValueError, match="cannot hold"):
        one.mover.open_ticket(ticket, (0, 1, 2))
    with pytest.raises(ValueError, match="outside of the pool"):
        one.mover.open_ticket(ticket, (0, 1, 2, 4))
    with pytest.raises(ValueError, match="is for b#8"):
        one.mover.open_ticket(replace(ticket, destination=InstanceRef("b", 8)), (0, 1, 2, 3))
    one.mover.open_ticket(ticket, (0, 1, 2, 3))
    with pytest.raises(ValueError, match="open already"):
        one.mover.open_ticket(ticket, (0, 1, 2, 3))
    with pytest.raises(ValueError, match="do not cover"):
        one.mover.send_stage(ticket, "127.0.0.1:1", 0, 65, (0, 1, 2, 3), False)
    taken = one.mover.address.split(":")[1]
    with pytest.raises(OSError, match="cannot listen on"):
        Mover(A, pool, 16, fingerprint="model", report=print, config=TransferConfig(port=int(taken)))
    one.close()
