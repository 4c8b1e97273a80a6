"""Control streams over real gRPC on loopback: who is let in, who is replaced, and what ends a stream."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from distserve.core.events import (
    Abandon,
    Committed,
    Event,
    GatewayAttached,
    GatewayLost,
    MembersChanged,
    MoveQueried,
    PeerLost,
    SequenceOutput,
    TokensMade,
)
from distserve.core.types import Endpoint, GatewayRef, InstanceRef, Load, Member, ModelSpec, Role, Token
from distserve.instance.inbox import Inbox
from distserve.instance.network import Answers, Network
from distserve.instance.peers import Peers
from distserve.instance.streams import GatewayStreams, merged, weight
from distserve.v1 import control_pb2 as pb
from distserve.v1.control_pb2_grpc import InstanceServiceStub
from distserve.wire import channels
from distserve.wire.attachments import ServerEnd
from distserve.wire.channels import HELLO_KEY, Hello, bind
from distserve.wire.stream import DialledStream, Outbox, OutboxOverflow

ME, GATEWAY = InstanceRef("me", 7), GatewayRef("g", 3)
SPEC = ModelSpec("m", "f", 100, 512, (2,), 2, 2, 16, "float32", 16, 64)
WAIT_S = 10.0


class Held:
    """An instance's network side without an instance behind it: events land in its inbox."""

    def __init__(self, network: Network, inbox: Inbox, address: str) -> None:
        self.network = network
        self.inbox = inbox
        self.address = address
        self._events: list[Any] = []

    async def event(self) -> Any:
        """The next event that came in."""
        async with asyncio.timeout(WAIT_S):
            while not self._events:
                self._events += await asyncio.to_thread(self.inbox.take, wait=True, timeout_s=0.5)
        return self._events.pop(0)


def member(name: str, life: int, address: str) -> Member:
    return Member(Endpoint(InstanceRef(name, life), address), Role.MIXED, SPEC)


@contextlib.asynccontextmanager
async def serving(name: str = "me", life: int = 7, port: int = 0) -> AsyncIterator[Held]:
    server, bound = bind("127.0.0.1", port)
    address = f"127.0.0.1:{bound}"
    inbox = Inbox()
    network = Network(
        "127.0.0.1:1",
        member(name, life, address),
        Load(),
        inbox,
        welcomed=lambda: None,
        refused=lambda _: None,
        broke=lambda error: pytest.fail(str(error)),
    )
    await network.start(server, Answers(lambda r, now: pb.InspectResponse(pid=5), pb.KvCheckResponse))
    try:
        yield Held(network, inbox, address)
    finally:
        await network.close()


def dialled(
    address: str, *, to: InstanceRef = ME, sender: Any = GATEWAY, method: str = "AttachGateway"
) -> DialledStream:
    return DialledStream(address, InstanceServiceStub, method, Hello(sender, to))


@contextlib.asynccontextmanager
async def talking(
    stream: DialledStream, wrapper: Any = pb.GatewayToInstance
) -> AsyncIterator[tuple[Outbox, asyncio.Queue]]:
    """An accepted stream with both directions running."""
    outbox: Outbox[Event] = Outbox(100)
    heard: asyncio.Queue[Event] = asyncio.Queue()
    await stream.accepted()
    talk = asyncio.create_task(stream.converse(outbox, pb.GatewayToInstance, heard.put_nowait))
    try:
        yield outbox, heard
    finally:
        talk.cancel()
        await asyncio.gather(talk, return_exceptions=True)
        await stream.close()


async def refusal(stream: DialledStream) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stream.accepted()
    await stream.close()
    return caught.value


# ── who is let in ────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_stream_for_another_life_is_refused() -> None:
    async with serving() as held:
        error = await refusal(dialled(held.address, to=InstanceRef("me", 6)))
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert error.details() == "g#3 dialled me#6, here is me#7"


