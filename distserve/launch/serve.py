"""``distserve serve``: gateway and controller in this process, every instance in one of its own, until told to stop.

Exit codes: 0 asked to stop; 1 the cluster did not become ready or could not go on; 2 could not start.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from distserve.controller.options import ControllerOptions
from distserve.core.types import Role
from distserve.engine.memory import free_of_host
from distserve.gateway.options import GatewayOptions
from distserve.gateway.ports import PortUnavailable
from distserve.gateway.process import RunningGateway, gateway
from distserve.instance.options import InstanceOptions
from distserve.launch.options import ServeOptions
from distserve.launch.settings import PREFIX, SECRET_VARIABLE
from distserve.launch.supervisor import StartFailed, Supervisor
from distserve.launch.words import flags_of
from distserve.models.catalog import resolve_model
from distserve.models.errors import ModelError
from distserve.observe.exposition import scrape
from distserve.observe.log import set_up
from distserve.wire.channels import PortTaken
from distserve.wire.life import Ending
from distserve.wire.loop import run_loop
from distserve.wire.secret import fresh
from distserve.wire.security import SecurityOptions

log = logging.getLogger(__name__)
STOPPED, FAILED, CANNOT_START = 0, 1, 2
LOOPBACK = "127.0.0.1"
INSTANCE_GRACE_S = 2.0
"""For an instance whose gateway has ended all requests: enough to say goodbye."""

SCRAPE_S = 5.0
"""How long an instance's metrics may take; it answers between two steps."""

_PASSED_ON = (PREFIX + "CACHE",)


def main(options: ServeOptions) -> int:
    """Run a cluster until SIGTERM or Ctrl-C; returns the exit code."""
    set_up("serve", options.log_level)
    try:
        model = str(resolve_model(options.model, say=lambda words: log.info("%s", words)))
    except ModelError as error:
        log.error("%s", error)
        return CANNOT_START
    if options.model.startswith("random:"):
        model = options.model
    return run_loop(_Cluster(options, model).run())


