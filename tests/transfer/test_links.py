"""Two movers of one process: what is stored, what is refused, and what is left when they close."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from distserve.core.types import InstanceRef, Ticket
from distserve.transfer import (
    FaultInjector,
    Mover,
    StageCorrupt,
    StageFailed,
    StageSent,
    StageStored,
    TransferConfig,
    handshake,
)
from distserve.transfer.errors import LaneFailed
from distserve.transfer.shm import Segment, host_identity
from distserve.v1 import transfer_pb2 as pb
from tests.transfer.peers import WAIT_S, Local, copy_tokens, make_pool, make_ticket, shuffled

A, B = InstanceRef("a", 1), InstanceRef("b", 7)
BLOCKS = 60
TOTAL = 300
KINDS = ["shm", "gloo"]


class Faults(FaultInjector):
    """Does what a test puts into it, at the pieces it names."""

    def __init__(self) -> None:
        self.at: dict[int, Callable[[], None]] = {}
        self.flip: set[int] = set()
        self.shorten: set[int] = set()

    def pause(self, index: int) -> tuple[threading.Event, threading.Event]:
        """Hold the source before piece ``index``: (it is there, it may go on)."""
        reached, go_on = threading.Event(), threading.Event()

        def wait() -> None:
            reached.set()
            go_on.wait(WAIT_S)

        self.at[index] = wait
        return reached, go_on

    def on_piece(self, ticket: Ticket, index: int) -> None:
        self.at.get(index, lambda: None)()

    def on_staged(self, ticket: Ticket, index: int, staged: Any) -> None:
        if index in self.flip:
            staged[len(staged) // 2] ^= 4

    def piece_bytes(self, ticket: Ticket, index: int, nbytes: int) -> int:
        return nbytes - 8 if index in self.shorten else nbytes


class Pair:
    """Source and destination, a ticket between them, and what the destination's pool must hold in the end."""

    def __init__(self, kind: str = "shm", here: int = 16, there: int = 16, have: int = 0, **config: Any) -> None:
        self.faults = Faults()
        settings = replace(
            TransferConfig(shm_piece_bytes=13_000, group_piece_bytes=13_000, faults=self.faults), **config
        )
        self.source = Local(A, make_pool(1, BLOCKS, here), kind, settings)
        self.target = Local(B, make_pool(2, BLOCKS, there), kind, replace(settings, faults=FaultInjector()))
        self.here = shuffled(3, TOTAL, BLOCKS, here)
        self.there = shuffled(4, TOTAL, BLOCKS, there)
        self.ticket = make_ticket(1, A, B, TOTAL, have)
        self.expected = self.target.pool.clone()

    def open(self) -> None:
        self.target.mover.open_ticket(self.ticket, self.there)

    def send(self, start: int, end: int, final: bool = False, ticket: Ticket | None = None) -> None:
        address = self.target.mover.address
        self.source.mover.send_stage(ticket or self.ticket, address, start, end, self.here, final)

    def stored(self, start: int, end: int, final: bool = False) -> None:
        """Send a stage that must arrive."""
        self.send(start, end, final)
        event = self.source.event()
        assert isinstance(event, StageSent), event
        assert (event.start, event.end) == (start, end)
        there = self.target.event()
        assert there == StageStored(self.ticket.move_id, self.ticket.nonce, start, end, event.nbytes)
        copy_tokens(self.source.pool, self.here, self.expected, self.there, start, end)
        self.unchanged()

    def fails(self, reason: str, start: int, end: int, ticket: Ticket | None = None) -> StageFailed:
        """Send a stage that must not arrive, and see that not one byte of the pool changes."""
        self.send(start, end, ticket=ticket)
        event = self.source.event()
        assert isinstance(event, StageFailed), event
        assert (event.reason, event.start, event.end) == (reason, start, end), event
        self.unchanged()
        return event

    def unchanged(self) -> None:
        assert torch.equal(self.target.pool.view(torch.uint8), self.expected.view(torch.uint8))

    def close(self) -> None:
        self.source.close()
        self.target.close()


@pytest.fixture
def make() -> Iterator[Callable[..., Pair]]:
    """Makes pairs; afterwards they are closed and no thread of theirs may be left."""
    pairs: list[Pair] = []

    def build(*args: Any, **kwargs: Any) -> Pair:
        pairs.append(Pair(*args, **kwargs))
        return pairs[-1]

    yield build
    for pair in pairs:
        pair.close()
    assert [t.name for t in threading.enumerate() if t.name.startswith("kv-")] == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("here", "there"), [(16, 16), (16, 24), (8, 16), (32, 7)])
@pytest.mark.parametrize("piece_bytes", [700, 1 << 20])
def test_stages_arrive_bit_for_bit(
    make: Callable[..., Pair], kind: str, here: int, there: int, piece_bytes: int
) -> None:
    pair = make(kind, here, there, have=5, shm_piece_bytes=piece_bytes, group_piece_bytes=piece_bytes)
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
    assert not pair.fails("ticket", 0, 64, ticket=replace(pair.ticket, **forged)).retriable
    assert pair.target.mover.counts()["stages_refused_ticket"] == 1
    pair.stored(0, TOTAL)


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


def frame(message: pb.TransferFrame) -> bytes:
    data = message.SerializeToString()
    return struct.pack("<I", len(data)) + data


GARBAGE = {
    "random": bytes(range(256)) * 20,
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "a huge length": b"\xff\xff\xff\xff",
    "no frame": struct.pack("<I", 9) + b"\xff" * 9,
    "an empty frame": struct.pack("<I", 0),
    "half a frame": struct.pack("<I", 100) + b"x",
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
        version=1,
        source=pb.TransferPeer(id="z", incarnation=1),
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
            stranger.sendall(frame(pb.TransferFrame(hello=hello)))
            assert stranger.recv(1 << 16)
            stranger.sendall(frame(pb.TransferFrame(answer=pb.TransferAnswer(ok=True))))
            assert stranger.recv(1 << 16)
            stranger.sendall(frame(last))
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
