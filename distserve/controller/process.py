"""The controller, as a process of its own or as a part of one that has a gateway too. Exit codes: 0 asked to stop;
2 could not start.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from distserve import __version__
from distserve.controller.options import ControllerOptions
from distserve.controller.service import ControllerService
from distserve.observe.journal import Journal
from distserve.observe.log import set_up
from distserve.sched.cluster import ClusterState
from distserve.v1.control_pb2_grpc import add_ControllerServiceServicer_to_server
from distserve.wire.channels import PortTaken, address_of, bind
from distserve.wire.host import Observer
from distserve.wire.life import Ending, tell

log = logging.getLogger(__name__)
STOPPED, CANNOT_START = 0, 2


def main(options: ControllerOptions) -> int:
    """Run a controller until it is told to stop; returns the process's exit code."""
    set_up("controller", options.log_level)
    return asyncio.run(_run(options))


async def _run(options: ControllerOptions) -> int:
    ending = Ending(options.parent_fd)
    try:
        async with controller(options) as address:
            tell(options.ready_fd, "bound", "controller", "controller", address=address)
            await ending.asked.wait()
    except PortTaken as error:
        log.error("%s", error)
        return CANNOT_START
    finally:
        ending.close()
    return STOPPED


@asynccontextmanager
async def controller(options: ControllerOptions, observers: Sequence[Observer] = ()) -> AsyncIterator[str]:
    """A controller on this loop, for as long as the block lasts; gives its address. Raises ``PortTaken``."""
    config = options.machine
    if not config.version:
        config = dataclasses.replace(config, version=__version__)
    server, port = bind(options.host, options.port)
    journals = []
    if options.journal is not None:
        journals.append(Journal(options.journal, {"machine": "cluster", "config": dataclasses.asdict(config)}))
    service = ControllerService(ClusterState(config), (*observers, *journals))
    add_ControllerServiceServicer_to_server(service, server)
    await server.start()
    address = address_of(options.host, port)
    log.info("controller listens on %s", address)
    try:
        yield address
    finally:
        service.close()
        await server.stop(grace=None)
        for journal in journals:
            journal.close()
        log.info("controller stopped")