class _Cluster:
    """One cluster on one machine. ``model`` is the directory (or ``random:…``) that instances load."""

    def __init__(self, options: ServeOptions, model: str) -> None:
        self._options = options
        self._model = model
        self._supervisor: Supervisor | None = None
        self._security = internal_security(options)
        self._memory_bytes = memory_of_each(options)
        self._phases: dict[str, float] = {}

    async def run(self) -> int:
        began = asyncio.get_running_loop().time()
        ending = Ending(self._options.parent_fd, on_urgent=self._hurry)
        try:
            async with AsyncExitStack() as stack:
                parts = gateway(self._gateway_options(), self._controller_options(), self._instance_metrics)
                running = await stack.enter_async_context(parts)
                supervisor = self._supervise(running.controller_address)
                keeping = asyncio.create_task(supervisor.run())
                try:
                    if await self._until_ready(running, supervisor, ending, keeping):
                        self._announce(running, supervisor, asyncio.get_running_loop().time() - began)
                        await _first(ending.asked.wait(), keeping)
                        if not ending.asked.is_set():
                            raise NotReady("every instance has ended")
                    if not await self._drained(running, ending):
                        await stack.aclose()  # tell the clients that are left before their instances go
                finally:
                    await supervisor.end(0.0 if ending.urgent.is_set() else INSTANCE_GRACE_S)
                    keeping.cancel()
                    await asyncio.gather(keeping, return_exceptions=True)
        except (PortUnavailable, PortTaken, OSError, ValueError) as error:
            log.error("%s", error)
            return CANNOT_START
        except (StartFailed, NotReady) as error:
            log.error("%s", error)
            return FAILED
        finally:
            ending.close()
        if running.broken:
            log.error("the gateway broke; its own words are above")
            return FAILED
        log.info("stopped")
        return STOPPED

    def _hurry(self) -> None:
        if self._supervisor is not None:
            self._supervisor.hurry()

    async def _until_ready(
        self, running: RunningGateway, supervisor: Supervisor, ending: Ending, keeping: asyncio.Task[None]
    ) -> bool:
        """Wait until every instance that was asked for has joined and a canary went through; False: told to end first.

        A canary alone is too early a word: one mixed instance can answer it while the others still load.
        """

        async def whole() -> None:
            clock = asyncio.get_running_loop().time
            began = clock()
            await supervisor.complete.wait()
            joined = clock()
            await running.ready.wait()
            self._phases = {"instances": round(joined - began, 3), "canary": round(clock() - joined, 3)}

        up = asyncio.ensure_future(whole())
        try:
            async with asyncio.timeout(self._options.start_timeout_s):
                await _first(up, ending.asked.wait(), keeping)
            return up.done()
        except TimeoutError:
            raise NotReady(
                f"the cluster was not ready after {self._options.start_timeout_s:g} s; see the log above, "
                "or give it more time with --start-timeout"
            ) from None
        finally:
            up.cancel()

    async def _instance_metrics(self) -> list[bytes]:
        """The metrics of every instance that answers; one that does not is missing, and shows so."""
        kept = self._supervisor.kept.values() if self._supervisor is not None else ()
        ports = [port for k in kept if (port := k.facts.get("ops_port"))]
        pages = await asyncio.gather(
            *(scrape(self._internal_host, port, SCRAPE_S) for port in ports), return_exceptions=True
        )
        return [page for page in pages if isinstance(page, bytes)]

    async def _drained(self, running: RunningGateway, ending: Ending) -> bool:
        """Let running requests finish within the grace; whether they did."""
        clock = asyncio.get_running_loop().time
        began = clock()
        await running.drain(ending.urgent)
        return not ending.urgent.is_set() and clock() - began < self._options.grace_s

    # ── the parts ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _supervise(self, controller: str) -> Supervisor:
        options = self._options
        environ = {k: v for k, v in os.environ.items() if not k.startswith(PREFIX) or k in _PASSED_ON}
        environ["OMP_NUM_THREADS"] = str(options.threads)
        environ.pop("RANK", None)  # of whoever started us; instances start their own ranks
        if self._security.cluster_secret:
            environ[SECRET_VARIABLE] = self._security.cluster_secret
        self._supervisor = Supervisor(
            {name: self._instance_arguments(name, role, controller) for name, role in options.instances},
            environ,
            restart=options.restart,
        )
        return self._supervisor

    def _instance_arguments(self, name: str, role: Role, controller: str) -> Callable[[int], Sequence[str]]:
        def arguments(life: int) -> list[str]:
            journal = self._journal(name if life == 1 else f"{name}.{life}")
            return ["instance", *flags_of("instance", dataclasses.replace(first, journal=journal))]

        options = self._options
        first = InstanceOptions(
            id=name,
            model=self._model,
            model_name=options.name,
            controller=controller,
            role=role,
            dtype=options.dtype,
            device=options.device,
            kernels=options.kernels,
            cuda_graphs=options.cuda_graphs,
            steps_in_flight=options.steps_in_flight,
            threads=options.threads,
            cores=options.cores[name],
            kv_cache_dtype=options.kv_cache_dtype,
            kv_tokens=options.kv_tokens,
            kv_memory_fraction=options.kv_memory_fraction,
            memory_bytes=self._memory_bytes,
            memory_share=1 / len(options.instances),
            block_size=options.block_size,
            max_model_len=options.max_model_len,
            tp=options.layout(role)[0],
            pp=options.layout(role)[1],
            rank_timeout_s=options.rank_timeout_s,
            transfer=options.transfer,
            host=self._internal_host,
            ops_port=0,
            machine=options.instance,
            step_timeout_s=options.step_timeout_s,
            security=self._security if self._security.mutual_tls else self._security.without_tls(),
            grace_s=INSTANCE_GRACE_S,
            log_level=options.log_level,
        )
        return arguments

    def _gateway_options(self) -> GatewayOptions:
        options = self._options
        return GatewayOptions(
            model=options.tokenizer or self._model.removeprefix("random:").removesuffix("/config.json"),
            model_name=options.name,
            host=options.host,
            http_port=options.http_port,
            grpc_port=options.grpc_port,
            api_keys=options.api_keys,
            open_metrics=options.open_metrics,
            public_tls_dir=options.public_tls_dir,
            limits=options.limits,
            security=self._security,
            default_timeout_s=options.default_timeout_s,
            machine=options.gateway,
            unread_limit_s=options.unread_limit_s,
            canary=options.canary,
            canary_timeout_s=options.canary_timeout_s,
            journal=self._journal("gateway"),
            grace_s=options.grace_s,
            log_level=options.log_level,
        )

    def _controller_options(self) -> ControllerOptions:
        options = self._options
        return ControllerOptions(
            host=self._internal_host,
            port=options.controller_port,
            machine=options.cluster,
            security=self._security,
            journal=self._journal("controller"),
            log_level=options.log_level,
        )

    @property
    def _internal_host(self) -> str:
        """Nobody else needs to reach instances, unless the controller's port was named for others to join."""
        return self._options.host if self._options.controller_port else LOOPBACK

    def _journal(self, name: str) -> Path | None:
        return self._options.journal / f"{name}.jsonl" if self._options.journal is not None else None

    # ── the ready line ───────────────────────────────────────────────────────────────────────────────────────────────

    def _announce(self, running: RunningGateway, supervisor: Supervisor, start_s: float) -> None:
        facts = ready_facts(self._options, running.ports(), [dict(k.facts) for k in supervisor.kept.values()], start_s)
        facts["startup_s"] = self._phases
        print(json.dumps(facts) if self._options.print_ready else ready_words(facts), flush=True)


