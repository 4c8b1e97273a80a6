"""``grpc.health.v1.Health``: readiness, asked of its owner at the time of the question.

Owns which service names are answered for. The health package's own servicer is not used: it keeps a copy of the status,
and drops every watcher of a service when one of them leaves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from grpc_health.v1 import health_pb2, health_pb2_grpc

from distserve.core.types import Code
from distserve.gateway.rpc.calls import Context
from distserve.wire.status import Problem, grpc_status

LIVENESS = "liveness"
READINESS = "readiness"


class HealthServicer(health_pb2_grpc.HealthServicer):
    """``""``, ``readiness`` and every service follow ``ready``; ``liveness`` is always SERVING."""

    def __init__(self, services: Iterable[str], ready: Callable[[], bool]) -> None:
        self._services = frozenset(("", READINESS, *services))
        self._ready = ready
        self._changed = asyncio.Event()
        self._leaving = False

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> health_pb2.HealthCheckResponse:
        status = self._status(request.service)
        if status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN:
            problem = Problem(Code.NOT_FOUND, f"There is no service '{request.service}' here.")
            await context.abort_with_status(grpc_status(problem))  # type: ignore[attr-defined]  # stubs lack it
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:
        """The status now and whenever it changes, until the client leaves or the server stops."""
        told: int | None = None
        while not self._leaving or told is None:
            changed = self._changed
            status = self._status(request.service)
            if status != told:
                await context.write(health_pb2.HealthCheckResponse(status=status))
                told = status
            await changed.wait()
        if (status := self._status(request.service)) != told:
            await context.write(health_pb2.HealthCheckResponse(status=status))

    def refresh(self) -> None:
        """Readiness may have changed: have the watchers look."""
        self._changed.set()
        self._changed = asyncio.Event()

    def leave(self) -> None:
        """Not ready any more, whatever the owner says; watches end."""
        self._leaving = True
        self.refresh()

    def _status(self, service: str) -> int:
        if service != LIVENESS and service not in self._services:
            return int(health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
        serving = service == LIVENESS or (self._ready() and not self._leaving)
        known = health_pb2.HealthCheckResponse
        return int(known.SERVING if serving else known.NOT_SERVING)
