"""``distserve serve`` when a part of its own gateway breaks: it ends, and says so with its exit code."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from distserve.launch import serve
from distserve.launch.options import ServeOptions


class Gateway:
    """Ready at once; a moment later one of its tasks breaks, if it is to, and it asks its process to end."""

    controller_address = "127.0.0.1:1"

    def __init__(self, broken: bool) -> None:
        self.broken = broken
        self.ready = asyncio.Event()
        self.ready.set()

    def ports(self) -> dict[str, Any]:
        asyncio.get_running_loop().call_soon(signal.raise_signal, signal.SIGTERM)
        return {"http_port": None, "grpc_port": 1, "controller_address": self.controller_address}

    async def drain(self, urgent: asyncio.Event) -> None:
        return


class Nobody:
    """Keeps no instances, for ever."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.kept: dict[str, Any] = {}
        self.complete = asyncio.Event()
        self.complete.set()

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def end(self, grace_s: float) -> None:
        return


@pytest.mark.parametrize(("broken", "code"), [(True, serve.FAILED), (False, serve.STOPPED)])
async def test_the_exit_code_tells_whether_the_gateway_broke(
    monkeypatch: pytest.MonkeyPatch, broken: bool, code: int
) -> None:
    @asynccontextmanager
    async def gateway(*_: Any) -> AsyncIterator[Gateway]:
        yield Gateway(broken)

    monkeypatch.setattr(serve, "gateway", gateway)
    monkeypatch.setattr(serve, "Supervisor", Nobody)
    async with asyncio.timeout(20):
        assert await serve._Cluster(ServeOptions(model="m", grpc_port=1, http_port=None), "m").run() == code