def memory_of_each(options: ServeOptions) -> int | None:
    """An equal part of what is free on this host now; None where instances keep their KV elsewhere, or nobody knows.

    Shared out before any of them takes its own, and the same for one that is started again.
    """
    free = free_of_host() if options.device == "cpu" else None
    return free // len(options.instances) if free is not None else None


def internal_security(options: ServeOptions) -> SecurityOptions:
    """How the parts know each other. Without a named controller's port nobody else is to join: their ports are on
    loopback, where a secret drawn for this run keeps other users of the machine out.
    """
    given = options.security
    if not options.controller_port:
        secret = given.cluster_secret or ("" if given.has_secret else fresh())
        return dataclasses.replace(given, control_tls=False, cluster_secret=secret)
    if not given.mutual_tls and not given.has_secret:
        log.warning("anybody on this machine can join the cluster at --controller-port: add --cluster-secret-file")
    return given


class NotReady(RuntimeError):
    """The cluster did not become ready in time; the text is for the user."""


def ready_facts(
    options: ServeOptions, ports: Mapping[str, Any], instances: Sequence[Mapping[str, Any]], start_s: float
) -> dict[str, Any]:
    """What ``--print-ready`` prints: all ports and process ids."""
    host = LOOPBACK if options.host in ("0.0.0.0", "::") else options.host
    http, grpc = ports["http_port"], ports["grpc_port"]
    scheme = "https" if options.public_tls is not None else "http"
    return {
        "event": "ready",
        "model": options.name,
        "http_port": http,
        "grpc_port": grpc,
        "controller_port": int(str(ports["controller_address"]).rpartition(":")[2]),
        "http_url": f"{scheme}://{host}:{http}" if http is not None else None,
        "grpc_address": f"{host}:{grpc}" if grpc is not None else None,
        "pid": os.getpid(),
        "pids": [os.getpid(), *(i["pid"] for i in instances if i)],
        "instances": [i for i in instances if i],
        "start_s": round(start_s, 3),
    }


def ready_words(facts: Mapping[str, Any]) -> str:
    """The same for a person, with something to try."""
    lines = [f"ready in {facts['start_s']:.1f} s: {', '.join(i['id'] for i in facts['instances'])}"]
    if facts["http_url"]:
        body = json.dumps(
            {"model": facts["model"], "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 32}
        )
        url = f"{facts['http_url']}/v1"
        lines += [
            f"  OpenAI API  {url}",
            f"  try         curl {url}/chat/completions -H 'Content-Type: application/json' -d '{body}'",
        ]
    if facts["grpc_address"]:
        lines.append(f"  gRPC        {facts['grpc_address']}   (distserve generate 'Hello!' --chat)")
    return "\n".join([*lines, "  stop        Ctrl-C"])


async def _first(*awaited: Any) -> None:
    """Wait until one of these is done; a failure among them is raised, the others are cancelled unless tasks before."""
    tasks = [asyncio.ensure_future(a) for a in awaited]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for task, given in zip(tasks, awaited, strict=True):
            if task is not given:
                task.cancel()
