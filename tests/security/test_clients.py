"""What a client meets: TLS whose certificate may be replaced, and limits, each with its status and sentence."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from distserve.gateway.auth import ApiKeys
from distserve.gateway.keys import Key, fresh_key, write_keys
from distserve.gateway.limits import Limits
from distserve.gateway.rpc.calls import peer_address
from distserve.v1 import inference_pb2 as pb
from distserve.v1.inference_pb2_grpc import InferenceServiceStub
from distserve.wire.security import TlsFiles
from distserve.wire.tls import Certificates
from tests.gateway.fake_backend import SPEC
from tests.security.certificates import make
from tests.security.conftest import Gateway, MakeGateway, read_all

WAIT_S = 20.0


def completion(**asked: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "Hello", "max_tokens": 3} | asked


def client(gateway: Gateway, **arguments: Any) -> httpx.AsyncClient:
    scheme = "https" if "verify" in arguments else "http"
    url = f"{scheme}://127.0.0.1:{gateway.http.port}"
    return httpx.AsyncClient(base_url=url, timeout=WAIT_S, trust_env=False, **arguments)


# ── TLS ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def serial(port: int, ca: Path) -> int:
    """Of the certificate that the server shows to a new connection."""
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=ssl.create_default_context(cafile=ca))
    shown = writer.get_extra_info("ssl_object").getpeercert()["serialNumber"]
    writer.close()
    return int(shown, 16)


async def test_certificates_of_both_ports_are_replaced_while_an_answer_streams(
    gateway: MakeGateway, tmp_path: Path
) -> None:
    held, now = make(tmp_path / "held"), [0.0]
    certificates = Certificates(TlsFiles(held / "cert.pem", held / "key.pem"), clock=lambda: now[0])
    running = await gateway(certificates=certificates)
    running.backend.script.hold_at = 1
    ca, where = held / "ca.pem", f"127.0.0.1:{running.grpc.port}"
    context = ssl.create_default_context(cafile=ca)
    asked = completion(stream=True)
    async with client(running, verify=context) as http, http.stream("POST", "/v1/completions", json=asked) as old:
        assert old.status_code == 200
        before = await serial(running.http.port, ca), await serial(running.grpc.port, ca)
        assert before[0] == before[1]
        make(held)
        assert await serial(running.http.port, ca) == before[0]  # the files are looked at once a second, at most
        now[0] = 1.0
        after = await serial(running.http.port, ca), await serial(running.grpc.port, ca)
        assert after[0] == after[1] != before[0]
        (held / "cert.pem").write_text("half a certif")
        now[0] = 2.0
        assert await serial(running.http.port, ca) == after[0]
        running.backend.go.set()
        assert (await old.aread()).endswith(b"data: [DONE]\n\n")
    credentials = grpc.ssl_channel_credentials(ca.read_bytes())
    async with grpc.aio.secure_channel(where, credentials) as channel:
        assert (await InferenceServiceStub(channel).ListModels(pb.ListModelsRequest(), timeout=WAIT_S)).models


async def test_no_tls_below_1_2_and_no_plain_text(gateway: MakeGateway, ours: Path) -> None:
    running = await gateway(certificates=Certificates(TlsFiles.of(ours)))
    old = ssl.create_default_context(cafile=ours / "ca.pem")
    with pytest.warns(DeprecationWarning):
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises((ssl.SSLError, ConnectionResetError)):
        await asyncio.open_connection("127.0.0.1", running.http.port, ssl=old)
    async with client(running) as http:
        with pytest.raises(httpx.TransportError):
            await http.get("/health")


# ── one request ──────────────────────────────────────────────────────────────────────────────────────────────────────

SMALL = Limits(
    max_prompts=2, max_requests=3, max_n=2, max_prompt_chars=100, max_prompt_tokens=20, max_stops=2, max_stop_chars=5,
    max_logit_bias=2, max_body_bytes=2000, max_message_bytes=2000, max_header_bytes=2000, max_timeout_s=5.0,
)  # fmt: skip

REFUSED = {
    "max_prompts": ({"prompt": ["a", "b", "c"]}, 400, "3 prompts in one call are too many; send at most 2"),
    "max_requests": ({"prompt": ["a", "b"], "n": 2}, 400, "make 4 answers; ask for at most 3"),
    "max_n": ({"n": 3}, 400, "n is 3, but must be from 1 to 2"),
    "max_prompt_chars": ({"prompt": "x" * 101}, 400, "The prompt has 101 characters; at most 100"),
    "max_prompt_tokens": ({"prompt": [5] * 21}, 400, "The prompt has 21 tokens; at most 20"),
    "max_stops": ({"stop": ["a", "b", "c"]}, 400, "3 stop texts are too many; send at most 2"),
    "max_stop_chars": ({"stop": "abcdef"}, 400, "A stop text has 6 characters; at most 5"),
    "max_logit_bias": ({"logit_bias": {"1": 1, "2": 1, "3": 1}}, 400, "3 biased tokens are too many; send at most 2"),
    "max_body_bytes": ({"prompt": "x" * 2001}, 413, "The body is longer than 2000 bytes"),
}


@pytest.mark.parametrize("limit", list(REFUSED))
async def test_a_request_beyond_a_limit(gateway: MakeGateway, limit: str) -> None:
    asked, status, words = REFUSED[limit]
    async with client(await gateway(SMALL)) as http:
        answer = await http.post("/v1/completions", json=completion(**asked))
        assert answer.status_code == status and words in answer.json()["error"]["message"]
        assert (await http.post("/v1/completions", json=completion())).status_code == 200


async def test_the_longest_deadline_is_ours(gateway: MakeGateway) -> None:
    running = await gateway(SMALL)
    async with client(running) as http:
        assert (await http.post("/v1/completions", json=completion(timeout_s=60))).status_code == 200
    assert running.backend.submitted[0].timeout_s == 5.0


async def test_a_grpc_message_or_its_metadata_beyond_a_limit(gateway: MakeGateway) -> None:
    running = await gateway(SMALL)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{running.grpc.port}") as channel:
        stub = InferenceServiceStub(channel)
        for arguments in (
            {"request": pb.TokenizeRequest(text="x" * 2001)},
            {"request": pb.TokenizeRequest(text="x"), "metadata": (("x-long", "y" * 2001),)},
        ):
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await stub.Tokenize(**arguments, timeout=WAIT_S)
            assert failed.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await stub.Tokenize(pb.TokenizeRequest(text="x"), timeout=WAIT_S)).token_ids


# ── a connection ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def raw(gateway: Gateway) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", gateway.http.port)


def told(answer: bytes) -> tuple[int, str]:
    """Status and sentence of a raw answer."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    return int(head.split(b" ")[1]), json.loads(body)["error"]["message"]


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize(
    ("said", "status", "words"),
    [
        (b"", 408, "headers did not arrive within 0.2 s"),
        (HEAD + b"X-Slow: ", 408, "headers did not arrive within 0.2 s"),
        (HEAD + b"Content-Length: 10\r\n\r\n{", 408, "body did not arrive within 0.2 s"),
        (HEAD + b"X-Long: " + b"y" * 5000, 431, "headers are longer than 2000 bytes"),
        (b"GET /" + b"y" * 5000, 431, "headers are longer than 2000 bytes"),
    ],
    ids=["silence", "half a head", "half a body", "long headers", "a long path"],
)
async def test_a_slow_or_endless_request_ends(gateway: MakeGateway, said: bytes, status: int, words: str) -> None:
    limits = Limits(header_timeout_s=0.2, body_timeout_s=0.2, max_header_bytes=2000)
    running = await gateway(limits)
    reader, writer = await raw(running)
    writer.write(said)
    answer = await read_all(reader)
    writer.close()
    code, sentence = told(answer)
    assert code == status and words in sentence
    async with client(running) as http:
        assert (await http.post("/v1/completions", json=completion())).status_code == 200


