"""What goes wrong in a chaos run: the kinds, their order and triggers out of one seed, and how each is done and healed.

A fault is triggered by a client's progress ("at the k-th token of request r"), not by the clock, so a seed gives the
same faults in the same order. Those that take a process away hold a place of ``crippling``: never more are away than
the others can stand in for.
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from tests.chaos.cluster import CONTROLLER, ChaosCluster, Kept
from tests.chaos.part import FLIP, HANG
from tests.chaos.proxy import BOTH, Proxy, Trouble, Way

WEIGHTS: dict[str, int] = {
    "kill a prefill instance": 7,
    "kill a decode instance": 7,
    "kill a mixed instance": 5,
    "kill the controller": 6,
    "kill a gateway": 4,
    "stop a process shortly": 20,
    "stop an instance past its lease": 7,
    "stop the controller past a lease": 4,
    "a step that hangs": 3,
    "connection reset": 26,
    "half-close": 12,
    "one-way partition": 18,
    "partition past a lease": 6,
    "slow link": 14,
    "a flipped byte in staging": 24,
    "full pools": 8,
    "client cancels": 20,
    "client vanishes": 20,
    "deadline expires": 14,
}
"""Kind → how often, of 225."""

CLIENT_KINDS = ("client cancels", "client vanishes", "deadline expires")
"""Done by the request itself."""

BURST = 10
"""Requests of the longest kind that fill the pools."""

PROVOCATIONS = 40
"""Bursts after which a process that got no work counts as left out."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that will go wrong, and when."""

    number: int
    kind: str
    request: int
    token: int  # of that request; its end is as good
    pick: float  # chooses the target among those there are
    pick2: float

    def __str__(self) -> str:
        return f"fault {self.number}: {self.kind} at token {self.token} of request {self.request}"


def plan(seed: int, requests: int, faults: int) -> list[Fault]:
    """The faults of a run, in order of their requests; every kind at least once if there are enough."""
    draw = random.Random(seed)
    pool = [kind for kind, weight in WEIGHTS.items() for _ in range(weight)]
    kinds = list(WEIGHTS)[:faults]
    while len(kinds) < faults:
        draw.shuffle(pool)
        kinds += pool[: faults - len(kinds)]
    draw.shuffle(kinds)
    places = sorted(draw.sample(range(requests), faults))
    return [
        Fault(number, kind, place, draw.randrange(0, 30), draw.random(), draw.random())
        for number, (kind, place) in enumerate(zip(kinds, places, strict=True))
    ]


@dataclass(slots=True)
class Window:
    """When a fault was there: from its blow until what it broke was whole again."""

    fault: Fault
    target: str
    begin: float
    end: float = 0.0


