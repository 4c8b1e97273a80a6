"""A gateway's front ends on real sockets over a scripted backend."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator

import grpc
import httpx
import pytest

from distserve.core.types import Code
from distserve.gateway.frontend import FrontEnd
from distserve.gateway.http.app import HttpConfig, http_app
from distserve.gateway.http.server import HttpServer, serve_http
from distserve.gateway.rpc.server import GrpcServer, build_grpc_server
from distserve.gateway.template import ChatTemplate
from distserve.gateway.text import TextCodec
from tests.gateway.fake_backend import FakeBackend
from tests.gateway.tokenizers_for_tests import TEMPLATE, byte_level, sentencepiece


@pytest.fixture(scope="session")
def codec() -> TextCodec:
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    return TextCodec(byte_level(), ChatTemplate(TEMPLATE, special))


@pytest.fixture(scope="session")
def piece_codec() -> TextCodec:
    return TextCodec(sentencepiece())


@pytest.fixture
async def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def refusals() -> list[tuple[str, Code]]:
    return []


@pytest.fixture
def front_end(backend: FakeBackend, codec: TextCodec, refusals: list[tuple[str, Code]]) -> FrontEnd:
    return FrontEnd(backend, {"tiny": codec}, refused=lambda where, code: refusals.append((where, code)))


async def metrics_page() -> tuple[bytes, str]:
    return b"up 1\n", "text/plain; version=0.0.4"


@pytest.fixture
async def http_url(front_end: FrontEnd) -> AsyncIterator[str]:
    app = http_app(front_end, metrics_page, HttpConfig(max_body_bytes=100_000))
    server = await serve_http(app, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{server.port}"
    await server.stop(grace_s=0)


@pytest.fixture
def http_url_in_thread(codec: TextCodec) -> Iterator[str]:
    """A server on a loop of its own, for clients that block."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start() -> HttpServer:
        return await serve_http(http_app(FrontEnd(FakeBackend(), {"tiny": codec})), "127.0.0.1", 0)

    server = asyncio.run_coroutine_threadsafe(start(), loop).result(timeout=20)
    yield f"http://127.0.0.1:{server.port}"
    asyncio.run_coroutine_threadsafe(server.stop(grace_s=0), loop).result(timeout=20)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture
async def http(http_url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=http_url, timeout=20, trust_env=False) as client:
        yield client


@pytest.fixture
async def grpc_server(front_end: FrontEnd) -> AsyncIterator[GrpcServer]:
    server = build_grpc_server(front_end)
    await server.start("127.0.0.1", 0)
    yield server
    await server.stop(grace_s=0)


@pytest.fixture
async def channel(grpc_server: GrpcServer) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{grpc_server.port}") as channel:
        yield channel
