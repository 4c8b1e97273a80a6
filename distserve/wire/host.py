"""A machine on an asyncio loop: events in by one door, effects performed in order, ticks when they are due.

One timer for each machine and none while it waits for nothing. Knows no machine's kind.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from distserve.core.effects import Effect
from distserve.core.events import Tick


class Machine(Protocol):
    """One of the three state machines."""

    def handle(self, event: Any, now: float) -> list[Effect]: ...

    def next_deadline(self) -> float | None: ...


class Observer(Protocol):
    """Whoever watches a machine: a journal, metrics."""

    def write(self, now: float, event: Any, effects: Sequence[Any]) -> None: ...


class MachineHost:
    """See the module. ``perform`` must not call ``handle`` itself; its consequences come back later, as events."""

    def __init__(self, machine: Machine, perform: Callable[[Effect], None], observers: Sequence[Observer] = ()) -> None:
        self._machine = machine
        self._perform = perform
        self._observers = tuple(observers)
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    def now(self) -> float:
        """The clock that the machine is told."""
        return self._loop.time()

    def handle(self, event: Any) -> None:
        """Tell the machine of an event and perform what it asks for. After ``close`` nothing happens any more."""
        if self._closed:
            return
        now = self.now()
        effects = self._machine.handle(event, now)
        for observer in self._observers:
            observer.write(now, event, effects)
        for effect in effects:
            self._perform(effect)
        self._arm()

    def close(self) -> None:
        """Let nothing more happen."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()

    def _arm(self) -> None:
        """See to a timer no later than the next deadline. One that is early finds out when it fires."""
        deadline = self._machine.next_deadline()
        if deadline is None or (self._timer is not None and self._timer.when() <= deadline):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(deadline, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        deadline = self._machine.next_deadline()
        if deadline is not None and self.now() >= deadline:
            self.handle(Tick())
        else:
            self._arm()
