"""What must hold after every event, seen from outside the machines, and the record of what happened."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from hashlib import blake2b
from typing import Any

from distserve.core.effects import Deliver, Effect, Send
from distserve.core.events import Event, GatewayLost, Reported, Submit, Tick, TokensMade
from distserve.core.types import GatewayRef, InstanceRef
from distserve.sched.gateway import GatewayState
from distserve.sched.instance import InstanceState
from distserve.sched.lifecycle import Phase
from tests.faults.heap import Heap
from tests.faults.process import Process
from tests.faults.truth import Violation


@dataclass(frozen=True)
class Entry:
    """One event that a life of a process handled, and what it answered."""

    process: Process
    life: int
    now: float
    event: Event
    effects: list[Effect]


class Watcher:
    """Called with every event and its effects, before these are performed."""

    def __init__(self, heap: Heap, *, trace: bool = False, digest: bool = False, journal: bool = False) -> None:
        self.heap = heap
        self.events = 0
        self.trace: deque[str] | None = deque(maxlen=200_000) if trace else None
        self.journal: list[Entry] | None = [] if journal else None
        self.digest = blake2b(digest_size=16) if digest else None
        self._owner_of: dict[tuple[str, int], tuple[str, int]] = {}  # (request, epoch) → the life that owned it
        self._highest: dict[tuple[str, int, str], int] = {}  # (gateway life, request) → the highest epoch accepted
        self._held: dict[tuple[str, int], set[tuple[str, int]]] = {}  # life → (request, epoch) it holds now

    def __call__(self, process: Process, event: Event, effects: list[Effect]) -> None:
        self.events += 1
        if self.digest is not None:
            self.digest.update(repr((self.heap.now, process.name, event, effects)).encode())
        if self.trace is not None:
            self._note(process, event, effects)
        if self.journal is not None:
            self.journal.append(Entry(process, process.incarnation, process.clock, event, effects))
        process.machine.check()
        if isinstance(process.machine, InstanceState):
            self._ownership(process, process.machine)
            self._waits(process, bool(process.machine.residents.sequences or process.machine.arrivals.moves))
            self._progress(process, process.machine)
            if isinstance(event, GatewayLost):
                self._let_go(process, process.machine, event.gateway)
        elif isinstance(process.machine, GatewayState):
            self._waits(process, bool(process.machine.streams))
            self._epochs(process, event, effects)

    def note(self, text: str) -> None:
        """Something that is no event of a machine: a fault, a client."""
        if self.trace is not None:
            self.trace.append(f"{self.heap.now:10.4f} **   {text}")

    # ── properties ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _waits(self, process: Process, waiting: bool) -> None:
        """Every wait has a deadline."""
        if waiting and process.machine.next_deadline() is None:
            raise Violation(f"{process.name} waits for something without a deadline")

    def _progress(self, process: Process, machine: InstanceState) -> None:
        """Who has work steps, unless the blocks it needs are on the move; who has no work admits."""
        leaving = any(s.phase is Phase.HANDOFF for s in machine.residents.sequences.values())
        if machine.steps.running or leaving or machine.arrivals.open:
            return
        if machine.residents.running or machine.residents.waiting or machine.arrivals.moves:
            counts = {str(k): v for k, v in machine.residents.ledger.counts().items() if v}
            raise Violation(f"{process.name} has work, is idle, and nothing is in its way: {counts}")

    def _let_go(self, process: Process, machine: InstanceState, gateway: GatewayRef) -> None:
        """What a lost gateway asked for ends at once."""
        left = [s.id for s in machine.residents.sequences.values() if s.gateway == gateway]
        left += [m.id for m in machine.arrivals.moves.values() if m.asked.gateway == gateway]
        if left:
            raise Violation(f"{process.name} lost {gateway} but keeps {left}")

    def _epochs(self, process: Process, event: Event, effects: list[Effect]) -> None:
        """Tokens are accepted from the highest epoch seen alone."""
        delivered = {e.request_id for e in effects if isinstance(e, Deliver)}
        for output in event.outputs if isinstance(event, TokensMade) else ():
            key = (process.name, process.incarnation, output.request_id)
            if output.request_id in delivered:
                if output.epoch < self._highest.get(key, 0):
                    raise Violation(
                        f"{process.name} takes tokens of {output.request_id} at a stale epoch {output.epoch}"
                    )
                self._highest[key] = output.epoch
        for effect in effects:
            if isinstance(effect, Send) and isinstance(effect.event, Submit):
                self._highest[process.name, process.incarnation, effect.event.request.id] = effect.event.epoch

    def _ownership(self, process: Process, machine: InstanceState) -> None:
        """An epoch of a request has one owner, once: no second life owns it, and nobody owns it again."""
        life = (process.name, process.incarnation)
        before = self._held.get(life, set())
        now = {(s.id, s.epoch) for s in machine.residents.sequences.values()}
        for key in sorted(now - before):
            if key in self._owner_of:
                raise Violation(f"{key[0]} at epoch {key[1]} is owned by {life} after {self._owner_of[key]}")
            self._owner_of[key] = life
        self._held[life] = now

    # ── the record ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _note(self, process: Process, event: Event, effects: list[Effect]) -> None:
        assert self.trace is not None
        if isinstance(event, Tick | Reported) and not effects:
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
