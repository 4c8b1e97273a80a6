"""The cluster under chaos: every process a real one, a proxy on every way between two, whoever ends started again.

Owns the processes and the proxies. Decides nothing about faults: it only says who is there and how to reach them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio

from distserve.core.types import Role
from distserve.launch.child import Child
from distserve.v1 import admin_pb2
from distserve.v1.admin_pb2_grpc import AdminServiceStub
from tests.chaos.part import SHOW
from tests.chaos.proxy import Proxy, owner_of_port
from tests.chaos.waiting import within

ROOT = Path(__file__).resolve().parents[2]
MODEL = "tiny"
CONTROLLER = "controller"
START_S = 120.0
STOP_S = 20.0
STILLBORN = 3
"""Lives in a row that never came up: something is wrong that another will not mend."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the run's waits are bounded by, seconds."""

    deadline_s: float = 30.0  # of a request
    lease_s: float = 3.0  # of an instance at the controller
    step_timeout_s: float = 5.0
    kv_tokens: int = 768


@dataclass(slots=True, eq=False)
class Kept:
    """One process, started again whenever it ends; ``told`` counts what it said on its ready descriptor."""

    name: str
    kind: str
    settings: dict[str, Any]
    word: str  # what it says once it is of use
    bound: Callable[[dict[str, Any]], None]
    child: Child | None = None
    lives: int = 0
    up: bool = False
    facts: dict[str, Any] = field(default_factory=dict)
    told: Counter[str] = field(default_factory=Counter)
    codes: list[int] = field(default_factory=list)
    stillborn: int = 0  # lives in a row that ended by themselves before they were of use
    ending: bool = False
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    may_live: asyncio.Event = field(default_factory=asyncio.Event)  # cleared: it is not started again for now

    @property
    def pid(self) -> int:
        return self.child.pid if self.child is not None else 0

    def signal(self, number: signal.Signals) -> bool:
        """Send a signal to the present life; whether there was one."""
        if self.child is None:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.child.pid, number)
            return True
        return False

    async def keep(self, environ: dict[str, str]) -> None:
        """Live, die, live again, until it is told to end."""
        while not self.ending and self.stillborn < STILLBORN:
            await self.may_live.wait()
            arguments = [self.kind, json.dumps(self.settings)]
            self.child = await Child.start(self.name, arguments, environ, "tests.chaos.part")
            self.lives += 1
            try:
                async for line in self.child.lines():
                    await self._hear(line)
                self.codes.append(await self.child.ended())
                self.stillborn = 0 if self.up or self.codes[-1] < 0 else self.stillborn + 1
            except asyncio.CancelledError:
                self.child.kill()
                await self.child.ended()
                raise
            finally:
                self.child, self.up = None, False
            async with self.changed:
                self.changed.notify_all()

    async def _hear(self, line: dict[str, Any]) -> None:
        event = line["event"]
        self.told[event] += 1
        if event == "bound":
            self.facts = line
            self.bound(line)
        self.up = self.up or event == self.word
        async with self.changed:
            self.changed.notify_all()

    async def until(self, true: Callable[[Kept], object], within_s: float, what: str) -> None:
        """Wait for something to be true of it; AssertionError when it does not come to be."""
        with contextlib.suppress(TimeoutError):
            await within(within_s, self._until(true))
        if not true(self):
            raise AssertionError(f"{self.name} (life {self.lives}, ends {self.codes[-5:]}): not {what}")

    async def _until(self, true: Callable[[Kept], object]) -> None:
        async with self.changed:
            await self.changed.wait_for(lambda: true(self) or self.stillborn >= STILLBORN)

    async def came_back(self, life: int, within_s: float = START_S) -> None:
        """Wait until a life later than this one is up."""
        await self.until(lambda k: k.lives > life and k.up, within_s, f"back within {within_s:g} s")

    async def end(self) -> int:
        """Ask it to end; its exit code. AssertionError when it does not end by itself."""
        self.ending = True
        was_up = self.up
        if self.child is not None:
            self.child.ask_to_end()
        try:
            await self.until(lambda k: k.child is None, STOP_S, f"ended {STOP_S:g} s after SIGTERM: a process hangs")
        except AssertionError:
            self.signal(SHOW)
            await asyncio.sleep(1.0)  # to show where it hangs, before it is killed
            raise
        return 0 if self.codes[-1] == -signal.SIGTERM and not was_up else self.codes[-1]  # too young to be asked


