"""The gateway, as a process of its own or with the controller in the same one: shell, HTTP and gRPC put together.

Exit codes: 0 asked to stop; 1 broke; 2 could not start.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing
from pathlib import Path

from prometheus_client import CollectorRegistry

from distserve.controller.options import ControllerOptions
from distserve.controller.process import controller
from distserve.core.types import GatewayRef
from distserve.gateway.auth import ApiKeys
from distserve.gateway.frontend import FrontEnd
from distserve.gateway.http.app import HttpConfig, Metrics, http_app
from distserve.gateway.http.server import HttpServer, serve_http
from distserve.gateway.options import GatewayOptions
from distserve.gateway.ports import PortUnavailable
from distserve.gateway.rpc.server import GrpcConfig, GrpcServer, build_grpc_server
from distserve.gateway.shell import GatewayShell
from distserve.gateway.text import TextCodec
from distserve.gateway.traffic import Traffic
from distserve.observe import codec
from distserve.observe.exposition import CONTENT_TYPE, ProcessCost, merge, text
from distserve.observe.journal import Journal
from distserve.observe.log import set_up
from distserve.observe.metrics import ClusterMetrics, GatewayMetrics
from distserve.wire.channels import PortTaken
from distserve.wire.host import Observer
from distserve.wire.life import Ending, fresh_incarnation, tell
from distserve.wire.loop import run_loop
from distserve.wire.tls import Certificates
from distserve.wire.trust import Trust

log = logging.getLogger(__name__)
STOPPED, BROKE, CANNOT_START = 0, 1, 2
LAST_WRITES_S = 1.0
"""How long answers that have ended may take to leave."""


def main(options: GatewayOptions, with_controller: ControllerOptions | None = None) -> int:
    """Run a gateway (with the controller beside it, if given) until told to stop; returns the process's exit code."""
    set_up(f"gateway {options.id}", options.log_level)
    return run_loop(_run(options, with_controller))


async def _run(options: GatewayOptions, with_controller: ControllerOptions | None) -> int:
    ending = Ending(options.parent_fd)
    try:
        async with gateway(options, with_controller) as running:
            tell(options.ready_fd, "bound", "gateway", options.id, **running.ports())
            await ending.asked.wait()
            await running.drain(ending.urgent)
            return BROKE if running.broken else STOPPED
    except (PortUnavailable, PortTaken, OSError, ValueError) as error:
        log.error("%s", error)
        return CANNOT_START
    finally:
        ending.close()


