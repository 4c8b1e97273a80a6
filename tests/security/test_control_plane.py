"""Between the parts: certificates of one CA, or a secret both know; a stranger is told which side refused, and why."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from distserve.controller.options import ControllerOptions
from distserve.controller.process import controller
from distserve.core.events import Event, GatewayJoined, MembersChanged
from distserve.core.types import GatewayRef
from distserve.v1.control_pb2 import GatewayToController, KvCheckRequest
from distserve.v1.control_pb2_grpc import ControllerServiceStub, InstanceServiceStub
from distserve.wire.channels import Hello, bind, dial, sentence
from distserve.wire.secret import WINDOW_S, ClusterSecret, SecretRefused
from distserve.wire.security import SecurityOptions
from distserve.wire.stream import STREAM_ENDS, DialledStream, Outbox
from distserve.wire.trust import OPEN, Trust
from tests.security.certificates import make

ME = GatewayRef("g", 1)
SECRET, OTHER = "the-secret-of-this-cluster", "the-secret-of-another-one"


def secret(*known: str) -> Trust:
    return Trust(secret=ClusterSecret(known))


def tls(directory: Path, name: str = "") -> Trust:
    return Trust.of(SecurityOptions(tls_dir=directory, tls_name=name))


@asynccontextmanager
async def attached(
    address: str, trust: Trust, me: GatewayRef = ME
) -> AsyncIterator[tuple[asyncio.Queue[Event], Outbox[Event]]]:
    """A gateway's stream to the controller: what it is told, and what it says."""
    heard: asyncio.Queue[Event] = asyncio.Queue()
    stream = DialledStream(address, ControllerServiceStub, "AttachGateway", Hello(me), trust)
    try:
        await stream.accepted()
        outbox: Outbox[Event] = Outbox(100)
        outbox.put(GatewayJoined(me))
        talk = asyncio.ensure_future(stream.converse(outbox, GatewayToController, heard.put_nowait))
        yield heard, outbox
        talk.cancel()
        await asyncio.gather(talk, return_exceptions=True)
    finally:
        await stream.close()


async def told_members(address: str, trust: Trust) -> None:
    async with attached(address, trust) as (heard, _), asyncio.timeout(20):
        assert isinstance(await heard.get(), MembersChanged)


async def refusal(address: str, trust: Trust) -> str:
    try:
        await told_members(address, trust)
    except STREAM_ENDS as error:
        return sentence(error)
    raise AssertionError("it was let in")


# ── certificates ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_parts_of_one_ca_talk_and_strangers_are_told_who_refused(
    ours: Path, theirs: Path, tmp_path: Path
) -> None:
    async with controller(ControllerOptions(security=SecurityOptions(tls_dir=ours))) as address:
        await told_members(address, tls(ours))
        await told_members(address, tls(ours, name="distserve"))
        assert f"we refused the certificate of {address}: it is not signed by {theirs}" in await refusal(
            address, tls(theirs)
        )
        impostor = make(tmp_path / "impostor", ca_dir=theirs)
        (impostor / "ca.pem").write_bytes((ours / "ca.pem").read_bytes())  # believes us, but is not ours
        assert f"{address} refused us in the TLS handshake: is our certificate {impostor}" in await refusal(
            address, tls(impostor)
        )
        assert "does it want TLS?" in await refusal(address, OPEN)
        assert "not made out to that name" in await refusal(address, tls(ours, name="elsewhere"))
        await told_members(address, tls(ours))
    async with controller(ControllerOptions()) as address:
        assert f"{address} speaks no TLS" in await refusal(address, tls(ours))


async def test_certificates_are_replaced_while_streams_live_on(tmp_path: Path, theirs: Path) -> None:
    """The whole cluster's PKI is exchanged: the stream that stands goes on, new ones need the new one."""
    held = make(tmp_path / "held")
    old = make(tmp_path / "old", ca_dir=held)
    async with controller(ControllerOptions(security=SecurityOptions(tls_dir=held))) as address:
        trust = tls(held)
        async with attached(address, trust, GatewayRef("standing", 1)) as (heard, outbox):
            assert isinstance(await asyncio.wait_for(heard.get(), 20), MembersChanged)
            await told_members(address, tls(old))
            for name in ("ca-key.pem", "ca.pem"):
                (held / name).write_bytes((theirs / name).read_bytes())
            make(held)  # signed by the other CA now
            async with asyncio.timeout(60):
                while not await refused(address, tls(old)):  # noqa: ASYNC110
                    await asyncio.sleep(0.2)  # the files are looked at once a second, when somebody dials
            await told_members(address, tls(theirs))
            await told_members(address, trust)  # the same object: a channel that is dialled reads anew
            outbox.put(GatewayJoined(GatewayRef("standing", 1)))
            assert isinstance(await asyncio.wait_for(heard.get(), 20), MembersChanged)