async def test_another_protocol_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as held:
        stream = dialled(held.address)
        metadata = Hello(GATEWAY, ME).metadata()
        message = pb.Hello.FromString(metadata[0][1])
        message.protocol = 99
        with pytest.raises(channels.HelloRefused, match="speaks control protocol 99, here it is 1"):
            channels.read_hello([(HELLO_KEY, message.SerializeToString())], ME)
        await stream.close()


@pytest.mark.parametrize("metadata", [(), ((HELLO_KEY, b"\xff\xff"),), ((HELLO_KEY, b""),)])
async def test_who_says_nothing_sensible_is_refused(metadata: Any) -> None:
    async with serving() as held, channels.dial(held.address) as channel:
        call = InstanceServiceStub(channel).AttachGateway(metadata=metadata)
        assert await call.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "hello" in (await call.details()) or "who opens it" in (await call.details())


async def test_a_gateway_is_no_peer() -> None:
    async with serving() as held:
        error = await refusal(dialled(held.address, method="AttachPeer"))
        assert error.details() == "g#3 opened a stream that is not for its kind"


# ── gateways ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_gateway_comes_speaks_hears_and_goes() -> None:
    made = TokensMade(ME, (SequenceOutput("r", 1, 0, (Token(4),)),))
    async with serving() as held:
        async with talking(dialled(held.address)) as (outbox, heard):
            assert await held.event() == GatewayAttached(GATEWAY)
            outbox.put(Abandon(GATEWAY, "r", 1))
            assert await held.event() == Abandon(GATEWAY, "r", 1)
            held.network._gateways.send(GATEWAY, made)
            async with asyncio.timeout(WAIT_S):
                assert await heard.get() == made
        assert await held.event() == GatewayLost(GATEWAY)


async def test_a_gateway_that_attaches_again_replaces_itself() -> None:
    async with serving() as held, talking(dialled(held.address)):
        assert await held.event() == GatewayAttached(GATEWAY)
        async with talking(dialled(held.address)) as (outbox, _):
            assert await held.event() == GatewayAttached(GATEWAY)
            outbox.put(Abandon(GATEWAY, "r", 1))
            assert await held.event() == Abandon(GATEWAY, "r", 1)
        assert await held.event() == GatewayLost(GATEWAY)


async def test_what_cannot_be_understood_ends_the_stream_and_nothing_else() -> None:
    async with serving() as held, channels.dial(held.address) as channel:
        call = InstanceServiceStub(channel).AttachGateway(metadata=Hello(GATEWAY, ME).metadata())
        await call.initial_metadata()
        await call.write(pb.GatewayToInstance(abandon=pb.Abandon(request_id="r")))
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert await call.details() == "Abandon.gateway is missing"
        assert await held.event() == GatewayAttached(GATEWAY)
        assert await held.event() == GatewayLost(GATEWAY)
        inspecting = asyncio.ensure_future(InstanceServiceStub(channel).Inspect(pb.InspectRequest()))
        question = await held.event()
        question.answer.set_result(question.ask())
        assert (await inspecting).pid == 5


async def test_a_gateway_that_does_not_read_is_dropped_and_stalls_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distserve.instance.streams.OUTBOX_LIMIT", 1000)
    events: list[Event] = []
    streams = GatewayStreams(ME, events.append)

    class Stuck:
        """A context whose other side says nothing and reads nothing."""

        async def send_initial_metadata(self, _: Any) -> None:
            return None

        async def write(self, _: Any) -> None:
            await asyncio.Event().wait()

    async def silent() -> AsyncIterator[Any]:
        await asyncio.Event().wait()
        yield

    serving_ = asyncio.create_task(streams.attach(GATEWAY, ServerEnd(silent(), Stuck())))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    for index in range(2000):
        streams.send(GATEWAY, TokensMade(ME, (SequenceOutput("r", 1, index, (Token(1),)),)))
    with pytest.raises(OutboxOverflow):
        async with asyncio.timeout(WAIT_S):
            await serving_
    assert events == [GatewayAttached(GATEWAY), GatewayLost(GATEWAY)]


