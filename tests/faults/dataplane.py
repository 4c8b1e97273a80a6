"""The data plane: copies KV content between pools, late, twice, wrongly or not at all, but never past a fence.

A stage is gathered from the source's blocks some time after it is asked for, flies, lands in the destination's staging,
is verified against its header and scattered if its ticket is open there. Staging is reused: a copy that comes late or
twice lands where another stage's bytes may wait to be verified. After ``CloseTicket`` nothing is scattered, after
``AbortSend`` nothing is gathered; what was gathered before may still arrive, and reports may still be in an inbox.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

from distserve.core.effects import SendStage
from distserve.core.events import StageCorrupt, StageFailed, StageSent, StageStored
from distserve.core.types import Ticket
from tests.faults.coverage import Coverage
from tests.faults.heap import Heap
from tests.faults.instances import InstanceShell
from tests.faults.network import Network
from tests.faults.plan import Plan
from tests.faults.properties import Property, Violation
from tests.faults.truth import Truth

BYTES_A_TOKEN = 256
STAGE_TIMEOUT_S = 5.0
VERIFY_SHARE = 0.3  # of a stage's time, its bytes wait in staging


@dataclass(frozen=True)
class Fate:
    """What becomes of one stage."""

    flip: bool = False
    truncate: bool = False
    lost: bool = False
    ack_lost: bool = False
    twice: bool = False
    late: bool = False


@dataclass(eq=False)
class Flight:
    """One stage under way."""

    source: InstanceShell
    life: int
    stage: SendStage
    values: tuple[int, ...]
    fate: Fate
    slot: int
    answered: bool = False  # the source has been told that it failed

    @property
    def ticket(self) -> Ticket:
        return self.stage.ticket


@dataclass
class Staging:
    """The buffers of one life of a destination. A slot belongs to one flight; late bytes do not ask whose it is."""

    held: dict[int, Flight] = field(default_factory=dict)
    content: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def take(self, flight: Flight) -> int:
        slot = next(n for n in range(len(self.held) + 1) if n not in self.held)
        self.held[slot] = flight
        return slot

    def give_back(self, flight: Flight) -> None:
        if self.held.get(flight.slot) is flight:
            del self.held[flight.slot]


class DataPlane:
    """All links between pools."""

    def __init__(self, plan: Plan, heap: Heap, network: Network, truths: dict[str, Truth], coverage: Coverage) -> None:
        self.plan = plan
        self.heap = heap
        self.network = network
        self.truths = truths
        self.faults = coverage.faults
        self.tokens_moved = 0
        self.last_moved = 0.0
        self._last: dict[tuple[str, str], float] = {}  # a link is in order
        self._luck: dict[tuple[str, str], Random] = {}
        self._staging: dict[tuple[str, int], Staging] = {}  # (instance, life)

    def _numbers(self, link: tuple[str, str]) -> Random:
        if (luck := self._luck.get(link)) is None:
            luck = self._luck[link] = self.plan.stream_of("data", *link)
        return luck

    # ── at the source ────────────────────────────────────────────────────────────────────────────────────────────────

    def send(self, source: InstanceShell, stage: SendStage) -> None:
        luck = self._numbers((source.name, stage.ticket.destination.id))
        self.heap.after(self.plan.stage_s * luck.random(), self._gather, source, source.incarnation, stage)

    def _gather(self, source: InstanceShell, life: int, stage: SendStage) -> None:
        ticket = stage.ticket
        if not source.alive or source.incarnation != life or ticket.move_id in source.aborted:
            return
        what = f"{source.name} sends [{stage.start}, {stage.end}) of {ticket.move_id}"
        truth = self.truths[ticket.request_id]
        source.pool.must_hold(what, stage.blocks, stage.start, stage.end, truth.chain)
        values = tuple(source.pool.read(stage.blocks, stage.start, stage.end))
        link = (source.name, ticket.destination.id)
        luck = self._numbers(link)
        flight = Flight(source, life, stage, values, self._fate(luck), 0)
        target = (ticket.destination.id, ticket.destination.incarnation)
        staging = self._staging.setdefault(target, Staging())
        flight.slot = staging.take(flight)
        begins = max(self.heap.now, self._last.get(link, 0.0))  # its time counts from when the link gets to it
        due = max(self.network.due(*link), begins) + self.plan.stage_s * luck.random()
        self._last[link] = due
        if flight.fate.late:
            due += luck.uniform(1, 15)
        if flight.fate.lost or due > begins + STAGE_TIMEOUT_S:  # every stage is answered in time; it may yet arrive
            self.heap.at(begins + STAGE_TIMEOUT_S, self._give_up, flight, staging)
        if flight.fate.lost:
            return
        self.heap.at(due, self._land, flight, staging)
        if flight.fate.twice:
            self.heap.at(due + luck.uniform(0, 2), self._land, flight, staging)

    def _fate(self, luck: Random) -> Fate:
        rates = self.network.rates
        draws = (rates.flip, rates.truncate, rates.lose_stage, rates.lose_ack, rates.twice, rates.late)
        fate = Fate(*(luck.random() < rate for rate in draws))
        names = ("bit flipped", "truncated", "lost", "answer lost", "came twice", "came late")
        struck = (fate.flip, fate.truncate, fate.lost, fate.ack_lost, fate.twice, fate.late)
        for name, happened in zip(names, struck, strict=True):
            self.faults[f"stage: {name}"] += happened
        return fate

    def _give_up(self, flight: Flight, staging: Staging) -> None:
        """The source has waited long enough; its staging serves others from here on."""
        flight.answered = True
        staging.give_back(flight)
        self._tell(flight.source, flight.life, StageFailed(flight.ticket.move_id, "timed out", True))

    # ── at the destination ───────────────────────────────────────────────────────────────────────────────────────────

    def _land(self, flight: Flight, staging: Staging) -> None:
        """Bytes arrive in staging, whoever uses that by now."""
        self.last_moved = self.heap.now
        other = staging.held.get(flight.slot)
        self.faults["stage: wrote into reused staging"] += other not in (None, flight)
        values = flight.values
        if flight.fate.flip:
            values = (values[0] ^ 4, *values[1:])
        elif flight.fate.truncate:
            values = values[:-1]
        staging.content[flight.slot] = values
        luck = self._numbers((flight.source.name, flight.ticket.destination.id))
        self.heap.after(self.plan.stage_s * VERIFY_SHARE * luck.random(), self._verify, flight, staging)

    def _verify(self, flight: Flight, staging: Staging) -> None:
        ticket, stage = flight.ticket, flight.stage
        staging.give_back(flight)
        target = self.network.processes[ticket.destination.id]
        assert isinstance(target, InstanceShell)
        alive = target.alive and target.incarnation == ticket.destination.incarnation
        answer: StageSent | StageFailed = StageFailed(ticket.move_id, "no such ticket", True)
        delay = self.plan.hop_s
        if not alive:
            luck = self._numbers((flight.source.name, target.name))
            answer, delay = StageFailed(ticket.move_id, "the destination is gone", True), luck.uniform(0, 2)
        elif not target.admits(ticket):
            pass
        elif not sound(staging.content[flight.slot], flight.values):
            self._report(target, target.incarnation, 0.0, StageCorrupt(ticket.move_id, ticket.nonce, "wrong checksum"))
            answer = StageFailed(ticket.move_id, "wrong checksum", True)
        else:
            self._store(target, ticket, stage, staging.content[flight.slot])
            nbytes = len(flight.values) * BYTES_A_TOKEN
            answer = StageSent(ticket.move_id, stage.start, stage.end, nbytes, self.plan.stage_s)
            if flight.fate.ack_lost:
                luck = self._numbers((flight.source.name, target.name))
                answer = StageFailed(ticket.move_id, "link broke", True)
                delay = luck.choice([0.0, luck.uniform(0, STAGE_TIMEOUT_S)])
        if not flight.answered:
            self._report(flight.source, flight.life, delay, answer)

    def _store(self, target: InstanceShell, ticket: Ticket, stage: SendStage, values: tuple[int, ...]) -> None:
        if stage.start < ticket.have_tokens or stage.end > ticket.total_tokens:
            what = f"{ticket.move_id}: [{stage.start}, {stage.end}) is not what its ticket grants"
            raise Violation(Property.WRITES, what)
        blocks = target.granted_blocks(ticket)
        target.may_write(f"m:{ticket.move_id}", blocks, stage.start, stage.end)
        target.pool.write(blocks, stage.start, values)
        self.tokens_moved += len(values)
        stored = StageStored(ticket.move_id, ticket.nonce, stage.start, stage.end, len(values) * BYTES_A_TOKEN)
        luck = self._numbers((ticket.source.id, target.name))
        self._report(target, target.incarnation, self.plan.hop_s * luck.random(), stored)

    def _report(
        self, to: InstanceShell, life: int, delay: float, event: StageSent | StageFailed | StageStored | StageCorrupt
    ) -> None:
        self.heap.after(delay, self._tell, to, life, event)

    def _tell(self, to: InstanceShell, life: int, event: StageSent | StageFailed | StageStored | StageCorrupt) -> None:
        if to.alive and to.incarnation == life:
            to.deliver(event)


def sound(landed: tuple[int, ...], sent: tuple[int, ...]) -> bool:
    """What a checksum and a length in the header tell: whether these are the bytes that were sent."""
    return landed == sent