class ChaosCluster:
    """See the module. Made by ``chaos_cluster``."""

    def __init__(self, model: Path, roles: Sequence[Role], gateways: int, limits: Limits, log_level: str) -> None:
        self.limits = limits
        self.parts: dict[str, Kept] = {}
        self.uplinks: dict[str, Proxy] = {}  # party → on its way to the controller
        self.control: dict[str, Proxy] = {}  # instance → before its gRPC port
        self.data: dict[str, Proxy] = {}  # instance → before its KV data plane
        self.instances = [f"{role.value}-{n}" for n, role in enumerate(roles)]
        self.gateways = [f"gateway-{n}" for n in range(gateways)]
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._model, self._log_level = str(model), log_level
        self._roles = dict(zip(self.instances, roles, strict=True))
        self._tasks: list[asyncio.Task[None]] = []

    def pids(self) -> dict[int, str]:
        return {part.pid: name for name, part in self.parts.items() if part.child is not None}

    def proxies(self) -> dict[str, Proxy]:
        """All ways between two processes, by name."""
        return {p.name: p for group in (self.uplinks, self.control, self.data) for p in group.values()}

    def channel(self, gateway: str) -> grpc.aio.Channel:
        """To the present life of a gateway; shared, and renewed with each life."""
        return self._channels[gateway]

    def fresh_channel(self, gateway: str) -> grpc.aio.Channel:
        """One of one's own, to be broken; the caller closes it."""
        return _dial(self.parts[gateway].facts)

    def gateways_up(self) -> list[str]:
        return [name for name in self.gateways if self.parts[name].up]

    async def whole(self, within_s: float = START_S) -> None:
        """Wait until every process is up."""
        for part in self.parts.values():
            await part.until(lambda k: k.up, within_s, "up")

    async def members(self, gateway: str) -> list[Any]:
        """The instances as a gateway sees them."""
        stub: Any = AdminServiceStub(self.channel(gateway))
        return list((await stub.ListInstances(admin_pb2.ListInstancesRequest(), timeout=30)).instances)

    async def settled(self, within_s: float = START_S) -> None:
        """Wait until every process is up and every gateway is connected to every instance."""
        await self.whole(within_s)

        async def look() -> None:
            everybody = set(self.instances)
            for gateway in self.gateways:
                while True:
                    if {i.id for i in await self.members(gateway) if i.connected} == everybody:
                        break
                    await asyncio.sleep(0.1)

        await within(within_s, look())

    async def ledgers(self, gateway: str) -> list[Any]:
        """``distserve kvcheck``, from one gateway."""
        stub: Any = AdminServiceStub(self.channel(gateway))
        return list((await stub.KvCheck(admin_pb2.ClusterKvCheckRequest(), timeout=60)).instances)

    async def clean(self, within_s: float = 60.0) -> list[Any]:
        """The ledgers once nothing is held anywhere; AssertionError when that does not come to be."""
        found: list[Any] = []

        async def look() -> None:
            while True:
                found[:] = [each for gateway in self.gateways for each in await self.ledgers(gateway)]
                all_there = len(found) == len(self.gateways) * len(self.instances)
                if all_there and all(each.idle_and_clean for each in found):
                    return
                await asyncio.sleep(0.2)

        try:
            await within(within_s, look())
        except TimeoutError:
            dirty = [f"{i.instance}: {i.problem or dict(i.by_state)}" for i in found if not i.idle_and_clean]
            raise AssertionError(f"not clean after {within_s:g} s: {dirty or 'an instance is missing'}") from None
        return found

    # ── life ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def start(self) -> None:
        """Proxies, the controller, then everybody else at once."""
        for name in (*self.instances, *self.gateways):
            self.uplinks[name] = Proxy(f"{name} → controller")
        for name in self.instances:
            self.control[name] = Proxy(f"control of {name}", self._who)
            self.data[name] = Proxy(f"data of {name}", self._who)
        for proxy in self.proxies().values():
            await proxy.start()
        self._run(
            CONTROLLER, "controller", {"machine": {"lease_s": self.limits.lease_s}}, "bound", self._controller_bound
        )
        await self.parts[CONTROLLER].until(lambda k: k.up, START_S, "up")
        for name in self.instances:
            self._run(name, "instance", self._instance(name), "joined", self._instance_bound)
        for name in self.gateways:
            self._run(name, "gateway", self._gateway(name), "ready", self._gateway_bound)
        await self.whole()

    async def stop(self) -> dict[str, int]:
        """End everything in order; the last exit code of each. AssertionError for one that hangs."""
        try:
            codes = {}
            for group in (self.gateways, self.instances, [CONTROLLER]):
                ended = await asyncio.gather(*(self.parts[name].end() for name in group))
                codes |= dict(zip(group, ended, strict=True))
            return codes
        finally:
            await self.abort()

    async def abort(self) -> None:
        """Leave nothing behind, whatever happened."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for channel in self._channels.values():
            await channel.close()
        for proxy in self.proxies().values():
            await proxy.stop()

    def _run(self, name: str, kind: str, settings: dict[str, Any], word: str, bound: Callable[[Any], None]) -> None:
        part = self.parts[name] = Kept(name, kind, settings | {"log_level": self._log_level}, word, bound)
        part.may_live.set()
        environ = dict(os.environ) | {
            "PYTHONPATH": os.pathsep.join(str(ROOT / each) for each in ("", "kernels", "planner")),
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "passive",
        }
        self._tasks.append(asyncio.create_task(part.keep(environ)))

    def _instance(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "model": self._model,
            "model_name": MODEL,
            "role": self._roles[name].value,
            "controller": self.uplinks[name].address,
            "advertise": self.control[name].address,
            "advertise_data": self.data[name].address,
            "kv_tokens": self.limits.kv_tokens,
            "step_timeout_s": self.limits.step_timeout_s,
            "grace_s": 5.0,
        }

    def _gateway(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "model": self._model,
            "model_name": MODEL,
            "controller": self.uplinks[name].address,
            "http_port": None,
            "grpc_port": 0,
            "default_timeout_s": self.limits.deadline_s,
            "canary_timeout_s": 10.0,
            "grace_s": 5.0,
        }

    def _controller_bound(self, facts: dict[str, Any]) -> None:
        for proxy in self.uplinks.values():
            proxy.leads_to(facts["address"])

    def _instance_bound(self, facts: dict[str, Any]) -> None:
        self.control[facts["id"]].leads_to(facts["own_address"])
        self.data[facts["id"]].leads_to(facts["own_data_address"])

    def _gateway_bound(self, facts: dict[str, Any]) -> None:
        self._channels[facts["id"]] = _dial(facts)

    def _who(self, port: int) -> str:
        return owner_of_port(port, self.pids())


def _dial(facts: dict[str, Any]) -> grpc.aio.Channel:
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
    return grpc.aio.insecure_channel(f"127.0.0.1:{facts['grpc_port']}", options=options)


@contextlib.asynccontextmanager
async def chaos_cluster(
    model: Path, *roles: Role, gateways: int = 2, limits: Limits | None = None, log_level: str = "error"
) -> AsyncIterator[ChaosCluster]:
    """A running cluster; at the end of a good block every process must end by itself, with code 0."""
    cluster = ChaosCluster(model, roles, gateways, limits or Limits(), log_level)
    try:
        await cluster.start()
        yield cluster
    except BaseException:
        await cluster.abort()
        raise
    codes = await cluster.stop()
    assert set(codes.values()) == {0}, f"not every process ended well: {codes}"
