"""The data plane's sockets: a stranger, or a peer gone mad, gets a refusal or a closed door; no byte gets in."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from distserve.core.types import InstanceRef, Ticket
from distserve.kv.shard import KvCut, KvPart, Parallel, Route
from distserve.transfer.channel import Channel
from distserve.transfer.config import TransferConfig
from distserve.transfer.counts import Counts
from distserve.transfer.errors import Garbled, PeerGone, TransferError
from distserve.transfer.grants import Grants
from distserve.transfer.handshake import Link, accept, dial, split_address
from distserve.transfer.identity import Identity, LaneKind
from distserve.transfer.inbound import Inbound
from distserve.transfer.layout import Layout
from distserve.transfer.stage import StageHead
from distserve.v1 import transfer_pb2 as pb
from distserve_kernels.kv_copy import PagedBytes
from tests.fuzz.hostile import TEXTS, bent_bytes, bent_messages, bounded, messages

POOL_SHAPE = (6, 2, 2, 1, 4, 8)  # blocks, layers, k and v, heads, tokens, dim
LAYOUT = Layout.of(torch.zeros(POOL_SHAPE), 4)
WHOLE = KvPart(range(2), range(1))
ROUTE = Route(0, 0, WHOLE)
SOURCE, HERE = InstanceRef("p", 1), InstanceRef("d", 2)
ME = Identity(HERE, "fp", LAYOUT, LaneKind.SHM, torch.device("cpu"), KvCut(Parallel(), 2, 1), 0)
THEM = replace(ME, ref=SOURCE)
PATIENCE_S = 60.0
CONFIG = TransferConfig(handshake_s=PATIENCE_S, stall_s=PATIENCE_S)
TICKET = Ticket("mv", "r", 65536, SOURCE, HERE, "fp", 77, 0, 16, 10.0)
BEGIN = pb.TransferFrame(begin=StageHead.of(TICKET, 0, 16, 4, True).to_wire(1, True))
PIECE = pb.TransferFrame(piece=pb.TransferPiece(stage=1, nbytes=LAYOUT.block_bytes))
ABORT = pb.TransferFrame(abort=pb.TransferStageAbort(stage=1))


class Tapped:
    """A socket of ours whose written bytes are kept, so that they can be bent and said again."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair()

    def framed(self, frame: Message) -> bytes:
        """The frame as a channel puts it on the wire."""
        Channel(self.ours, PATIENCE_S).send(frame)  # type: ignore[arg-type]
        return self.theirs.recv(1 << 20)

    def close(self) -> None:
        self.ours.close()
        self.theirs.close()


@pytest.fixture(scope="module")
def framed() -> Iterator[Callable[[Message], bytes]]:
    tap = Tapped()
    yield tap.framed
    tap.close()


def talk(sock: socket.socket, said: bytes) -> None:
    """Say it all, half-close, and hear the other side out."""
    sock.settimeout(PATIENCE_S)
    with contextlib.suppress(ConnectionError):
        sock.sendall(said)
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(65536):
            pass
    sock.close()


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        theirs = socket.create_connection(listener.getsockname())
        ours, _ = listener.accept()
    return ours, theirs


def conversation(data: Any, framed: Callable[[Message], bytes], valid: list[Message]) -> bytes:
    """A few frames, each sound, bent, random or broken on the way."""
    frames = st.sampled_from(valid)
    some = data.draw(st.lists(frames | frames.flatmap(bent_messages) | messages(pb.TransferFrame), max_size=4))
    whole = b"".join(map(framed, some))
    return bytes(data.draw(st.just(whole) | bent_bytes(whole) | st.binary(max_size=40)))


@bounded(60)
@given(data=st.data())
def test_handshakes_with_strangers(framed: Callable[[Message], bytes], data: st.DataObject) -> None:
    """The destination's side: it refuses with a sentence or hangs up; it never raises anything else."""
    hello = pb.TransferHello(version=2, fingerprint="fp", move_id="mv", nonce=b"n" * 16, proof=b"p" * 32)
    hello.source.id, hello.source.incarnation, hello.destination.id, hello.destination.incarnation = "p", 1, "d", 2
    hello.layout.layers, hello.layout.kv_heads, hello.layout.head_dim = 2, 1, 8
    hello.layout.dtype, hello.layout.block_size = "float32", 4
    proof = pb.TransferFrame(proof=pb.TransferProof(proof=b"p" * 32))
    said = conversation(data, framed, [pb.TransferFrame(hello=hello), proof, BEGIN])
    ours, theirs = tcp_pair()
    thread = threading.Thread(target=talk, args=(theirs, said))
    thread.start()
    try:
        with pytest.raises(TransferError, match=r"\w"):
            accept(ME, ours, CONFIG, lambda move: TICKET if move == "mv" else None)
    finally:
        ours.close()
        thread.join(PATIENCE_S)
    assert not thread.is_alive()


