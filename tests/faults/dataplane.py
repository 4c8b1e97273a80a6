"""The data plane: copies KV content between pools, late, twice, wrongly or not at all, but never past a fence.

A stage is gathered from the source's blocks some time after it is asked for, flies, and is verified and scattered at
the destination if its ticket is open there. After ``CloseTicket`` nothing is scattered, after ``AbortSend`` nothing is
gathered; what was gathered before may still arrive, and reports of it may still be in an inbox.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from distserve.core.effects import SendStage
from distserve.core.events import StageCorrupt, StageFailed, StageSent, StageStored
from distserve.core.types import Ticket
from tests.faults.heap import Heap
from tests.faults.network import Network
from tests.faults.plan import Plan
from tests.faults.shells import InstanceShell
from tests.faults.truth import Truth, Violation

BYTES_A_TOKEN = 256
STAGE_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Fate:
    """What becomes of one stage."""

    corrupt: bool = False
    lost: bool = False
    ack_lost: bool = False
    twice: bool = False
    late: bool = False
    answered: bool = False  # the source has been told that it failed


class DataPlane:
    """All links between pools."""

    def __init__(self, plan: Plan, heap: Heap, rng: random.Random, network: Network, truths: dict[str, Truth]) -> None:
        self.plan = plan
        self.heap = heap
        self.rng = rng
        self.network = network
        self.truths = truths
        self.stages = 0
        self.tokens_moved = 0
        self._last: dict[tuple[str, str], float] = {}  # a link is in order

    def send(self, source: InstanceShell, stage: SendStage) -> None:
        self.stages += 1
        gather_at = self.heap.now + self.plan.stage_s * self.rng.random()
        self.heap.at(gather_at, self._gather, source, source.incarnation, stage)

    def _gather(self, source: InstanceShell, life: int, stage: SendStage) -> None:
        ticket = stage.ticket
        if not source.alive or source.incarnation != life or ticket.move_id in source.aborted:
            return
        what = f"{source.name} sends [{stage.start}, {stage.end}) of {ticket.move_id}"
        truth = self.truths[ticket.request_id]
        source.pool.must_hold(what, stage.blocks, stage.start, stage.end, truth.chain)
        values = source.pool.read(stage.blocks, stage.start, stage.end)
        fate = self._fate()
        link = (source.name, ticket.destination.id)
        begins = max(self.heap.now, self._last.get(link, 0.0))  # its time counts from when the link gets to it
        due = max(self.network.due(*link), begins) + self.plan.stage_s * self.rng.random()
        self._last[link] = due
        if fate.late:
            due += self.rng.uniform(1, 15)
        failed = StageFailed(ticket.move_id, "timed out", True)
        if fate.lost or due > begins + STAGE_TIMEOUT_S:  # every stage is answered in time; it may yet arrive
            self._report(source, life, begins + STAGE_TIMEOUT_S - self.heap.now, failed)
            fate = replace(fate, answered=True)
        if fate.lost:
            return
        self.heap.at(due, self._scatter, source, life, stage, values, fate)
        if fate.twice:
            self.heap.at(due + self.rng.uniform(0, 2), self._scatter, source, life, stage, values, fate)

    def _fate(self) -> Fate:
        rng, rates = self.rng, self.network.rates
        draws = (rates.corrupt, rates.lose_stage, rates.lose_ack, rates.twice, rates.late)
        return Fate(*(rng.random() < rate for rate in draws))

    def _scatter(self, source: InstanceShell, life: int, stage: SendStage, values: list[int], fate: Fate) -> None:
        ticket = stage.ticket
        target = self.network.processes[ticket.destination.id]
        assert isinstance(target, InstanceShell)
        alive = target.alive and target.incarnation == ticket.destination.incarnation
        opened = target.tickets.get(ticket.move_id) if alive else None
        answer: StageSent | StageFailed = StageFailed(ticket.move_id, "no such ticket", True)
        delay = self.plan.hop_s
        if not alive:
            answer, delay = StageFailed(ticket.move_id, "the destination is gone", True), self.rng.uniform(0, 2)
        elif opened is None or opened[0] != ticket:
            pass
        elif fate.corrupt:
            self._report(target, target.incarnation, 0.0, StageCorrupt(ticket.move_id, ticket.nonce, "wrong checksum"))
            answer = StageFailed(ticket.move_id, "wrong checksum", True)
        else:
            self._store(target, ticket, stage, values, opened[1])
            answer = StageSent(ticket.move_id, stage.start, stage.end, len(values) * BYTES_A_TOKEN, self.plan.stage_s)
            if fate.ack_lost:
                answer, delay = StageFailed(ticket.move_id, "timed out", True), STAGE_TIMEOUT_S
        if not fate.answered:
            self._report(source, life, delay, answer)

    def _store(
        self, target: InstanceShell, ticket: Ticket, stage: SendStage, values: list[int], blocks: tuple[int, ...]
    ) -> None:
        if stage.start < ticket.have_tokens or stage.end > ticket.total_tokens:
            raise Violation(f"{ticket.move_id}: [{stage.start}, {stage.end}) is not what its ticket grants")
        target.may_write(f"m:{ticket.move_id}", blocks, stage.start, stage.end)
        target.pool.write(blocks, stage.start, values)
        self.tokens_moved += len(values)
        stored = StageStored(ticket.move_id, ticket.nonce, stage.start, stage.end, len(values) * BYTES_A_TOKEN)
        self._report(target, target.incarnation, self.plan.hop_s * self.rng.random(), stored)

    def _report(
        self, to: InstanceShell, life: int, delay: float, event: StageSent | StageFailed | StageStored | StageCorrupt
    ) -> None:
        self.heap.after(delay, self._tell, to, life, event)

    def _tell(self, to: InstanceShell, life: int, event: StageSent | StageFailed | StageStored | StageCorrupt) -> None:
        if to.alive and to.incarnation == life:
            to.deliver(event)
