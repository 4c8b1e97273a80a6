"""One chaos run: clients ask, faults strike at their tokens, and what must be true from outside in the end."""

from __future__ import annotations

import asyncio
import itertools
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distserve.core.types import Role
from tests.chaos.asking import LONGEST_ANSWER, Ask, Asker, Known, longest_gap, oracle
from tests.chaos.cluster import ChaosCluster, Limits, chaos_cluster
from tests.chaos.faults import CLIENT_KINDS, Breaker, Fault, Window, plan

LATE_S = 0.25
"""This process's own timer later than this: it did not run for so long."""

PROGRESS_EVERY = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """What a run is made of."""

    seed: int = 1
    requests: int = 1200
    faults: int = 225
    concurrency: int = 14
    prompts: int = 24
    roles: tuple[Role, ...] = (Role.PREFILL, Role.PREFILL, Role.DECODE, Role.DECODE, Role.MIXED)
    gateways: int = 2
    limits: Limits = field(default_factory=Limits)


@dataclass(slots=True)
class Verdict:
    """What came of a run. ``problems`` is empty when every promise was kept."""

    scenario: Scenario
    wall_s: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    sentences: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    stalls: dict[str, float] = field(default_factory=dict)  # kind → longest silence that a client saw, seconds
    quiet_stall_s: float = 0.0  # the same while nothing was wrong
    longest_s: float = 0.0  # from a request's beginning to its end
    resumed: int = 0
    moved_bytes: int = 0
    flipped: int = 0
    caught: int = 0
    lives: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def asks(scenario: Scenario, known: list[Known], faults: list[Fault]) -> list[Ask]:
    """The requests of a run, in order; some are faults themselves."""
    own = {f.request: f for f in faults if f.kind in CLIENT_KINDS}
    made = []
    for number in range(scenario.requests):
        draw = random.Random(scenario.seed * 1_000_003 + number)
        ask: dict[str, Any] = {
            "number": number,
            "known": draw.choice(known),
            "wanted": draw.randrange(8, LONGEST_ANSWER + 1),
            "pick": draw.random(),
        }
        fault = own.get(number)
        if fault is not None and fault.kind == "deadline expires":
            ask |= {"timeout_s": 0.02 + 0.5 * fault.pick}
        elif fault is not None:
            phase = (0, 1, 2, fault.token)[int(fault.pick * 4)]  # queue or prefill, hand-off, first steps, decode
            ask |= {"leave_after": min(phase, ask["wanted"] - 1), "vanish": fault.kind == "client vanishes"}
        made.append(Ask(**ask))
    return made