async def test_a_body_that_is_all_framing_ends(gateway: MakeGateway) -> None:
    """Chunks of one byte, with long extensions: little body, many bytes."""
    running = await gateway(Limits(max_body_bytes=2000))
    reader, writer = await raw(running)
    writer.write(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
    try:
        for _ in range(200):
            writer.write(b"1;x=" + b"y" * 1000 + b"\r\n \r\n")
            await writer.drain()
        assert await read_all(reader) == b""
    except ConnectionError:
        pass  # it hung up while we still sent
    writer.close()
    async with client(running) as http:
        assert (await http.get("/health")).status_code == 200


async def test_an_idle_connection_is_kept_for_so_long(gateway: MakeGateway) -> None:
    reader, writer = await raw(await gateway(Limits(keep_alive_s=0.2, header_timeout_s=60.0)))
    writer.write(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
    assert b'{"status":"live"}' in await read_all(reader)  # and then it closes
    writer.close()


async def test_who_reads_nothing_of_an_answer_is_hung_up_on(gateway: MakeGateway) -> None:
    """Its connection is freed as well, though it never closes its end."""
    running = await gateway(Limits(unread_limit_s=0.3))
    running.backend.spec = replace(SPEC, max_model_len=10**9, pool_blocks=10**9)
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    with sock:
        sock.connect(("127.0.0.1", running.http.port))
        body = json.dumps(completion(stream=True, max_tokens=10**8, request_id="unread")).encode()
        sock.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        await running.backend.until(lambda: "unread" in running.backend.closed)
        sock.settimeout(WAIT_S)
        heard = b""
        while part := sock.recv(1 << 20):  # what had been sent, and then the end
            heard = (heard + part)[-100:]
        assert b"[DONE]" not in heard


async def test_who_reads_an_answer_slowly_is_let_be(gateway: MakeGateway) -> None:
    """A whole answer of several MB, a little of it in each while: longer than the limit in all."""
    running = await gateway(Limits(unread_limit_s=0.4, max_n=16))
    running.backend.spec = replace(SPEC, max_model_len=10**9, pool_blocks=10**9)
    body = json.dumps(completion(max_tokens=12000, n=16, logprobs=5)).encode()
    running.backend.script.batch = 100
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", running.http.port))
    reader, writer = await asyncio.open_connection(sock=sock, limit=4096)
    writer.write(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    async with asyncio.timeout(WAIT_S):
        head = await reader.readuntil(b"\r\n\r\n")
        left = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        assert left > 8 << 20, left
        for _ in range(6):
            await asyncio.sleep(0.15)  # the point of this test: a pause between two reads
            left -= len(await reader.readexactly(left // 10))
        assert len(await reader.readexactly(left)) == left
    writer.close()


async def test_a_stream_is_not_cut_by_the_timeouts_of_requests(gateway: MakeGateway) -> None:
    running = await gateway(Limits(header_timeout_s=0.1, body_timeout_s=0.1, keep_alive_s=0.1))
    running.backend.script.hold_at = 1
    async with client(running) as http, http.stream("POST", "/v1/completions", json=completion(stream=True)) as answer:
        await asyncio.sleep(0.5)  # the point of this test: longer than each of them
        running.backend.go.set()
        assert (await answer.aread()).endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("limits", "status", "words"),
    [
        (Limits(max_client_connections=2), 429, "There are 2 connections from 127.0.0.1 already"),
        (Limits(max_connections=2), 503, "This gateway has its 2 connections"),
    ],
    ids=["of one address", "of all"],
)
async def test_one_connection_too_many(gateway: MakeGateway, limits: Limits, status: int, words: str) -> None:
    running = await gateway(limits)
    held = [await raw(running) for _ in range(2)]
    for _, writer in held:
        writer.write(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
    for reader, _ in held:
        assert b"200" in await reader.readline()  # so both are counted
    reader, writer = await raw(running)
    code, said = told(await read_all(reader))
    assert code == status and words in said
    writer.close()
    held[0][1].close()
    async with asyncio.timeout(WAIT_S):
        while True:  # until the server has heard of the close
            reader, writer = await raw(running)
            writer.write(b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            try:
                if b" 200 " in await reader.readline():
                    break
            except ConnectionError:
                continue
            finally:
                writer.close()
    held[1][1].close()


async def test_calls_beyond_a_connections_share_wait_for_their_turn(gateway: MakeGateway) -> None:
    running = await gateway(Limits(max_connection_streams=1))
    running.backend.script.hold_at = 1
    async with grpc.aio.insecure_channel(f"127.0.0.1:{running.grpc.port}") as channel:
        stub = InferenceServiceStub(channel)
        first = stub.Generate(pb.GenerateRequest(text="Hello"), timeout=WAIT_S)
        assert (await first.read()).HasField("accepted")
        second = asyncio.ensure_future(stub.ListModels(pb.ListModelsRequest(), timeout=WAIT_S))
        await asyncio.wait([second], timeout=0.2)
        assert not second.done()
        first.cancel()
        assert (await second).models


async def test_one_grpc_connection_too_many(gateway: MakeGateway) -> None:
    running = await gateway(Limits(max_connections=2))
    options = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0))
    channels = [grpc.aio.insecure_channel(f"127.0.0.1:{running.grpc.port}", options=options) for _ in range(3)]
    codes = []
    for channel in channels:
        try:
            await InferenceServiceStub(channel).ListModels(pb.ListModelsRequest(), timeout=WAIT_S)
            codes.append("OK")
        except grpc.aio.AioRpcError as error:
            codes.append(error.code().name)
    for channel in channels:
        await channel.close()
    assert codes == ["OK", "OK", "UNAVAILABLE"]


# ── a client ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_one_stream_too_many_of_a_key(gateway: MakeGateway, tmp_path: Path) -> None:
    alice, bob = fresh_key(), fresh_key()
    write_keys(tmp_path / "keys", [Key.of("alice", alice, max_streams=2), Key.of("bob", bob)])
    running = await gateway(Limits(max_client_streams=3), ApiKeys(file=tmp_path / "keys"))
    running.backend.script.hold_at = 1
    async with client(running) as http:

        def ask(key: str, **asked: Any) -> Any:
            headers = {"Authorization": f"Bearer {key}"}
            return http.stream("POST", "/v1/completions", json=completion(stream=True, **asked), headers=headers)

        async with ask(alice, n=2) as first:
            assert first.status_code == 200
            async with ask(alice) as second:
                assert second.status_code == 429 and int(second.headers["retry-after"]) >= 1
                body = json.loads(await second.aread())
                assert "key 'alice'" in body["error"]["message"] and "2 answers under way" in body["error"]["message"]
            async with ask(bob, n=2) as other, ask(bob) as more, ask(bob) as much:
                assert [answer.status_code for answer in (other, more, much)] == [200, 200, 429]
    under_way = running.front_end.admission.under_way
    async with asyncio.timeout(WAIT_S):  # all of them left before their end: nothing stays counted
        while under_way("key 'alice'") or under_way("key 'bob'"):  # noqa: ASYNC110
            await asyncio.sleep(0.01)  # the count has no event: nothing but this test waits for it


async def test_one_stream_too_many_of_an_address(gateway: MakeGateway) -> None:
    running = await gateway(Limits(max_client_streams=1))
    running.backend.script.hold_at = 1
    async with grpc.aio.insecure_channel(f"127.0.0.1:{running.grpc.port}") as channel:
        stub = InferenceServiceStub(channel)
        request = pb.GenerateRequest(text="Hello")
        first = stub.Generate(request, timeout=WAIT_S)
        assert (await first.read()).HasField("accepted")
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            async for _ in stub.Generate(request, timeout=WAIT_S):
                pass
        assert failed.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "127.0.0.1" in failed.value.details()
        first.cancel()
        async with asyncio.timeout(WAIT_S):
            while running.front_end.admission.under_way("127.0.0.1"):  # noqa: ASYNC110
                await asyncio.sleep(0.01)  # the count has no event: nothing but this test waits for it


def test_addresses_of_peers() -> None:
    assert peer_address("ipv4:10.0.0.1:4711") == "10.0.0.1"
    assert peer_address("ipv6:%5B::1%5D:4711") == "::1"
    assert peer_address("unix:") == ""


def test_every_limit_is_tested_here() -> None:
    """A new limit needs a test above; this list is what says so."""
    elsewhere = {
        "default_timeout_s", "max_timeout_s", "max_message_bytes", "max_header_bytes", "header_timeout_s",
        "body_timeout_s", "keep_alive_s", "unread_limit_s", "max_client_streams", "max_client_connections",
        "max_connections", "max_connection_streams",
    }  # fmt: skip
    assert {field.name for field in fields(Limits)} == set(REFUSED) | elsewhere