@dataclass(slots=True)
class Breaker:
    """Does faults. ``burst`` asks a number of requests at once, long ones if told so, and waits for their ends."""

    cluster: ChaosCluster
    burst: Callable[[int, bool], Awaitable[None]]
    crippled: int = 2  # processes that may be away at the same time
    windows: list[Window] = field(default_factory=list)
    _crippling: asyncio.Semaphore = field(init=False)
    _busy: dict[str, asyncio.Lock] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._crippling = asyncio.Semaphore(self.crippled)

    async def do(self, fault: Fault) -> None:
        """Do a fault and wait until it is healed."""
        match fault.kind.split()[0]:
            case "kill":
                await self._away(fault, self._victims(fault.kind), self._kill)
            case "stop" if fault.kind.endswith("shortly"):
                await self._on_process(fault, sorted(self.cluster.parts), self._stop_shortly)
            case "stop":
                await self._away(fault, self._victims(fault.kind), self._stop_long)
            case "a" if fault.kind.endswith("hangs"):
                await self._away(fault, self.cluster.instances, self._hang)
            case "a":
                await self._on_process(fault, self._named("prefill"), self._flip)
            case "full":
                await self._windowed(fault, "all", self.burst(BURST, True))
            case _:
                await self._on_link(fault)

    # ── processes ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _named(self, role: str) -> list[str]:
        return [name for name in self.cluster.instances if name.startswith(role)]

    def _victims(self, kind: str) -> list[str]:
        for role in ("prefill", "decode", "mixed"):
            if role in kind:
                return self._named(role)
        if CONTROLLER in kind:
            return [CONTROLLER]
        return self.cluster.gateways if "gateway" in kind else self.cluster.instances

    async def _away(self, fault: Fault, names: Sequence[str], act: Callable[[Fault, Kept], Awaitable[None]]) -> None:
        async with self._crippling:
            await self._on_process(fault, names, act)

    async def _on_process(
        self, fault: Fault, names: Sequence[str], act: Callable[[Fault, Kept], Awaitable[None]]
    ) -> None:
        name = names[int(fault.pick * len(names))]
        async with self._busy.setdefault(name, asyncio.Lock()):
            part = self.cluster.parts[name]
            await part.until(lambda k: k.up, 60.0, "up before a fault")
            await self._windowed(fault, name, act(fault, part))

    async def _windowed(self, fault: Fault, target: str, work: Awaitable[None]) -> None:
        window = Window(fault, target, time.monotonic())
        self.windows.append(window)
        try:
            await work
        finally:
            window.end = time.monotonic()

    async def _kill(self, fault: Fault, part: Kept) -> None:
        life = part.lives
        part.signal(signal.SIGKILL)
        await part.came_back(life)

    async def _stop_shortly(self, fault: Fault, part: Kept) -> None:
        await _stopped(part, 0.2 + 0.6 * fault.pick2)

    async def _stop_long(self, fault: Fault, part: Kept) -> None:
        await _stopped(part, self.cluster.limits.lease_s * (1.4 + 0.5 * fault.pick2))

    async def _hang(self, fault: Fault, part: Kept) -> None:
        """Nothing but a step shows it: the next one that the instance is given."""
        life, before = part.lives, part.told["hangs"]
        part.signal(HANG)
        await self._provoke(part, lambda: part.told["hangs"] > before or part.lives > life)
        await part.came_back(life)

    async def _flip(self, fault: Fault, part: Kept) -> None:
        before, life = part.told["flipped"], part.lives
        part.signal(FLIP)
        await self._provoke(part, lambda: part.told["flipped"] > before or part.lives > life)

    async def _provoke(self, part: Kept, seen: Callable[[], bool]) -> None:
        """Some faults show only when a process works; the run's own requests may all go elsewhere."""
        for _ in range(PROVOCATIONS):
            if seen():
                return
            await self.burst(BURST // 2, False)
            await asyncio.sleep(0.05)  # what it said may still be on its way
        raise AssertionError(f"{part.name} was given no work by {PROVOCATIONS} bursts")

    # ── links ────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _on_link(self, fault: Fault) -> None:
        proxies = self.cluster.proxies()
        name = sorted(proxies)[int(fault.pick * len(proxies))]
        proxy = proxies[name]
        diallers = sorted({c.dialler for c in proxy.hit()})
        dialler = ["", *diallers][int(fault.pick2 * (1 + len(diallers)))]
        target = f"{name}, from {dialler or 'anybody'}"
        await self._windowed(fault, target, self._trouble(fault, proxy, dialler))

    async def _trouble(self, fault: Fault, proxy: Proxy, dialler: str) -> None:
        seconds = 0.4 + 1.6 * fault.pick2
        way = Way.OUT if fault.pick2 * 1000 % 2 < 1 else Way.BACK
        match fault.kind:
            case "connection reset":
                for connection in proxy.hit(dialler):
                    connection.reset()
                await asyncio.sleep(0.2)  # its consequences count as its own
            case "half-close":
                for connection in proxy.hit(dialler):
                    connection.half_close(way)
                await asyncio.sleep(0.2)
            case "one-way partition":
                with proxy.trouble(Trouble((way,), dialler, hold=True)):
                    await asyncio.sleep(seconds)
            case "partition past a lease":
                with proxy.trouble(Trouble(BOTH, dialler, hold=True)):
                    await asyncio.sleep(self.cluster.limits.lease_s + seconds)
            case "slow link":
                with proxy.trouble(Trouble(BOTH, dialler, delay_s=0.02 + 0.06 * fault.pick, bytes_per_s=200_000)):
                    await asyncio.sleep(2 * seconds)
            case _:
                raise ValueError(fault.kind)


async def _stopped(part: Kept, seconds: float) -> None:
    part.signal(signal.SIGSTOP)
    try:
        await asyncio.sleep(seconds)
    finally:
        part.signal(signal.SIGCONT)
