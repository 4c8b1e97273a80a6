"""Who looks on: checks every property that one event can break, and keeps the record of what happened.

Called with every event and its effects before these are performed; ``look`` in addition, now and then, for what breaks
because nothing happens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from hashlib import blake2b
from typing import Any

from distserve.core.effects import Effect, Send
from distserve.core.events import Dispatched, Event, Reported, Submit, Tick
from distserve.core.types import GatewayRef, InstanceRef, Placement
from distserve.kv.errors import LedgerError
from distserve.sched.cluster import ClusterState
from distserve.sched.gateway import GatewayState
from distserve.sched.instance import InstanceState
from tests.faults.checks_gateway import ControllerEye, GatewayEye
from tests.faults.checks_instance import InstanceEye
from tests.faults.coverage import Coverage
from tests.faults.heap import Heap
from tests.faults.process import Process
from tests.faults.properties import Property, Violation
from tests.faults.waits import WaitGraph

Eye = InstanceEye | GatewayEye | ControllerEye


@dataclass(frozen=True)
class Entry:
    """One event that a life of a process handled, and what it answered."""

    process: Process
    life: int
    now: float
    event: Event
    effects: list[Effect]


class Watcher:
    """See the module. ``trace``, ``digest``, ``journal``: which records to keep."""

    def __init__(self, heap: Heap, *, trace: bool = False, digest: bool = False, journal: bool = False) -> None:
        self.heap = heap
        self.events = 0
        self.coverage = Coverage()
        self.trace: deque[str] | None = deque(maxlen=200_000) if trace else None
        self.journal: list[Entry] | None = [] if journal else None
        self.digest = blake2b(digest_size=16) if digest else None
        self.reached: Callable[[str, str], None] = lambda *_: None
        self.beats: Callable[[InstanceRef], bool] = lambda _: False
        self._eyes: dict[str, Eye] = {}
        self._graph = WaitGraph()
        self._owner_of: dict[tuple[str, int], tuple[str, int]] = {}  # (request, epoch) → the life that owned it

    # ── properties ───────────────────────────────────────────────────────────────────────────────────────────────────

    def saw(self, process: Process, event: Event, effects: list[Effect]) -> None:
        self.events += 1
        self._record(process, event, effects)
        self._check(process)
        eye = self._eye(process)
        if isinstance(eye, InstanceEye):
            self._ownership(process, eye)
            if cycle := self._graph.update(eye.machine):
                raise Violation(Property.CYCLE, f"blocks wait in a circle: {' → '.join(map(str, cycle))}")
        elif isinstance(eye, GatewayEye) and not eye.machine.controller:
            bypassed = sum(isinstance(e, Send) and isinstance(e.event, Submit) for e in effects)
            self.coverage.situations["dispatched in bypass"] += bypassed
        answers = (e.event for e in effects if isinstance(e, Send) and isinstance(e.event, Dispatched))
        overflowed = sum(answer.placement is Placement.OVERFLOW for answer in answers)
        self.coverage.situations["prompt overflowed"] += overflowed
        eye.saw(event, effects)
        self._points(eye)

    def raised(self, process: Process, event: Event, error: Exception) -> None:
        """A machine raised: at best its own guard, at worst a bug of another kind."""
        if isinstance(error, Violation):
            return
        self._record(process, event, [])
        kinds: dict[type[Exception], Property] = {LedgerError: Property.LEDGER, AssertionError: Property.STATE}
        broken = kinds.get(type(error), Property.CRASH)
        raise Violation(broken, f"{process.name} at {brief(event)}: {type(error).__name__}: {error}") from error

    def look(self, process: Process) -> None:
        """Time passes: what is overdue though nothing happens."""
        if process.alive:
            self._eye(process).look()

    def died(self, process: Process) -> None:
        """A life is over: what it waited for, it waits for no more."""
        if process.kind == "instance":
            self._graph.forget(InstanceRef(process.name, process.incarnation))

    def phases_of(self, request_id: str) -> list[str]:
        """Everywhere a request is now, as ``coverage`` names phases."""
        eyes = [eye for eye in self._eyes.values() if eye.process.alive]
        return sorted({phase for eye in eyes for _, request, phase in eye.points() if request == request_id})

    def _eye(self, process: Process) -> Eye:
        eye = self._eyes.get(process.name)
        if eye is None or eye.machine is not process.machine:
            machine = process.machine
            if isinstance(machine, InstanceState):
                eye = InstanceEye(process, machine, self.coverage)
            elif isinstance(machine, GatewayState):
                eye = GatewayEye(process, machine)
            else:
                assert isinstance(machine, ClusterState)
                eye = ControllerEye(process, machine, self.beats)
            self._eyes[process.name] = eye
        return eye

    def _check(self, process: Process) -> None:
        """The machine's own invariants, the ledger's sums among them."""
        try:
            process.machine.check()
        except LedgerError as error:
            raise Violation(Property.LEDGER, f"{process.name}: {error}") from error
        except AssertionError as error:
            broken = Property.LEDGER if "no owner" in str(error) else Property.STATE
            raise Violation(broken, f"{process.name}: {error}") from error

    def _ownership(self, process: Process, eye: InstanceEye) -> None:
        """An epoch of a request has one owner, once: no second life owns it, and nobody owns it again."""
        now = {(s.id, s.epoch) for s in eye.machine.residents.sequences.values()}
        if now == eye.held:
            return
        life = (process.name, process.incarnation)
        for key in sorted(now - eye.held):
            if key in self._owner_of:
                owned = f"{key[0]} at epoch {key[1]} is owned by {life} after {self._owner_of[key]}"
                raise Violation(Property.OWNER, owned)
            self._owner_of[key] = life
        eye.held = now

    def _points(self, eye: Eye) -> None:
        """Notice every phase that something has newly come to."""
        now = {}
        for key, request_id, phase in eye.points():
            now[key] = phase
            if eye.phases.get(key) != phase:
                self.reached(request_id, phase)
                if isinstance(eye, InstanceEye):
                    eye.saw_prefix(request_id, phase)
        eye.phases = now

    # ── the record ───────────────────────────────────────────────────────────────────────────────────────────────────

    def note(self, text: str) -> None:
        """Something that is no event of a machine: a fault, a client."""
        if self.trace is not None:
            self.trace.append(f"{self.heap.now:10.4f} **   {text}")

    def _record(self, process: Process, event: Event, effects: list[Effect]) -> None:
        if self.digest is not None:
            self.digest.update(repr((self.heap.now, process.name, event, effects)).encode())
        if self.journal is not None:
            self.journal.append(Entry(process, process.incarnation, process.clock, event, effects))
        if self.trace is None or (isinstance(event, Tick | Reported) and not effects):
            return
        name = f"{process.name}#{process.incarnation}"
        self.trace.append(f"{self.heap.now:10.4f} {name:5} {brief(event)}")
        for effect in effects:
            text = f"to {effect.to}: {brief(effect.event)}" if isinstance(effect, Send) else brief(effect)
            self.trace.append(f"{'':10}       → {text}")


def brief(value: Any) -> str:
    """A value in one readable line: long tuples by their length and first items."""
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, InstanceRef | GatewayRef):
        return str(value)
    if is_dataclass(value):
        if type(value).__name__ in ("Sampling", "Stopping", "ModelSpec"):
            return "…"
        inner = ", ".join(
            f"{f.name}={brief(getattr(value, f.name))}" for f in fields(value) if getattr(value, f.name) != ()
        )
        return f"{type(value).__name__}({inner})"
    if isinstance(value, tuple):
        shown = ", ".join(brief(v) for v in value[:6])
        return f"({shown})" if len(value) <= 6 else f"({len(value)}: {shown}, …)"
    return f"{value:.4f}" if isinstance(value, float) else repr(value)
