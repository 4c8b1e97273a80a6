"""What every gRPC call shares: its metadata, its deadline, and how an error becomes its status.

Owns the translation at the edge. Knows nothing of what a call does.
"""

from __future__ import annotations

import asyncio
import logging
from types import TracebackType
from typing import Any

import grpc

from distserve.core.types import Code
from distserve.gateway.auth import Caller, require_admin
from distserve.gateway.backend import RequestFailed
from distserve.gateway.faults import BAD_FAULT
from distserve.gateway.frontend import FrontEnd
from distserve.wire.status import Problem, grpc_status

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
REQUEST_ID_KEY = "x-request-id"


class Call:
    """One call, as an async context manager: what is raised inside ends the call with the right status.

    ``RequestFailed`` becomes its status with details; a bug becomes INTERNAL and is logged; a cancelled call (client
    gone, deadline passed) stays cancelled.
    """

    def __init__(self, context: Context, front_end: FrontEnd, kind: str = "grpc", *, admin: bool = False) -> None:
        self.caller = Caller()
        self._admin = admin
        self._context = context
        self._front_end = front_end
        self._kind = kind
        self._metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        self.request_id = self._metadata.get(REQUEST_ID_KEY, "")

    async def __aenter__(self) -> Call:
        try:
            address = peer_address(self._context.peer())
            self.caller = self._front_end.keys.check(self._metadata.get("authorization", ""), address)
            if self._admin:
                require_admin(self.caller)
        except RequestFailed as failure:
            await self._abort(failure)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, (asyncio.CancelledError, grpc.aio.AbortError)):
            return
        if isinstance(error, RequestFailed):
            await self._abort(error)
        elif isinstance(error, Exception):
            log.error("call for request %s broke", self.request_id or "?", exc_info=error)
            await self._abort(RequestFailed(Code.INTERNAL, BAD_FAULT))

    async def _abort(self, failure: RequestFailed) -> None:
        """End the call with this status; raises, always."""
        self._front_end.refused(self._kind, failure.code)
        problem = Problem(failure.code, failure.message, failure.retry_after_s, failure.param, self.request_id)
        try:
            await self._context.abort_with_status(grpc_status(problem))  # type: ignore[attr-defined]  # stubs lack it
        except grpc.aio.InternalError:  # the call ended meanwhile (deadline, client gone): nobody is left to be told
            raise asyncio.CancelledError("the call has ended") from None  # what gRPC takes for an end without a word

    @property
    def trace(self) -> str:
        return self._metadata.get("traceparent", "")

    @property
    def time_left_s(self) -> float | None:
        """Until the call's deadline; None when the client set none."""
        return self._context.time_remaining()

    async def name(self, request_id: str) -> None:
        """Tell the client its request's name, ahead of the first message."""
        self.request_id = request_id
        await self._context.send_initial_metadata(((REQUEST_ID_KEY, request_id),))


def peer_address(peer: str) -> str:
    """gRPC's "ipv4:127.0.0.1:4711" or "ipv6:%5B::1%5D:4711" without its port."""
    return peer.partition(":")[2].rpartition(":")[0].replace("%5B", "").replace("%5D", "")