@bounded(50)
@given(data=st.data())
def test_a_destination_that_is_none(framed: Callable[[Message], bytes], data: st.DataObject) -> None:
    """The source's side: whatever answers, the dial ends in an error of the tree."""
    offer = pb.TransferFrame(offer=pb.TransferOffer(kind=pb.TRANSFER_LANE_KIND_SHM, slots=2, slot_bytes=1 << 16))
    offer.offer.segment.locator = "1:2"
    challenge = pb.TransferFrame(challenge=pb.TransferChallenge(nonce=b"n" * 16, proof=b"p" * 32))
    said = conversation(data, framed, [challenge, offer, pb.TransferFrame(refusal=pb.TransferRefusal(reason="no"))])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=lambda: talk(listener.accept()[0], said))
        thread.start()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        try:
            with pytest.raises(TransferError, match=r"\w"):
                dial(THEM, TICKET, address, 1, CONFIG, lambda _: None, ROUTE, Parallel())
        finally:
            thread.join(PATIENCE_S)
    assert not thread.is_alive()


@bounded(60)
@given(data=st.data())
def test_frames_on_an_open_link(framed: Callable[[Message], bytes], data: st.DataObject) -> None:
    """A peer that holds a good ticket and then says anything at all: nothing unverified reaches the pool."""
    pool = torch.zeros(POOL_SHAPE)
    paged = PagedBytes(pool)
    grants = Grants(paged, WHOLE)
    grants.open(TICKET, (1, 2, 3, 4))
    events: list[Any] = []
    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        links: list[Link] = []
        dialling = threading.Thread(
            target=lambda: links.append(dial(THEM, TICKET, address, 1, CONFIG, lambda _: None, ROUTE, Parallel()))
        )
        dialling.start()
        sock = listener.accept()[0]
        inbound = Inbound(ME, sock, lambda _: paged, grants, events.append, Counts(), CONFIG, lambda _: ended.set())
        inbound.thread.start()
        dialling.join(PATIENCE_S)
    (link,) = links
    for slot in link.lane.slots:
        slot.fill_(0xA5)
    talk(link.channel._sock, conversation(data, framed, [BEGIN, PIECE, ABORT]))
    assert ended.wait(PATIENCE_S)
    inbound.thread.join(PATIENCE_S)
    link.close()
    assert not pool.any(), "bytes without a right checksum are in the pool"
    assert not any(type(event).__name__ == "StageStored" for event in events)
    grants.close_all()


@bounded(60)
@given(raw=st.binary(max_size=300))
def test_framing_takes_whole_frames_or_refuses(raw: bytes) -> None:
    ours, theirs = socket.socketpair()
    channel = Channel(ours, PATIENCE_S)
    thread = threading.Thread(target=talk, args=(theirs, raw))
    thread.start()
    with pytest.raises((Garbled, PeerGone)):
        while True:
            channel.receive(PATIENCE_S)
    channel.close()
    thread.join(PATIENCE_S)


@bounded(60)
@given(host=st.sampled_from(TEXTS) | st.text(max_size=12), port=st.text(max_size=6) | st.integers().map(str))
def test_addresses(host: str, port: str) -> None:
    try:
        assert 0 <= split_address(f"{host}:{port}")[1] <= 65535
    except PeerGone as error:
        assert "host:port" in str(error)


@pytest.mark.parametrize(
    "address", ["a" * 70 + ".b:1", "\0:1", "a..b:1", "127.0.0.1:²", "ü" * 80 + ":1", "h:" + "9" * 5000]
)
def test_an_address_that_is_none_is_a_peer_that_is_gone(address: str) -> None:
    with pytest.raises(PeerGone):
        dial(THEM, TICKET, address, 1, CONFIG, lambda _: None, ROUTE, Parallel())