async def test_an_outbox_hands_a_lagging_writer_whole_steps_at_once() -> None:
    outbox: Outbox[Event] = Outbox(10_000, weight, merged)
    for index in range(50):
        outbox.put(TokensMade(ME, (SequenceOutput("r", 1, index, (Token(index),)),)))
    outbox.put(Abandon(GATEWAY, "r", 1))
    outbox.put(TokensMade(ME, ()))
    first = await outbox.take()
    assert isinstance(first, TokensMade)
    assert [output.first_index for output in first.outputs] == list(range(50))
    assert await outbox.take() == Abandon(GATEWAY, "r", 1)
    assert await outbox.take() == TokensMade(ME, ())
    emptied = asyncio.create_task(outbox.emptied())
    waiting = asyncio.create_task(outbox.take())
    async with asyncio.timeout(WAIT_S):
        await emptied
    waiting.cancel()


# ── peers ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def peers_of(name: str, life: int) -> tuple[Peers, asyncio.Queue[Event]]:
    events: asyncio.Queue[Event] = asyncio.Queue()
    return Peers(Endpoint(InstanceRef(name, life), "127.0.0.1:1"), events.put_nowait), events


async def test_replies_ride_back_on_the_stream_that_the_source_dialled() -> None:
    async with serving() as held:
        source, heard = peers_of("source", 1)
        source.learn(MembersChanged(1, (member("me", 7, held.address),)))
        try:
            for _ in range(3):  # one stream, dialled once
                asked = MoveQueried("m1", InstanceRef("source", 1))
                source.send(ME, asked)
                assert await held.event() == asked
                held.network._peers.send(InstanceRef("source", 1), Committed("m1", ME, 9))
                async with asyncio.timeout(WAIT_S):
                    assert await heard.get() == Committed("m1", ME, 9)
        finally:
            await source.close()
        lost = await held.event()  # it hung up, and nobody answers where it said it was
        assert isinstance(lost, PeerLost)
        assert lost.ref == InstanceRef("source", 1)


async def test_a_peer_that_nobody_knows_or_that_is_another_life_is_lost() -> None:
    source, heard = peers_of("source", 1)
    source.send(ME, MoveQueried("m1", InstanceRef("source", 1)))
    assert await heard.get() == PeerLost(ME, "nobody knows where me#7 is")
    async with serving(life=8) as held:
        source.learn(MembersChanged(1, (member("me", 7, held.address),)))
        source.send(ME, MoveQueried("m1", InstanceRef("source", 1)))
        async with asyncio.timeout(WAIT_S):
            lost = await heard.get()
        assert isinstance(lost, PeerLost)
        assert "dialled me#7, here is me#8" in lost.why
    await source.close()


async def test_a_stream_that_breaks_is_dialled_again_before_the_peer_counts_as_lost() -> None:
    source, heard = peers_of("source", 1)
    asked = MoveQueried("m1", InstanceRef("source", 1))
    async with serving() as held:
        source.learn(MembersChanged(1, (member("me", 7, held.address),)))
        source.send(ME, asked)
        assert await held.event() == asked
        port = int(held.address.rpartition(":")[2])
    async with asyncio.timeout(WAIT_S):
        lost = await heard.get()
    assert isinstance(lost, PeerLost)
    async with serving(port=port) as again:  # the same life, for the test's sake
        source.learn(MembersChanged(2, (member("me", 7, again.address),)))
        source.send(ME, asked)
        assert await again.event() == asked
    await source.close()


async def test_an_instance_that_leaves_ends_its_streams_well(caplog: pytest.LogCaptureFixture) -> None:
    """Its gateways hear the end of a call, not of a connection, and the log has no trace of a cancelled handler."""
    async with serving() as held:
        stream = dialled(held.address)
        await stream.accepted()
        talk = asyncio.create_task(stream.converse(Outbox(100), pb.GatewayToInstance, lambda _: None))
        await asyncio.to_thread(held.inbox.take, wait=True, timeout_s=10.0)  # it is attached
        await held.network.close()
        await asyncio.wait_for(talk, 10)
        await stream.close()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