async def refused(address: str, trust: Trust) -> bool:
    try:
        await told_members(address, trust)
    except STREAM_ENDS:
        return True
    return False


# ── the secret ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_who_knows_the_secret_is_let_in_and_others_are_told() -> None:
    options = ControllerOptions(security=SecurityOptions(cluster_secret=SECRET))
    async with controller(options) as address:
        await told_members(address, secret(SECRET))
        assert (await refusal(address, OPEN)).startswith("unauthenticated: this cluster has a secret")
        assert "the caller's cluster secret is not ours" in await refusal(address, secret(OTHER))
        await told_members(address, secret(SECRET, OTHER))


async def test_a_false_controller_is_not_believed() -> None:
    async with controller(ControllerOptions()) as address:  # takes anybody in, and can prove nothing
        assert f"we refused {address}: it does not know our cluster secret" in await refusal(address, secret(SECRET))


async def test_a_secret_is_replaced_by_two_rounds_of_restarts(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text(f"# new, then old\n{OTHER}\n{SECRET}\n")
    async with controller(ControllerOptions(security=SecurityOptions(cluster_secret_file=file))) as address:
        await told_members(address, secret(SECRET))
        await told_members(address, secret(OTHER))


async def test_every_shape_of_call_is_refused() -> None:
    server, port = bind("127.0.0.1", 0, secret(SECRET))
    await server.start()
    async with dial(f"127.0.0.1:{port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await InstanceServiceStub(channel).KvCheck(KvCheckRequest(), timeout=20)
        assert failed.value.code() is grpc.StatusCode.UNAUTHENTICATED
    await server.stop(None)


def test_a_proof_holds_once_for_its_call_and_for_a_minute() -> None:
    now = [1000.0]
    caller, callee = ClusterSecret([SECRET], lambda: now[0]), ClusterSecret([OTHER, SECRET], lambda: now[0])
    path, hello = "/distserve.v1.ControllerService/AttachGateway", b"who I am"
    proof = caller.prove(path, hello)
    assert SECRET not in proof.text
    for wrong in ((path + "x", hello), (path, b"who I am not")):
        with pytest.raises(SecretRefused, match="not ours"):
            callee.check(*wrong, [proof.text])
    callee.check(path, hello, [proof.text])
    with pytest.raises(SecretRefused, match="used before"):
        callee.check(path, hello, [proof.text])
    early = caller.prove(path, hello)
    for apart in (-WINDOW_S - 1, WINDOW_S + 1):
        now[0] = 1000.0 + apart
        with pytest.raises(SecretRefused, match=r"clocks .* 61 s apart"):
            callee.check(path, hello, [early.text])
    assert caller.is_answer(proof, callee.answer(proof.text))
    assert not caller.is_answer(proof, ClusterSecret([OTHER]).answer(proof.text))
    assert not caller.is_answer(early, callee.answer(proof.text))
    assert not caller.is_answer(proof, "ünreadable")


def test_used_proofs_are_forgotten_when_their_time_has_passed() -> None:
    now = [0.0]
    held = ClusterSecret([SECRET], lambda: now[0])
    for _ in range(1000):
        now[0] += 1.0
        held.check("/x", b"", [held.prove("/x", b"").text])
    assert len(held._seen) <= 2 * WINDOW_S + 1


@pytest.mark.parametrize(
    "text", ["", "1", "2 0 0 0", "1 x y z", "1 -5 " + "0" * 32 + " 0", "1 1 " + "é" * 32 + " 0", " " * 9]
)
def test_a_proof_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(SecretRefused, match="cannot be read"):
        ClusterSecret([SECRET]).check("/x", b"", [text])
    with pytest.raises(SecretRefused, match="showed none"):
        ClusterSecret([SECRET]).check("/x", b"", [text, text])
