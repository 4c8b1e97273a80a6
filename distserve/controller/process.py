"""The controller, as a process of its own or as a part of one that has a gateway too. Exit codes: 0 asked to stop;
2 could not start.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from prometheus_client import CollectorRegistry

from distserve import __version__
from distserve.controller.options import ControllerOptions
from distserve.controller.service import ControllerService
from distserve.observe.exposition import OpsServer, ProcessCost, text
from distserve.observe.journal import Journal
from distserve.observe.log import set_up
from distserve.observe.metrics import ClusterMetrics
from distserve.sched.cluster import ClusterState
from distserve.v1.control_pb2_grpc import add_ControllerServiceServicer_to_server
from distserve.wire.channels import PortTaken, address_of, bind
from distserve.wire.host import Observer
from distserve.wire.life import Ending, tell
from distserve.wire.loop import run_loop
from distserve.wire.security import Unsafe
from distserve.wire.trust import Trust

log = logging.getLogger(__name__)
STOPPED, CANNOT_START = 0, 2
_DIALLED = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}
"""Where this machine reaches what listens on a wildcard: certificates are made out to no wildcard."""


def main(options: ControllerOptions) -> int:
    """Run a controller until it is told to stop; returns the process's exit code."""
    set_up("controller", options.log_level)
    return run_loop(_run(options))


async def _run(options: ControllerOptions) -> int:
    ending = Ending(options.parent_fd)
    registry = CollectorRegistry()
    registry.register(ProcessCost("controller"))
    try:
        async with controller(options, (ClusterMetrics(registry),)) as address, _operations(options, registry) as ops:
            tell(options.ready_fd, "bound", "controller", "controller", address=address, ops_port=ops)
            await ending.asked.wait()
    except (PortTaken, Unsafe) as error:
        log.error("%s", error)
        return CANNOT_START
    finally:
        ending.close()
    return STOPPED


@asynccontextmanager
async def _operations(options: ControllerOptions, registry: CollectorRegistry) -> AsyncIterator[int | None]:
    """The operations port for as long as the block lasts; gives its number, None when it is off."""
    if options.ops_port is None:
        yield None
        return

    async def exposition() -> bytes:
        return text(registry)

    server = OpsServer(exposition, alive=lambda: True, ready=lambda: True)
    try:
        port = await server.start(options.host, options.ops_port)
    except OSError as error:
        where = address_of(options.host, options.ops_port)
        raise PortTaken(f"cannot listen on {where} ({error.strerror or error}); choose another --ops-port") from error
    try:
        yield port
    finally:
        await server.stop()


@asynccontextmanager
async def controller(options: ControllerOptions, observers: Sequence[Observer] = ()) -> AsyncIterator[str]:
    """A controller on this loop, as long as the block lasts; gives its address. Raises ``PortTaken``, ``Unsafe``."""
    config = options.machine
    if not config.version:
        config = dataclasses.replace(config, version=__version__)
    options.check()
    trust = Trust.of(options.security)
    server, port = bind(options.host, options.port, trust)
    journals = []
    if options.journal is not None:
        journals.append(Journal(options.journal, {"machine": "cluster", "config": dataclasses.asdict(config)}))
    service = ControllerService(ClusterState(config), (*observers, *journals), trust)
    add_ControllerServiceServicer_to_server(service, server)
    await server.start()
    address = address_of(_DIALLED.get(options.host, options.host), port)
    log.info("controller listens on %s", address)
    try:
        yield address
    finally:
        service.close()
        await server.stop(grace=None)
        for journal in journals:
            journal.close()
        log.info("controller stopped")
