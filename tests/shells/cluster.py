"""A whole cluster for tests: gateway and controller on the test's own loop, instances as real processes.

Owns the processes: everything started is ended, whatever the test did.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from distserve.controller.options import ControllerOptions
from distserve.core.types import FinishReason, Request, Role, Sampling, Stopping
from distserve.gateway.backend import CompleteEvent, KvReport
from distserve.gateway.options import GatewayOptions
from distserve.gateway.process import RunningGateway, gateway
from distserve.gateway.shell import GatewayShell
from distserve.sched.config import ClusterConfig, GatewayConfig

ROOT = Path(__file__).resolve().parents[2]
READY_S = 120.0
MODEL = "tiny"


@dataclass(slots=True)
class Part:
    """One process of the cluster, and what it said of itself."""

    process: subprocess.Popen[bytes]
    ready_read: int
    parent_write: int
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def pid(self) -> int:
        return self.process.pid

    async def said(self, event: str) -> dict[str, Any]:
        """The next line of this kind on its ready descriptor."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(READY_S):
            while True:
                line = await loop.run_in_executor(None, self._line)
                if not line:
                    raise AssertionError(f"{self.process.args} ended with {self.process.wait()} before it said {event}")
                facts: dict[str, Any] = json.loads(line)
                if facts["event"] == event:
                    self.facts = facts
                    return facts

    def _line(self) -> bytes:
        line = b""
        while not line.endswith(b"\n"):
            byte = os.read(self.ready_read, 1)
            if not byte:
                break
            line += byte
        return line

    async def ended(self, within_s: float = 20.0) -> int:
        """Its exit code."""
        return await asyncio.get_running_loop().run_in_executor(None, self.process.wait, within_s)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        for fd in (self.ready_read, self.parent_write):
            with contextlib.suppress(OSError):
                os.close(fd)


def start(kind: str, environ: Mapping[str, str] = MappingProxyType({}), **settings: Any) -> Part:
    """Start one process of a cluster. ``environ`` is beside what all have."""
    ready_read, ready_write = os.pipe()
    parent_read, parent_write = os.pipe()
    settings |= {"ready_fd": ready_write, "parent_fd": parent_read}
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "planner")),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        **environ,
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.shells.part", kind, json.dumps(settings)],
        cwd=ROOT,
        env=environment,
        pass_fds=(ready_write, parent_read),
    )
    os.close(ready_write)
    os.close(parent_read)
    return Part(process, ready_read, parent_write)


@dataclass(slots=True)
class Cluster:
    """What a test holds."""

    running: RunningGateway
    controller: str
    model: Path
    parts: dict[str, Part]
    journals: Path | None
    settings: dict[str, Any]
    by_role: Mapping[Role, dict[str, Any]]

    @property
    def shell(self) -> GatewayShell:
        return self.running.shell

    def start(self, name: str, role: Role) -> Part:
        """Start an instance, again if one of that name has ended."""
        journal = str(self.journals / f"{name}.jsonl") if self.journals is not None else None
        part = self.parts[name] = start(
            "instance",
            id=name,
            model=str(self.model),
            model_name=MODEL,
            controller=self.controller,
            role=role.value,
            journal=journal,
            **self.settings | self.by_role.get(role, {}),
        )
        return part

    async def ready(self) -> None:
        """Wait until a canary went through."""
        async with asyncio.timeout(READY_S):
            await self.running.ready.wait()

    async def clean(self) -> Sequence[KvReport]:
        """The ledgers, once every instance is a member and idle."""
        async with asyncio.timeout(READY_S):
            while True:
                reports = await self.shell.kv_check()
                assert not [r.problem for r in reports if r.problem], reports
                if len(reports) == len(self.parts) and all(r.idle_and_clean for r in reports):
                    return reports
                await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def cluster(
    model: Path,
    *roles: Role,
    journals: Path | None = None,
    lease_s: float = 3.0,
    by_role: Mapping[Role, dict[str, Any]] = MappingProxyType({}),
    **settings: Any,
) -> AsyncIterator[Cluster]:
    """A gateway, a controller, and one instance for each role; ready when the block begins."""
    settings = {"kv_tokens": 8192, "transfer": "shm", "grace_s": 5.0, "log_level": "warning"} | settings
    options = GatewayOptions(
        model=str(model),
        model_name=MODEL,
        http_port=None,
        grpc_port=None,
        machine=GatewayConfig(patience_s=30.0),
        journal=journals / "gateway.jsonl" if journals is not None else None,
    )
    control = ControllerOptions(
        machine=ClusterConfig(lease_s=lease_s), journal=journals / "cluster.jsonl" if journals is not None else None
    )
    parts: dict[str, Part] = {}
    try:
        async with gateway(options, control) as running:
            held = Cluster(running, running.controller_address, model, parts, journals, settings, by_role)
            for number, role in enumerate(roles):
                held.start(f"{role.value}-{number}", role)
            await held.ready()
            yield held
            for part in parts.values():
                if part.process.poll() is None:
                    part.process.send_signal(signal.SIGTERM)
            codes = {name: await part.ended() for name, part in parts.items()}
            assert all(code in (0, -signal.SIGKILL) for code in codes.values()), codes
    finally:
        for part in parts.values():
            part.close()


def request(name: str, prompt: Sequence[int], max_tokens: int, **sampling: Any) -> Request:
    """A greedy request that nothing but its length ends."""
    return Request(
        id=name,
        model=MODEL,
        prompt_token_ids=tuple(prompt),
        sampling=Sampling(**{"temperature": 0.0} | sampling),
        stopping=Stopping(max_tokens=max_tokens),
        timeout_s=60.0,
    )


async def answer(shell: GatewayShell, asked: Request) -> tuple[list[int], CompleteEvent]:
    """All tokens of a request, in order, checked to be without gap or repeat."""
    tokens: list[int] = []
    async for event in await shell.submit(asked, 0.0):
        if isinstance(event, CompleteEvent):
            assert event.finish is FinishReason.LENGTH
            return tokens, event
        assert event.first_index == len(tokens)
        tokens += [token.id for token in event.tokens]
    raise AssertionError("the stream had no end")
