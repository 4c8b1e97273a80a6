"""A process as the network sees it: a life, an inbox, a clock of its own, and one machine behind one door.

Owns what every shell must do: feed events in order, perform effects in order, tick when the machine asks. Stalls and
dies on command. Knows nothing of what the machine decides.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Protocol

from distserve.core.effects import Effect
from distserve.core.events import Event, Tick
from tests.faults.coverage import Coverage
from tests.faults.heap import Heap
from tests.faults.properties import Property, Violation


class Machine(Protocol):
    """What the three machines have in common."""

    def handle(self, event: Any, now: float) -> list[Effect]: ...

    def next_deadline(self) -> float | None: ...

    def check(self) -> None: ...


class Watch(Protocol):
    """Who looks on: at every event with its effects before these are performed, at a raise, and now and then."""

    coverage: Coverage

    def saw(self, process: Process, event: Event, effects: list[Effect]) -> None: ...

    def raised(self, process: Process, event: Event, error: Exception) -> None: ...

    def note(self, text: str) -> None: ...


class Process:
    """One life after another of one gateway, controller or instance."""

    kind = ""

    def __init__(self, name: str, heap: Heap, offset: float, watch: Watch) -> None:
        self.name = name
        self.heap = heap
        self.incarnation = 0
        self.alive = False
        self.machine: Machine
        self.inbox: deque[Event] = deque()
        self._offset = offset
        self.watch = watch
        self.frozen_until = 0.0
        self.stalled_until = 0.0
        self.cut_after: int | None = None  # dies after this many effects of a step that has more
        self._ticks_at: float | None = None
        self._tick_missed = False

    @property
    def clock(self) -> float:
        """This process's own clock: times do not compare across processes."""
        return self.heap.now + self._offset

    # ── life ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def start(self) -> None:
        self.incarnation += 1
        self.alive = True
        self.inbox.clear()
        self.frozen_until = self.stalled_until = 0.0
        self.cut_after = None
        self._ticks_at, self._tick_missed = None, False
        self.machine = self.new_machine()

    def die(self) -> None:
        self.alive = False

    def stall(self, until: float, *, freeze: bool = False) -> None:
        """No event is handled until a time; frozen, its heartbeats stop as well."""
        self.stalled_until = max(self.stalled_until, until)
        if freeze:
            self.frozen_until = max(self.frozen_until, until)
        self.heap.at(until, self._pump, self.incarnation)

    # ── events in, effects out ───────────────────────────────────────────────────────────────────────────────────────

    def deliver(self, event: Event) -> None:
        if self.alive:
            self.inbox.append(event)
            self._pump(self.incarnation)

    def ready(self) -> bool:
        """Whether the machine may be given an event now."""
        return self.alive and self.heap.now >= self.stalled_until

    def _pump(self, life: int) -> None:
        while self.inbox and self.incarnation == life and self.ready():
            if self._tick_missed and self.ticks_before(self.inbox[0]):
                self._tick_now()
            else:
                self.handle(self.inbox.popleft())
        if self._tick_missed and self.incarnation == life and self.ready():
            self._tick_now()

    def _tick_now(self) -> None:
        self._tick_missed = False
        self._tick_if_due()

    def ticks_before(self, event: Event) -> bool:
        """Whether a tick that was missed comes before this event of the inbox. All others come first."""
        return False

    def handle(self, event: Event) -> None:
        try:
            effects = self.machine.handle(event, self.clock)
        except Exception as error:
            self.watch.raised(self, event, error)
            raise
        self.watch.saw(self, event, effects)
        for number, effect in enumerate(effects):
            if self.cut_after is not None and number >= self.cut_after:
                self.cut()
                return
            self.perform(effect)
        self.handled(event)
        self._set_tick(after_tick=isinstance(event, Tick))

    def cut(self) -> None:
        """Die between two effects of one step."""
        raise Violation(Property.STEP, f"{self.name} cannot be cut")

    def _set_tick(self, *, after_tick: bool) -> None:
        due = self.machine.next_deadline()
        if due is None:
            return
        if after_tick and due <= self.clock:
            raise Violation(Property.SPIN, f"{self.name}: a tick at {self.clock} left a deadline at {due}")
        at = due - self._offset
        if self._ticks_at is None or at < self._ticks_at:
            self._ticks_at = at
            # A hair later: (due - offset) + offset may round below due, and a shell too wakes no earlier than asked.
            self.heap.at(max(at, self.heap.now) + 1e-6, self._tick, self.incarnation, at)

    def _tick(self, life: int, at: float) -> None:
        if not self.alive or self.incarnation != life or self._ticks_at != at:
            return
        self._ticks_at = None
        if self.ready():
            self._tick_if_due()
        else:
            self._tick_missed = True

    def _tick_if_due(self) -> None:
        due = self.machine.next_deadline()
        if due is not None and due <= self.clock:
            self.handle(Tick())
        else:
            self._set_tick(after_tick=False)

    # ── what a shell fills in ────────────────────────────────────────────────────────────────────────────────────────

    def new_machine(self) -> Machine:
        raise Violation(Property.CRASH, f"{self.name} has no machine")

    def perform(self, effect: Effect) -> None:
        raise Violation(Property.CRASH, f"{self.name} cannot perform {effect}")

    def handled(self, event: Event) -> None:
        """After the effects of an event are performed: what the shell itself does about it."""

    def attached(self, dialer: Process) -> None:
        """Somebody's stream to here is up."""

    def connected(self, acceptor: Process) -> None:
        """A stream dialed from here is up."""

    def dial_failed(self, acceptor: Process, life: int | None) -> None:
        """A stream dialed from here did not come up."""

    def lost(self, other: Process, life: int, *, dialed: bool) -> None:
        """A stream with that life of another process broke, and this end has noticed."""
