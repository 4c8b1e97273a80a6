"""What every event must leave behind on a gateway and on the controller: seen in state and effects.

One eye watches one life and keeps what its machine does not: who was sent what, since when something has waited.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from distserve.core.effects import Deliver, Effect, Send
from distserve.core.events import (
    Abandon,
    Abandoned,
    AttemptFailed,
    ControllerFound,
    Event,
    InstanceLost,
    MembersChanged,
    Submit,
    Tick,
    TokensMade,
)
from distserve.core.types import InstanceRef, Member, attempt_of
from distserve.sched.cluster import ClusterState
from distserve.sched.gateway import GatewayState
from distserve.sched.stream import Stream, StreamPhase
from tests.faults.process import Process
from tests.faults.properties import Property, Violation

SLACK_S = 0.1


@dataclass
class _Attempt:
    number: int
    holders: dict[InstanceRef, None] = field(default_factory=dict)  # lives that may hold something for it


@dataclass
class _Told:
    epoch: int
    first: float
    last: float


class GatewayEye:
    """See the module."""

    def __init__(self, process: Process, machine: GatewayState) -> None:
        self.process = process
        self.machine = machine
        self.config = machine.config
        self.phases: dict[str, str] = {}
        self._version = -1  # of the members last heard of, in this controller's life
        self._known: tuple[Member, ...] = ()
        self._highest: dict[str, int] = {}  # request → the highest epoch accepted
        self._attempts: dict[str, _Attempt] = {}
        self._told: dict[tuple[InstanceRef, str], _Told] = {}  # Abandon messages without an answer
        self._since: dict[str, tuple[tuple[int, StreamPhase, float], float]] = {}

    def saw(self, event: Event, effects: list[Effect]) -> None:
        self._epochs(event, effects)
        self._telling(event, effects)
        self._over(event, effects)
        self._follow(event, effects)
        match event:
            case InstanceLost(ref, _):
                self._nothing_on(ref)
            case ControllerFound():
                self._version = -1
            case MembersChanged():
                self._members(event, effects)
        self.look()

    def _broken(self, broken: Property, what: str) -> None:
        raise Violation(broken, f"{self.process.name} {what}")

    def _members(self, event: MembersChanged, effects: list[Effect]) -> None:
        """A list older than one already heard of this controller changes nothing; of the lost nothing is kept."""
        if event.version < self._version:
            if effects or tuple(self.machine.members.values()) != self._known:
                self._broken(Property.EPOCH, f"believes member list {event.version} after {self._version}")
            return
        self._version, self._known = event.version, tuple(self.machine.members.values())
        for ref in event.lost:
            self._nothing_on(ref)

    # ── who is told ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _telling(self, event: Event, effects: list[Effect]) -> None:
        now = self.process.clock
        if isinstance(event, Abandoned):
            known = self._told.get((event.source, event.request_id))
            if known is not None and event.epoch >= known.epoch:
                del self._told[event.source, event.request_id]
        elif isinstance(event, InstanceLost):
            self._told = {key: told for key, told in self._told.items() if key[0] != event.ref}
        for effect in effects:
            if isinstance(effect, Send) and isinstance(effect.event, Abandon):
                assert isinstance(effect.to, InstanceRef)
                key = (effect.to, effect.event.request_id)
                known = self._told.get(key)
                if known is not None and known.epoch == effect.event.epoch:
                    known.last = now
                else:
                    self._told[key] = _Told(effect.event.epoch, now, now)

    def _over(self, event: Event, effects: list[Effect]) -> None:
        """An attempt that was given up: every holder it can reach hears of it now, or heard before."""
        finished = self._finished(event)
        failed_by = event.source if isinstance(event, AttemptFailed) else None
        for request_id, attempt in list(self._attempts.items()):
            stream = self.machine.streams.get(request_id)
            if stream is not None and stream.attempt == attempt.number:
                continue
            del self._attempts[request_id]
            if stream is None and request_id in finished:
                continue
            for ref in attempt.holders:
                told = self._told.get((ref, request_id))
                heard = told is not None and attempt_of(told.epoch) >= attempt.number
                if not heard and ref in self.machine.connected and ref != failed_by:
                    self._broken(Property.TOLD, f"gave up attempt {attempt.number} of {request_id}, {ref} is not told")

    def _finished(self, event: Event) -> set[str]:
        outputs = event.outputs if isinstance(event, TokensMade) else ()
        return {output.request_id for output in outputs if output.finish is not None}

    def _follow(self, event: Event, effects: list[Effect]) -> None:
        """Note who may hold something for which attempt."""
        for effect in effects:
            if isinstance(effect, Send) and isinstance(effect.event, Submit):
                assert isinstance(effect.to, InstanceRef)
                submit = effect.event
                holders = dict.fromkeys((effect.to, submit.decode.ref))
                self._attempts[submit.request.id] = _Attempt(attempt_of(submit.epoch), holders)
        if isinstance(event, TokensMade):
            for output in event.outputs:
                known = self._attempts.get(output.request_id)
                if known is not None and attempt_of(output.epoch) == known.number:
                    known.holders[event.source] = None

    def _nothing_on(self, ref: InstanceRef) -> None:
        """What ran on the lost goes on elsewhere at once, unless it had been handed on already."""
        for stream in self.machine.streams.values():
            moved_on = stream.decode is not None and stream.owner == stream.decode.ref != ref
            if stream.running and ref in stream.holders() and not moved_on:
                self._broken(Property.LETGO, f"lost {ref} but leaves {stream.id} there")

    # ── tokens ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _epochs(self, event: Event, effects: list[Effect]) -> None:
        """Tokens are accepted from the highest epoch seen alone."""
        if isinstance(event, TokensMade):
            delivered = {e.request_id for e in effects if isinstance(e, Deliver)}
            for output in event.outputs:
                if output.request_id in delivered:
                    if output.epoch < self._highest.get(output.request_id, 0):
                        what = f"takes tokens of {output.request_id} at a stale epoch {output.epoch}"
                        self._broken(Property.EPOCH, what)
                    self._highest[output.request_id] = output.epoch
        for effect in effects:
            if isinstance(effect, Send) and isinstance(effect.event, Submit):
                self._highest[effect.event.request.id] = effect.event.epoch

    # ── time ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def look(self) -> None:
        machine = self.machine
        now = self.process.clock
        unanswered = any(now < t.first + self.config.abandon_timeout_s - SLACK_S for t in self._told.values())
        if (machine.streams or unanswered) and machine.next_deadline() is None:
            self._broken(Property.DEADLINE, "waits for something without a deadline")
        if self.process.stalled_until > self.process.heap.now - SLACK_S:
            return
        for stream in machine.streams.values():
            if stream.deadline < now - SLACK_S:
                self._broken(Property.OVERDUE, f"keeps {stream.id} past its deadline")
            self._waits(stream, now)
        for (ref, request_id), told in list(self._told.items()):
            if now - told.first > self.config.abandon_timeout_s:
                del self._told[ref, request_id]  # given up: the instance forgets it by its own deadline
            elif now - told.last > self.config.abandon_repeat_s + SLACK_S:
                self._broken(Property.REPEAT, f"has not repeated to {ref} that {request_id} is over")

    def _waits(self, stream: Stream, now: float) -> None:
        """An unanswered dispatch goes into bypass in time; who waits for an instance asks again in time."""
        here = (stream.attempt, stream.phase, stream.wake_at)
        known, since = self._since.get(stream.id, (None, now))
        if known != here:
            self._since[stream.id] = (here, now)
            since = now
        phase = stream.phase
        if phase is StreamPhase.DISPATCHING and not self.machine.controller:
            self._broken(Property.PROGRESS, f"waits for a controller that is away with {stream.id}")
        if phase is StreamPhase.DISPATCHING and now - since > self.config.dispatch_timeout_s + SLACK_S:
            self._broken(Property.OVERDUE, f"waits {now - since:.1f} s for the controller with {stream.id}")
        pause = max(1.0, self.config.retry_pause_s * stream.attempt)
        if phase is StreamPhase.WAITING and now - since > pause + SLACK_S:
            self._broken(Property.OVERDUE, f"lets {stream.id} wait {now - since:.1f} s without asking again")

    def points(self) -> Iterator[tuple[str, str, str]]:
        for stream in self.machine.streams.values():
            yield stream.id, stream.id, f"stream {stream.phase.value}"


class ControllerEye:
    """``beats``: whether a life's heartbeats have surely reached the controller all through its last lease."""

    def __init__(self, process: Process, machine: ClusterState, beats: Callable[[InstanceRef], bool]) -> None:
        self.process = process
        self.machine = machine
        self.phases: dict[str, str] = {}
        self._beats = beats
        self._members: tuple[InstanceRef, ...] = ()

    def saw(self, event: Event, effects: list[Effect]) -> None:
        before, self._members = self._members, tuple(s.member.ref for s in self.machine.members.values())
        if isinstance(event, Tick):
            for ref in before:
                if ref not in self._members and self._beats(ref):
                    self._broken(Property.ALIVE, f"declares {ref} dead, whose heartbeats arrive")
        self.look()

    def _broken(self, broken: Property, what: str) -> None:
        raise Violation(broken, f"{self.process.name} {what}")

    def look(self) -> None:
        if self.process.stalled_until > self.process.heap.now - SLACK_S:
            return
        now, lease = self.process.clock, self.machine.config.lease_s
        for standing in self.machine.members.values():
            if standing.heard_at + lease < now - SLACK_S:
                silent = now - standing.heard_at
                self._broken(Property.OVERDUE, f"counts on {standing.member.ref}, silent for {silent:.1f} s")

    def points(self) -> Iterator[tuple[str, str, str]]:
        return iter(())