class Run:
    """See the module."""

    def __init__(
        self, scenario: Scenario, cluster: ChaosCluster, known: list[Known], say: Callable[[str], None]
    ) -> None:
        self._scenario = scenario
        self._cluster = cluster
        self._known = known
        self._say = say
        self._faults = plan(scenario.seed, scenario.requests, scenario.faults)
        self._asks = asks(scenario, known, self._faults)
        self._asker = Asker(cluster, self._progress)
        self._breaker = Breaker(cluster, self._burst)
        self._due = {f.number: asyncio.Event() for f in self._faults}
        self._waiting: dict[int, list[Fault]] = {}
        for fault in self._faults:
            self._waiting.setdefault(fault.request, []).append(fault)
        self._open: dict[int, Fault] = {f.number: f for f in self._faults}
        self._healed = asyncio.Condition()
        self._slept: list[tuple[float, float]] = []
        self._draw = random.Random(scenario.seed)
        self._numbers = itertools.count(scenario.requests)  # of requests beside the planned ones

    async def run(self) -> Verdict:
        """Ask everything while everything goes wrong; the verdict, leaks included."""
        await self._cluster.settled()
        began = time.monotonic()
        watch = asyncio.create_task(self._watch_own_sleep())
        numbers = iter(self._asks)
        try:
            async with asyncio.TaskGroup() as group:
                for fault in self._faults:
                    group.create_task(self._strike(fault))
                for _ in range(self._scenario.concurrency):
                    group.create_task(self._work(numbers))
            await self._cluster.settled()
            problems = await self._leaks()
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
        return self._verdict(time.monotonic() - began, problems)

    async def _work(self, numbers: Any) -> None:
        for ask in numbers:
            await self._room(ask.number)
            await self._asker.ask(ask)
            if self._asker.tally.ended % PROGRESS_EVERY == 0:
                self._say(self._words())

    async def _room(self, number: int) -> None:
        """Not further ahead of the faults than twice the requests in flight: the run has the length of its faults."""
        ahead = 2 * self._scenario.concurrency
        async with self._healed:
            await self._healed.wait_for(lambda: all(f.request > number - ahead for f in self._open.values()))

    async def _strike(self, fault: Fault) -> None:
        try:
            await self._due[fault.number].wait()
            if fault.kind not in CLIENT_KINDS:
                await self._breaker.do(fault)
        finally:
            async with self._healed:
                del self._open[fault.number]
                self._healed.notify_all()

    def _progress(self, number: int, tokens: int) -> None:
        """A request got so far; -1: to its end. Faults that waited for this are due."""
        for fault in list(self._waiting.get(number, ())):
            if tokens == -1 or (tokens >= fault.token and fault.kind not in CLIENT_KINDS):
                self._waiting[number].remove(fault)
                self._due[fault.number].set()

    async def _burst(self, count: int, longest: bool) -> None:
        """Requests beside the planned ones, all at once: the longest there are, or any."""
        count = min(count, len(self._known))
        by_length = sorted(self._known, key=lambda k: len(k.prompt))
        chosen = by_length[-count:] if longest else self._draw.sample(self._known, count)
        asks = [Ask(next(self._numbers), known, LONGEST_ANSWER, n / count) for n, known in enumerate(chosen)]
        await asyncio.gather(*(self._asker.ask(ask) for ask in asks))

    async def _leaks(self) -> list[str]:
        try:
            await self._cluster.clean()
        except AssertionError as error:
            return [str(error)]
        return []

    async def _watch_own_sleep(self) -> None:
        """Note when this process did not run: a silence then is nobody else's."""
        while True:
            before = time.monotonic()
            await asyncio.sleep(LATE_S)
            now = time.monotonic()
            if now - before > 2 * LATE_S:
                self._slept.append((before + LATE_S, now))

    def _words(self) -> str:
        tally = self._asker.tally
        done = len(self._faults) - len(self._open)
        bad = f", VIOLATIONS {tally.violations[:3]}" if tally.violations else ""
        return f"{tally.ended} requests {dict(tally.outcomes)}, {done} of {len(self._faults)} faults healed{bad}"

    def _verdict(self, wall_s: float, problems: list[str]) -> Verdict:
        tally, parts = self._asker.tally, self._cluster.parts
        bound = self._scenario.limits.deadline_s + 1.0
        verdict = Verdict(
            self._scenario,
            wall_s=wall_s,
            outcomes=tally.outcomes,
            sentences=tally.sentences,
            faults=Counter(f.kind for f in self._faults),
            resumed=tally.resumed,
            moved_bytes=tally.moved_bytes,
            flipped=sum(p.told["flipped"] for p in parts.values()),
            caught=sum(p.told["caught"] for p in parts.values()),
            lives={name: part.lives for name, part in parts.items()},
            problems=[*tally.violations, *problems],
        )
        records = tally.records
        for window in self._all_windows():
            stall = longest_gap(records, window.begin, window.end, self._slept)
            verdict.stalls[window.fault.kind] = max(stall, verdict.stalls.get(window.fault.kind, 0.0))
        for record in records:
            whole = longest_gap(
                [type(record)(record.number, [record.heard[0], record.heard[-1]])], 0, 1e18, self._slept
            )
            verdict.longest_s = max(verdict.longest_s, whole)
        verdict.problems += [
            f"a client saw {stall:.1f} s of silence during: {kind}"
            for kind, stall in verdict.stalls.items()
            if stall > bound
        ]
        return verdict

    def _all_windows(self) -> list[Window]:
        """Of the clients' own faults, each is there while its request is; others see what it does to them."""
        own = {f.request: f for f in self._faults if f.kind in CLIENT_KINDS}
        mine = [
            Window(own[r.number], "itself", r.heard[0], r.heard[-1])
            for r in self._asker.tally.records
            if r.number in own
        ]
        return [*self._breaker.windows, *mine]


async def chaos(scenario: Scenario, model: Path, say: Callable[[str], None] | None = None) -> Verdict:
    """A whole run: cluster up, chaos, cluster down. A process that hangs at the end is a problem, too."""
    speak = say or (lambda words: print(f"chaos: {words}", file=sys.stderr, flush=True))
    knowing = asyncio.create_task(asyncio.to_thread(oracle, model, scenario.prompts, scenario.seed))
    verdict = Verdict(scenario)
    began = time.monotonic()
    try:
        async with chaos_cluster(model, *scenario.roles, gateways=scenario.gateways, limits=scenario.limits) as cluster:
            speak(f"{len(cluster.parts)} processes up in {time.monotonic() - began:.0f} s, seed {scenario.seed}")
            verdict = await Run(scenario, cluster, await knowing, speak).run()
    except AssertionError as error:
        verdict.problems.append(str(error))
    return verdict
