"""The hostile network: streams between processes that hold up, repeat, lose and break.

What it promises is what gRPC promises: one stream is in order and loses nothing while it stands; when it breaks, what
was under way is lost and *both* ends hear of it, each in its own time. Beyond that it is worse than gRPC: a message may
come twice, late; and one of ``DROPPABLE``, which its sender repeats or can do without, may vanish alone.
Partitions hold messages up, one way or both; one that outlasts the keepalive breaks the stream.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from distserve.core import events as ev
from distserve.core.effects import Party
from distserve.core.types import GatewayRef, InstanceRef
from tests.faults.coverage import Coverage
from tests.faults.heap import Heap
from tests.faults.plan import Plan, Rates
from tests.faults.process import Process

DROPPABLE = (
    ev.Abandon,
    ev.Abandoned,
    ev.DispatchAsked,
    ev.Dispatched,
    ev.DispatchRefused,
    ev.PrefillFinished,
    ev.Reported,
    ev.ReserveAsked,
    ev.ReserveGranted,
    ev.CommitAsked,
    ev.Committed,
    ev.MoveEnded,
    ev.MoveQueried,
)

REPEATED_AT_ONCE = (ev.DispatchAsked, ev.Joined, ev.GatewayJoined)
"""What opens an account with the controller: a repeat that overtook the closing word would open it again."""

KEEPALIVE_S = (3.0, 6.0)
NOTICE_S = (0.0, 1.5)


@dataclass(eq=False)
class Stream:
    """One connection between two lives. ``stands`` until it breaks; each end notices later."""

    dialer: Process
    acceptor: Process
    lives: tuple[int, int]
    stands: bool = True
    since: float = 0.0
    last: dict[str, float] = field(default_factory=dict)  # receiver → when its latest message comes


class Network:
    """Who is connected to whom, and what is on its way.

    Gateways dial instances, the source of a move its destination, and all dial the controller.
    """

    def __init__(self, plan: Plan, heap: Heap, coverage: Coverage) -> None:
        self.plan = plan
        self.heap = heap
        self.coverage = coverage
        self._luck: dict[tuple[str, str], random.Random] = {}  # of each link, so that none hangs on another's traffic
        self._sent = 0
        self._newest: dict[str, int] = {}  # receiver → the latest sent of what has come
        self.processes: dict[str, Process] = {}
        self.dialed: dict[tuple[str, str], Stream] = {}  # (dialer, acceptor), as the dialer sees it
        self.accepted: dict[tuple[str, str], Stream] = {}  # (dialer, acceptor), as the acceptor sees it
        self.dialing: dict[tuple[str, str], list[ev.Event]] = {}  # what waits for the stream to come up
        self.blocked: dict[tuple[str, str], float] = {}  # (from, to) → when the partition heals

    @property
    def rates(self) -> Rates:
        return self.plan.rates if self.heap.now < self.plan.faults_end else Rates()

    # ── sending ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def send(self, sender: Process, to: Party, event: ev.Event) -> None:
        name = to.id if isinstance(to, InstanceRef | GatewayRef) else "c"
        receiver = self.processes[name]
        if sender.kind == "instance" and receiver.kind == "instance":
            self._send_peer(sender, receiver, to, event)
        elif dials(sender, receiver):
            self._send_dialed(sender, receiver, event)
        else:
            stream = self.accepted.get((name, sender.name))
            if stream is not None and stream.lives[0] == incarnation_of(to, stream.lives[0]):
                self._transmit(stream, sender, receiver, event)

    def _send_dialed(self, sender: Process, receiver: Process, event: ev.Event) -> None:
        key = (sender.name, receiver.name)
        stream = self.dialed.get(key)
        if stream is not None:
            self._transmit(stream, sender, receiver, event)
        elif key in self.dialing:
            self.dialing[key].append(event)

    def _send_peer(self, sender: Process, receiver: Process, to: Party, event: ev.Event) -> None:
        """On the stream that stands between the two, whoever dialed it; else by dialing."""
        life = incarnation_of(to, 0)
        for stream, other in (
            (self.accepted.get((receiver.name, sender.name)), 0),
            (self.dialed.get((sender.name, receiver.name)), 1),
        ):
            if stream is not None and stream.lives[other] == life:
                self._transmit(stream, sender, receiver, event)
                return
        key = (sender.name, receiver.name)
        if key in self.dialing:
            self.dialing[key].append(event)
        else:
            self.dial(sender, receiver, life, [event])

    def _transmit(self, stream: Stream, sender: Process, receiver: Process, event: ev.Event) -> None:
        rng, rates, faults = self.luck(sender.name, receiver.name), self.rates, self.coverage.faults
        drop = rates.drop_abandon if isinstance(event, ev.Abandon | ev.Abandoned) else 0.0
        drop = max(drop, rates.drop) if isinstance(event, DROPPABLE) else 0.0
        if not stream.stands:
            faults["message lost with its stream"] += 1
            return
        if rng.random() < drop:
            faults["message lost alone"] += 1
            return
        self._sent += 1
        due = max(self.due(sender.name, receiver.name), stream.last.get(receiver.name, 0.0))
        stream.last[receiver.name] = due
        self.heap.at(due, self._arrive, stream, receiver, event, self._sent)
        if rng.random() < rates.duplicate:
            faults["message repeated"] += 1
            later = 0.0 if isinstance(event, REPEATED_AT_ONCE) else rng.choice([0.0, rng.uniform(0, 3)])
            self.heap.at(due + later, self._arrive, stream, receiver, event, self._sent)

    def due(self, source: str, target: str) -> float:
        rng = self.luck(source, target)
        delay = self.plan.hop_s * rng.uniform(0.5, 2)
        if rng.random() < self.rates.slow:
            self.coverage.faults["message held up"] += 1
            delay += rng.choice([0.05, 0.5, 2.5]) * rng.random()
        return max(self.heap.now, self.blocked.get((source, target), 0.0)) + delay

    def luck(self, source: str, target: str) -> random.Random:
        """The numbers of one link."""
        if (luck := self._luck.get((source, target))) is None:
            luck = self._luck[source, target] = self.plan.stream_of("link", source, target)
        return luck

    def _arrive(self, stream: Stream, receiver: Process, event: ev.Event, number: int) -> None:
        if not stream.stands:
            self.coverage.faults["message lost with its stream"] += 1
            return
        if number < self._newest.get(receiver.name, 0):
            self.coverage.faults["message overtaken on another link"] += 1
        else:
            self._newest[receiver.name] = number
        receiver.deliver(event)

    # ── streams come and go ──────────────────────────────────────────────────────────────────────────────────────────

    def dial(self, dialer: Process, acceptor: Process, life: int | None, waiting: list[ev.Event] | None = None) -> None:
        """Begin to connect; ``life``: the only incarnation to be content with."""
        key = (dialer.name, acceptor.name)
        if key in self.dialing or (key in self.dialed and self.dialed[key].dialer is dialer):
            return
        self.dialing[key] = waiting if waiting is not None else []
        self.heap.after(self.luck(*key).uniform(0.001, 0.05), self._dialed, dialer, dialer.incarnation, acceptor, life)

    def _dialed(self, dialer: Process, dialer_life: int, acceptor: Process, life: int | None) -> None:
        if not dialer.alive or dialer.incarnation != dialer_life:
            return
        key = (dialer.name, acceptor.name)
        waiting = self.dialing.pop(key, [])
        if not acceptor.alive or self._cut(*key) or life not in (None, acceptor.incarnation):
            dialer.dial_failed(acceptor, life)
            return
        stream = Stream(dialer, acceptor, (dialer.incarnation, acceptor.incarnation), since=self.heap.now)
        self.dialed[key] = stream
        if key in self.accepted:  # the acceptor had not noticed the old one break
            self._notice_accepted(key, self.accepted[key])
        self.accepted[key] = stream
        acceptor.attached(dialer)
        dialer.connected(acceptor)
        for event in waiting:
            self._transmit(stream, dialer, acceptor, event)

    def break_stream(self, stream: Stream) -> None:
        """What is under way is lost; each end notices in its own time."""
        if not stream.stands:
            return
        stream.stands = False
        self.coverage.faults["stream broken"] += 1
        key = (stream.dialer.name, stream.acceptor.name)
        self.heap.after(self.luck(*key).uniform(*NOTICE_S), self._notice_dialed, key, stream)
        self.heap.after(self.luck(*key).uniform(*NOTICE_S), self._notice_accepted, key, stream)

    def _notice_dialed(self, key: tuple[str, str], stream: Stream) -> None:
        if self.dialed.get(key) is stream:
            del self.dialed[key]
            if stream.dialer.alive and stream.dialer.incarnation == stream.lives[0]:
                stream.dialer.lost(stream.acceptor, stream.lives[1], dialed=True)

    def _notice_accepted(self, key: tuple[str, str], stream: Stream) -> None:
        if self.accepted.get(key) is stream:
            del self.accepted[key]
            if stream.acceptor.alive and stream.acceptor.incarnation == stream.lives[1]:
                stream.acceptor.lost(stream.dialer, stream.lives[0], dialed=False)

    def streams_of(self, name: str, other: str = "") -> list[Stream]:
        """Standing streams of a process, with ``other`` or with anybody."""
        standing = {id(s): s for s in [*self.dialed.values(), *self.accepted.values()] if s.stands}
        ends = {name, other} if other else set()
        return [
            s
            for s in standing.values()
            if name in (s.dialer.name, s.acceptor.name) and ends <= {s.dialer.name, s.acceptor.name}
        ]

    def died(self, process: Process) -> None:
        """Its streams break; nothing it was dialing comes up."""
        for stream in self.streams_of(process.name):
            self.break_stream(stream)
        for key in [k for k in self.dialing if k[0] == process.name]:
            del self.dialing[key]
        for key in [k for k in self.dialed if k[0] == process.name]:
            del self.dialed[key]
        for key in [k for k in self.accepted if k[1] == process.name]:
            del self.accepted[key]

    # ── partitions ───────────────────────────────────────────────────────────────────────────────────────────────────

    def partition(self, target: str, other: str, until: float, *, one_way: bool) -> None:
        """Nothing passes between ``target`` and ``other`` (or anybody) until a time."""
        self.coverage.faults["partition, one way" if one_way else "partition, both ways"] += 1
        self.heap.at(until, self._heal)
        for name in [other] if other else [n for n in self.processes if n != target]:
            self.blocked[target, name] = until
            if not one_way:
                self.blocked[name, target] = until
            for stream in self.streams_of(target, name):
                self.heap.after(self.luck(target, name).uniform(*KEEPALIVE_S), self._keepalive, stream)

    def _heal(self) -> None:
        self.coverage.faults["partition healed"] += 1

    def _keepalive(self, stream: Stream) -> None:
        if self._cut(stream.dialer.name, stream.acceptor.name):
            self.break_stream(stream)

    def _cut(self, a: str, b: str) -> bool:
        return self.heap.now < max(self.blocked.get((a, b), 0.0), self.blocked.get((b, a), 0.0))


def dials(sender: Process, receiver: Process) -> bool:
    """Whether the stream between the two is the sender's to open."""
    return receiver.kind == "controller" or (sender.kind == "gateway" and receiver.kind == "instance")


def incarnation_of(party: Party, default: int) -> int:
    return party.incarnation if isinstance(party, InstanceRef | GatewayRef) else default