class RunningGateway:
    """A gateway that serves. Made by ``gateway``."""

    def __init__(self, options: GatewayOptions, me: GatewayRef, controller_address: str) -> None:
        self.ref = me
        self.controller_address = controller_address
        self.ready = asyncio.Event()
        """Set while a canary has gone through and a way through stands."""
        self.broken = False
        self.http: HttpServer | None = None
        self.grpc: GrpcServer | None = None
        self._options = options
        self._shell: GatewayShell | None = None

    @property
    def shell(self) -> GatewayShell:
        """The backend that front ends and tests speak to."""
        assert self._shell is not None, "the gateway has not been started"
        return self._shell

    def ports(self) -> dict[str, str | int | None]:
        """What is bound, as told to whoever started the process."""
        return {
            "incarnation": self.ref.incarnation,
            "http_port": self.http.port if self.http is not None else None,
            "grpc_port": self.grpc.port if self.grpc is not None else None,
            "controller_address": self.controller_address,
        }

    async def start(self, observers: Sequence[Observer], metrics: Metrics) -> None:
        """Listen and dial. Raises ``PortUnavailable``, ``Unsafe``, ``BadKeys``; ``stop`` cleans up in any case."""
        options = self._options
        options.check()
        limits = dataclasses.replace(
            options.limits, default_timeout_s=options.default_timeout_s, unread_limit_s=options.unread_limit_s
        )
        tls = options.public_tls
        certificates = Certificates(tls) if tls is not None else None
        codec_ = await asyncio.to_thread(TextCodec.load, Path(options.model))
        traffic = Traffic()
        self._shell = GatewayShell(
            options, self.ref, self.controller_address, [*observers, traffic], self._on_change, self._on_broken,
            Trust.of(options.security),
        )  # fmt: skip
        front_end = FrontEnd(
            self._shell,
            {options.model_name: codec_},
            limits,
            keys=ApiKeys(file=options.api_keys),
            traffic=traffic,
        )
        if options.http_port is not None:
            config = HttpConfig(limits.max_body_bytes, int(time.time()), options.open_metrics)
            app = http_app(front_end, metrics, config)
            self.http = await serve_http(app, options.host, options.http_port, limits, certificates)
        if options.grpc_port is not None:
            server = build_grpc_server(front_end, GrpcConfig(limits, certificates))
            await server.start(options.host, options.grpc_port)
            self.grpc = server
        self._shell.start()
        log.info("gateway %s serves %r: %s", self.ref, options.model_name, self.ports())

    async def drain(self, urgent: asyncio.Event) -> None:
        """Take nothing new and let what runs finish, within the grace and until it becomes urgent."""
        if self._shell is None:
            return
        self._shell.refuse_new("this gateway is shutting down; try another one or later")
        if self.grpc is not None:
            self.grpc.refresh_health()
        done, stop = asyncio.ensure_future(self._shell.drained()), asyncio.ensure_future(urgent.wait())
        await asyncio.wait((done, stop), timeout=self._options.grace_s, return_when=asyncio.FIRST_COMPLETED)
        if not done.done():
            log.warning("requests still ran at the end of the grace; they end here")
        done.cancel()
        stop.cancel()

    async def stop(self) -> None:
        """End what still runs, close the ports, hang up."""
        if self._shell is not None:
            await self._shell.close()
        servers = [server.stop(LAST_WRITES_S) for server in (self.http, self.grpc) if server is not None]
        await asyncio.gather(*servers)
        log.info("gateway stopped")

    def _on_broken(self, _: BaseException) -> None:
        """A link's own task broke: this process cannot do its work any more, and is asked to end."""
        self.broken = True
        signal.raise_signal(signal.SIGTERM)

    def _on_change(self, ready: bool) -> None:
        if ready:
            log.info("ready: a canary went through the cluster")
            self.ready.set()
            tell(self._options.ready_fd, "ready", "gateway", self._options.id)
        else:
            log.warning("not ready any more")
            self.ready.clear()
        if self.grpc is not None:
            self.grpc.refresh_health()


@asynccontextmanager
async def gateway(
    options: GatewayOptions,
    with_controller: ControllerOptions | None = None,
    others: Callable[[], Awaitable[Sequence[bytes]]] | None = None,
) -> AsyncIterator[RunningGateway]:
    """A gateway on this loop for as long as the block lasts, and a controller beside it if its options are given.

    ``others`` gives the metrics texts of other processes, which /metrics then shows beside its own. Raises
    ``PortUnavailable`` or ``PortTaken`` with a sentence.
    """
    registry = CollectorRegistry()
    registry.register(ProcessCost("gateway"))
    me = GatewayRef(options.id, fresh_incarnation())
    observers: list[Observer] = [GatewayMetrics(registry, options.model_name)]
    async with AsyncExitStack() as stack:
        address = options.controller
        if with_controller is not None:
            address = await stack.enter_async_context(controller(with_controller, (ClusterMetrics(registry),)))
        if not address:
            raise ValueError("a gateway without a controller in its process needs the address of one: --controller")
        if options.journal is not None:
            journal = Journal(options.journal, _about(options, me))
            observers.append(stack.enter_context(closing(journal)))

        async def metrics() -> tuple[bytes, str]:
            return merge([text(registry), *(await others() if others is not None else ())]), CONTENT_TYPE

        running = RunningGateway(options, me, address)
        stack.push_async_callback(running.stop)
        await running.start(observers, metrics)
        yield running


def _about(options: GatewayOptions, me: GatewayRef) -> dict[str, object]:
    """What a replay needs to build the same machine."""
    return {"machine": "gateway", "me": codec.encode(me), "config": dataclasses.asdict(options.machine)}
