"""uvicorn's HTTP protocol with bounds on what a connection may cost before the application sees anything of it.

Owns: how many connections there are, in all and from one address; how long a request may take to arrive, and how long
its head may be. A client that sends a byte now and then holds no connection for longer than that, nor does one that
reads nothing of its answer. Knows no path.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import orjson
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from distserve.core.types import Code
from distserve.gateway.limits import Limits
from distserve.wire.status import Problem, http_headers, openai_body

REQUEST_TIMEOUT, BODY_TOO_LARGE, HEADERS_TOO_LARGE = 408, 413, 431
FRAMING = 8
"""Times the longest body that a request's bytes may be: chunks of a few bytes each have heads longer than they are."""


@dataclass(slots=True)
class Connections:
    """Those that stand now."""

    limits: Limits
    total: int = 0
    by_address: Counter[str] = field(default_factory=Counter)

    def enter(self, address: str) -> Problem | None:
        """Count one more, or say why not."""
        most, here = self.limits.max_connections, self.limits.max_client_connections
        if most and self.total >= most:
            return Problem(Code.UNAVAILABLE, f"This gateway has its {most} connections; try again shortly.")
        if here and self.by_address[address] >= here:
            return Problem(
                Code.RESOURCE_EXHAUSTED, f"There are {here} connections from {address} already; close or reuse some."
            )
        self.total += 1
        self.by_address[address] += 1
        return None

    def leave(self, address: str) -> None:
        self.total -= 1
        self.by_address[address] -= 1
        if not self.by_address[address]:
            del self.by_address[address]


def bounded(limits: Limits) -> Callable[..., asyncio.Protocol]:
    """The protocol that uvicorn makes a connection with; its counts are shared by all of them."""
    connections = Connections(limits)

    class Bounded(_Bounded):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(limits, connections, *arguments, **named)

    return Bounded


class _Bounded(HttpToolsProtocol):
    """See the module."""

    def __init__(self, limits: Limits, connections: Connections, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._limits = limits
        self._counted_in = connections
        self._address: str | None = None  # while it is counted
        self._head_bytes: int | None = None  # of the head that arrives; None: within a body, or between requests
        self._body_bytes = 0  # with all that frames it
        self._patience: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None  # while its answer waits for it

    # ── the connection ───────────────────────────────────────────────────────────────────────────────────────────────

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        address = self.client[0] if self.client else ""
        problem = self._counted_in.enter(address)
        if problem is not None:
            self._end(problem.status.http, problem)
            return
        self._address = address
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._calm()
        self._was_read()
        if self._address is not None:
            self._counted_in.leave(self._address)
            self._address = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._head_bytes is None and self._patience is None:  # the next request of a connection that was idle
            self._await_head()
        if self._head_bytes is not None:
            self._head_bytes += len(data)
        else:
            self._body_bytes += len(data)
        super().data_received(data)
        if self._head_bytes is not None and self._head_bytes > (most := self._limits.max_header_bytes):
            self._refuse(HEADERS_TOO_LARGE, f"The headers are longer than {most} bytes; send fewer.")
        elif self._body_bytes > FRAMING * self._limits.max_body_bytes:
            self._refuse(BODY_TOO_LARGE, "The body with what frames it is too long; send a shorter prompt.")

    def pause_writing(self) -> None:
        super().pause_writing()
        self._was_read()
        self._await_reader()

    def _await_reader(self) -> None:
        """The client leaves so much unread that nothing more is written: see whether it takes some of it in time."""
        left = self.transport.get_write_buffer_size()
        self._unread = self.loop.call_later(self._limits.unread_limit_s, self._look_at_reader, left)

    def _look_at_reader(self, before: int) -> None:
        if self.transport.get_write_buffer_size() < before:
            self._await_reader()
        else:
            self.transport.abort()  # not close: that would wait for it, too

    def resume_writing(self) -> None:
        self._was_read()
        super().resume_writing()

    def _was_read(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    # ── the request ──────────────────────────────────────────────────────────────────────────────────────────────────

    def on_headers_complete(self) -> None:
        self._head_bytes = None
        super().on_headers_complete()
        seconds = self._limits.body_timeout_s
        self._within(seconds, f"The request's body did not arrive within {seconds:g} s; send it faster.")

    def on_message_complete(self) -> None:
        self._calm()
        super().on_message_complete()

    def _await_head(self) -> None:
        self._head_bytes = self._body_bytes = 0
        seconds = self._limits.header_timeout_s
        self._within(seconds, f"The request's headers did not arrive within {seconds:g} s; send them faster.")

    def _within(self, seconds: float, message: str) -> None:
        """Hang up with this sentence unless what is awaited comes in time."""
        self._calm()
        self._patience = self.loop.call_later(seconds, self._refuse, REQUEST_TIMEOUT, message)

    def _calm(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    # ── the end ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _refuse(self, status: int, message: str) -> None:
        self._end(status, Problem(Code.INVALID_ARGUMENT, message))

    def _end(self, status: int, problem: Problem) -> None:
        """Answer, if no answer has begun, and hang up."""
        self._calm()
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete or not (self.pipeline or self.cycle.response_started):
            body = orjson.dumps(openai_body(problem))
            headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
            lines = [f"{name}: {value}\r\n".encode() for name, value in (headers | http_headers(problem)).items()]
            self.transport.write(b"".join((STATUS_LINE[status], *lines, b"\r\n", body)))
        self.transport.close()
