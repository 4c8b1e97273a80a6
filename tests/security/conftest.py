"""Two cluster CAs with a certificate each, and front ends over a scripted backend."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from distserve.gateway.auth import ApiKeys
from distserve.gateway.frontend import FrontEnd
from distserve.gateway.http.app import HttpConfig, http_app
from distserve.gateway.http.server import HttpServer, serve_http
from distserve.gateway.limits import Limits
from distserve.gateway.rpc.server import GrpcConfig, GrpcServer, build_grpc_server
from distserve.gateway.template import ChatTemplate
from distserve.gateway.text import TextCodec
from distserve.wire.tls import Certificates
from tests.gateway.fake_backend import FakeBackend
from tests.gateway.tokenizers_for_tests import TEMPLATE, byte_level
from tests.security.certificates import make


@pytest.fixture(scope="session")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="session")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of another CA."""
    return make(tmp_path_factory.mktemp("theirs"))


@pytest.fixture(scope="session")
def codec() -> TextCodec:
    return TextCodec(byte_level(), ChatTemplate(TEMPLATE, {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}))


@dataclass(slots=True)
class Gateway:
    """Both servers, and what is behind them."""

    http: HttpServer
    grpc: GrpcServer
    backend: FakeBackend
    front_end: FrontEnd


MakeGateway = Callable[..., Awaitable[Gateway]]


@pytest.fixture
async def gateway(codec: TextCodec) -> AsyncIterator[MakeGateway]:
    """Starts a gateway with these limits, keys and certificates."""

    async def metrics() -> tuple[bytes, str]:
        return b"up 1\n", "text/plain"

    async with AsyncExitStack() as stack:

        async def start(
            limits: Limits | None = None,
            keys: ApiKeys | None = None,
            certificates: Certificates | None = None,
            open_metrics: bool = False,
        ) -> Gateway:
            limits = limits or Limits()
            backend = FakeBackend()
            front_end = FrontEnd(backend, {"tiny": codec}, limits, keys=keys)
            app = http_app(front_end, metrics, HttpConfig(limits.max_body_bytes, open_metrics=open_metrics))
            http = await serve_http(app, "127.0.0.1", 0, limits, certificates)
            stack.push_async_callback(http.stop, 0)
            server = build_grpc_server(front_end, GrpcConfig(limits, certificates))
            await server.start("127.0.0.1", 0)
            stack.push_async_callback(server.stop, 0)
            return Gateway(http, server, backend, front_end)

        yield start


async def read_all(reader: asyncio.StreamReader, within_s: float = 20.0) -> bytes:
    """What comes until the other side closes."""
    async with asyncio.timeout(within_s):
        return await reader.read()
