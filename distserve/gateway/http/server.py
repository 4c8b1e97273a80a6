"""The HTTP server: a socket, and uvicorn's protocol on it.

Owns listening and stopping. Signals, logging set-up and the event loop belong to whoever starts it, and it sleeps while
nothing happens (uvicorn's own loop wakes ten times a second).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from distserve.gateway.http.protocol import bounded
from distserve.gateway.limits import Limits
from distserve.gateway.ports import listen
from distserve.wire.tls import Certificates


class HttpServer:
    """A running server. Made by ``serve_http``."""

    def __init__(self, server: _Server, serving: asyncio.Task[None], port: int) -> None:
        self.port = port
        self._server = server
        self._serving = serving

    async def stop(self, grace_s: float) -> None:
        """Take no new connections, let answers finish for up to ``grace_s``, cancel the rest. Idempotent."""
        # A wait of zero would be reported as exceeded even when there is nothing to wait for.
        self._server.config.timeout_graceful_shutdown = max(grace_s, 0.05)  # type: ignore[assignment]
        self._server.leave.set()
        await asyncio.shield(self._serving)
        await asyncio.gather(*self._server.server_state.tasks, return_exceptions=True)


async def serve_http(
    app: ASGIApp, host: str, port: int, limits: Limits | None = None, certificates: Certificates | None = None
) -> HttpServer:
    """Listen and serve; port 0 picks a free one. Returns once connections are taken. Raises ``PortUnavailable``.

    With ``certificates`` it speaks TLS, each connection with the certificate of its own time.
    """
    limits = limits or Limits()
    config = uvicorn.Config(
        app,
        http=bounded(limits),  # type: ignore[arg-type]  # it wants a class, and calls it
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        timeout_keep_alive=limits.keep_alive_s,  # type: ignore[arg-type]  # as good as a whole number
    )
    config.load()
    config.ssl = certificates.server_context() if certificates is not None else None
    sock = listen("HTTP", host, port)
    bound: int = sock.getsockname()[1]
    server = _Server(config)
    serving = asyncio.create_task(server.serve([sock]), name="http server")
    ready = asyncio.create_task(server.ready.wait())
    await asyncio.wait((serving, ready), return_when=asyncio.FIRST_COMPLETED)
    if not server.ready.is_set():
        ready.cancel()
        await serving
    return HttpServer(server, serving, bound)


class _Server(uvicorn.Server):
    """uvicorn without signal handlers and without a ticking main loop."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = asyncio.Event()
        self.leave = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def main_loop(self) -> None:
        await self.on_tick(0)  # sets the default headers
        self.ready.set()
        await self.leave.wait()
