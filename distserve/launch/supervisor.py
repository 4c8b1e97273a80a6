"""Keeps instances alive: starts each, hears of it, starts it again when it dies. Decides nothing about requests."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distserve.launch.child import Child

log = logging.getLogger(__name__)

CANNOT_START, REFUSED = 2, 3
"""Exit codes of an instance that would fail again at once."""

START_TRIES = 3
"""Lives that an instance gets to join for the first time, if its words do not say that it cannot."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
STEADY_S = 10.0
"""A life this long was a good one: the next death starts with the shortest pause again."""


class StartFailed(RuntimeError):
    """An instance cannot be started at all; the text is for the user."""


@dataclass(slots=True)
class Kept:
    """One instance and what is known of its present life."""

    name: str
    arguments: Callable[[int], Sequence[str]]
    child: Child | None = None
    lives: int = 0
    joined: bool = False
    facts: dict[str, Any] = field(default_factory=dict)


class Supervisor:
    """See the module. ``run`` for as long as instances should live; ``end`` before leaving."""

    def __init__(
        self,
        instances: Mapping[str, Callable[[int], Sequence[str]]],
        environ: Mapping[str, str],
        *,
        restart: bool,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        """``instances``: name → arguments of ``distserve`` for its n-th life, from 1. ``changed`` is called when an
        instance joins or ends.
        """
        self.kept = {name: Kept(name, arguments) for name, arguments in instances.items()}
        self._environ = environ
        self._restart = restart
        self._changed = changed
        self.complete = asyncio.Event()
        """Every instance has joined once."""
        self._ending = asyncio.Event()

    @property
    def alive(self) -> bool:
        return any(kept.child is not None for kept in self.kept.values())

    async def run(self) -> None:
        """Keep all instances until ``end`` or cancellation. Raises ``StartFailed`` when one never came up."""
        tasks = [asyncio.create_task(self._keep(kept), name=kept.name) for kept in self.kept.values()]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)  # unlike gather, cancels none of them
        finally:
            for task in tasks:
                task.cancel()  # once: a second would cut its clearing up short
            ended = await asyncio.gather(*tasks, return_exceptions=True)
        for problem in ended:
            if isinstance(problem, Exception):
                raise problem

    async def end(self, grace_s: float) -> None:
        """End every instance, all at once, each within a grace."""
        self._ending.set()
        await asyncio.gather(*(k.child.end(grace_s) for k in self.kept.values() if k.child is not None))

    def hurry(self) -> None:
        """Let every instance end without further grace."""
        self._ending.set()
        for kept in self.kept.values():
            if kept.child is not None:
                kept.child.hurry()

    async def _keep(self, kept: Kept) -> None:
        pause_s = FIRST_PAUSE_S
        while not self._ending.is_set():
            began = asyncio.get_running_loop().time()
            code = await self._live(kept)
            if self._ending.is_set():
                return
            if not kept.joined and (code in (CANNOT_START, REFUSED) or kept.lives >= START_TRIES):
                raise StartFailed(f"instance {kept.name} cannot start; its own words are above")
            how = f"signal {-code}" if code < 0 else f"code {code}"
            if not self._restart:
                log.error("instance %s ended with %s; it is not started again (--no-restart)", kept.name, how)
                return
            if asyncio.get_running_loop().time() - began > STEADY_S:
                pause_s = FIRST_PAUSE_S
            log.warning("instance %s ended with %s; starting it again in %.1f s", kept.name, how, pause_s)
            await self._pause(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _live(self, kept: Kept) -> int:
        """One life of an instance; returns its exit code."""
        kept.lives += 1
        child = await Child.start(kept.name, kept.arguments(kept.lives), self._environ)
        kept.child = child
        if self._ending.is_set():
            child.hurry()
        try:
            async for line in child.lines():
                match line.get("event"):
                    case "bound":
                        kept.facts = {k: v for k, v in line.items() if k not in ("event", "kind")}
                    case "joined":
                        kept.joined = True
                        kept.facts |= {"startup_s": line.get("startup_s", {})}
                        if all(each.joined for each in self.kept.values()):
                            self.complete.set()
                        self._changed()
            return await child.ended()
        except asyncio.CancelledError:
            child.kill()
            await child.ended()
            raise
        finally:
            kept.child, kept.facts = None, {}
            self._changed()

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._ending.wait()
        except TimeoutError:
            return
