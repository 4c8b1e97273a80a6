"""A whole cluster on one event loop: the production instance, controller and gateway, real sockets, links and KV bytes.

Only the process boundary is missing, so that a matrix of clusters takes seconds; ``tests/shells`` has real processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from distserve.controller.options import ControllerOptions
from distserve.core.types import Role
from distserve.gateway.options import GatewayOptions
from distserve.gateway.process import RunningGateway, gateway
from distserve.instance.options import InstanceOptions
from distserve.instance.process import InstanceProcess
from distserve.sched.config import ClusterConfig

READY_S = 60.0
MODEL = "tiny"


@contextlib.asynccontextmanager
async def cluster(
    model: Path,
    roles: Sequence[Role],
    *,
    transfer: str,
    block_sizes: Sequence[int] = (16,),
    dispatch: ClusterConfig | None = None,
    journals: Path | None = None,
    **settings: object,
) -> AsyncIterator[RunningGateway]:
    """Ready when the block begins. ``block_sizes`` are dealt to the instances in turn; ``settings`` go to each.

    ``journals``: the folder in which each instance writes its own.
    """
    options = GatewayOptions(model=str(model), model_name=MODEL, http_port=None, grpc_port=None)
    loop = asyncio.get_running_loop()
    ties: list[int] = []
    lives: list[asyncio.Task[int]] = []
    async with gateway(options, ControllerOptions(machine=dispatch or ClusterConfig())) as running:
        try:
            for number, role in enumerate(roles):
                parent_read, parent_write = os.pipe()
                ties += [parent_write, parent_read]
                instance = InstanceOptions(
                    id=f"{role}-{number}",
                    model=str(model),
                    model_name=MODEL,
                    controller=running.controller_address,
                    role=role,
                    transfer=transfer,
                    block_size=block_sizes[number % len(block_sizes)],
                    kv_tokens=8192,
                    parent_fd=parent_read,
                    journal=journals / f"{role}-{number}.jsonl" if journals is not None else None,
                    **settings,  # type: ignore[arg-type]
                )
                lives.append(loop.create_task(InstanceProcess(instance).run()))
            deadline = loop.time() + READY_S
            ready = loop.create_task(running.ready.wait())
            await asyncio.wait([ready, *lives], timeout=READY_S, return_when=asyncio.FIRST_COMPLETED)
            assert ready.done(), f"not ready: {[life for life in lives if life.done()]}"
            # of several some may still load, and one told to stop while it loads ends this process
            while len(running.shell.members()) < len(roles):
                assert loop.time() < deadline, f"{len(running.shell.members())} of {len(roles)} joined"
                await asyncio.sleep(0.01)
            yield running
        finally:
            for tie in ties[::2]:
                os.close(tie)  # the end of file on the other end tells an instance to stop
            codes = await asyncio.wait_for(asyncio.gather(*lives), READY_S)
            for tie in ties[1::2]:
                os.close(tie)
    assert codes == [0] * len(roles)


async def all_free(running: RunningGateway) -> None:
    """Wait until every ledger is back to all-free; fails on a ledger that does not sum."""
    async with asyncio.timeout(READY_S):
        while True:
            reports = await running.shell.kv_check()
            assert not [r.problem for r in reports if r.problem], reports
            if all(r.idle_and_clean for r in reports):
                return
            await asyncio.sleep(0.02)
