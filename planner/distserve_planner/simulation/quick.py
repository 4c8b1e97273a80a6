"""The virtual clock over counted instances (``tally``): the events of ``world`` in order, at a fraction of the cost.

Dispatch is the production policy over the production ``Standing``. What the counts do not cover is told by ``covers``
or raised as ``NotCounted``; the caller then runs the machines.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from distserve.core.types import Load, Role
from distserve.sched.dispatch import Standing, pair
from distserve_planner.simulation.decoding import Counted
from distserve_planner.simulation.deployment import OPEN_DOOR, Deployment
from distserve_planner.simulation.links import Links
from distserve_planner.simulation.result import InstanceReport, LinkReport, SimulationResult, Trail
from distserve_planner.simulation.shell import StepWatch
from distserve_planner.simulation.tally import Action, MoveIn, Tally
from distserve_planner.simulation.world import ARRIVAL, MESSAGE, STEP, TRANSFER, member, report
from distserve_planner.workload import Workload

assert STEP < TRANSFER < MESSAGE < ARRIVAL


def covers(deployment: Deployment) -> bool:
    """Whether counts can stand for the machines: nothing is shared, nobody is turned away."""
    placed = replace(deployment.cluster, local_prefill_tokens=0, overflow_prefill_tokens=0)
    return placed == OPEN_DOOR and not any(s.config.prefix_cache for s in deployment.instances)


class QuickWorld:
    """One run. Build it, ``run`` it once. Raises NotCounted."""

    def __init__(self, deployment: Deployment, workload: Workload, *, watch: StepWatch | None = None) -> None:
        self.deployment = deployment
        self.now = 0.0
        self.events = 0
        self.trails = [Trail(j.arrival_s, j.prompt, j.output) for j in workload.jobs]
        self._links: Links[tuple[Counted, int]] = Links(deployment.links)
        self._links_due = -1.0
        self._heap: list[tuple[float, int, int, Any]] = []
        self._order = 0
        self._posted: deque[tuple[Callable[..., Any], tuple[Any, ...]]] = deque()
        self._moves: dict[int, MoveIn] = {}  # request → its move at the destination
        self._instances: list[Tally] = []
        self._standings: list[Standing] = []
        for i, spec in enumerate(deployment.instances):
            known = member(i, spec)
            self._instances.append(Tally(i, spec, self, watch))
            load = Load(kv_free=known.spec.pool_blocks, kv_total=known.spec.pool_blocks)
            self._standings.append(Standing(known, load, i + 1, 0.0))
        self._prefills = [s for s in self._standings if s.member.role.can_prefill]
        self._decodes = [s for s in self._standings if s.member.role.can_decode]
        self._least = min(s.member.spec.max_sequence_tokens for s in self._standings)
        self._keys = [str(i) for i in range(len(self.trails))]
        self._wake = [-1.0] * len(self._instances)
        self._kv_bytes = [s.model.kv_bytes_per_token for s in deployment.instances]

    # ── the clock ────────────────────────────────────────────────────────────────────────────────────────────────────

    def run(self) -> SimulationResult:
        """Until nothing happens any more."""
        arrivals = sorted(range(len(self.trails)), key=lambda i: (self.trails[i].arrival, i))
        heap, posted, instances = self._heap, self._posted, self._instances
        place, count = 0, len(arrivals)
        due = self.trails[arrivals[0]].arrival
        while heap or place < count:
            if place < count and (not heap or due < heap[0][0]):
                self.now = due
                self._arrive(arrivals[place])
                place += 1
                due = self.trails[arrivals[place]].arrival if place < count else due
            else:
                now, rank, _, payload = heapq.heappop(heap)
                self.now = now
                if rank == STEP:
                    if self._wake[payload] == now:
                        self._wake[payload] = -1.0
                        instances[payload].run_to(now)
                elif rank == TRANSFER:
                    if self._links_due == now:
                        self._links_due = -1.0
                        self._transferred()
                elif isinstance(payload[0], Counted):
                    self._landed(*payload)
                else:
                    index, actions = payload
                    instances[index].release(actions, now)
            while posted:
                act, arguments = posted.popleft()
                act(*arguments, self.now)
            self.events += 1
        return self._result()

    def _push(self, at: float, rank: int, payload: Any) -> None:
        self._order += 1
        heapq.heappush(self._heap, (at, rank, self._order, payload))

    # ── what instances ask for ───────────────────────────────────────────────────────────────────────────────────────

    def wake_at(self, instance: int, at: float) -> None:
        self._wake[instance] = at
        self._order += 1
        heapq.heappush(self._heap, (at, STEP, self._order, instance))

    def after(self, at: float, instance: int, actions: list[Action]) -> None:
        self._push(at, MESSAGE, (instance, actions))

    def ask(self, source: int, sequence: Counted, now: float) -> None:
        self._posted.append((self._asked, (sequence, source)))

    def _asked(self, sequence: Counted, source: int, now: float) -> None:
        self._instances[sequence.destination].asked(sequence, source, now)

    def grant(self, move: MoveIn) -> None:
        self._moves[move.sequence.index] = move
        self._posted.append((self._instances[move.source].granted, (move.sequence,)))

    def commit(self, sequence: Counted) -> None:
        move = self._moves[sequence.index]
        self._posted.append((self._instances[sequence.destination].commit_asked, (move,)))

    def committed(self, move: MoveIn, now: float) -> None:
        index = move.sequence.index
        del self._moves[index]
        self.trails[index].owned = now
        self._posted.append((self._instances[move.source].gone, (move.sequence,)))

    def call_off(self, sequence: Counted) -> None:
        self._links.cancel(lambda flow: flow[0] is sequence, self.now)
        self._plan_links()
        self._moves.pop(sequence.index, None)
        self._posted.append((self._instances[sequence.destination].called_off, (sequence,)))

    def first(self, index: int, ends: bool, now: float) -> None:
        trail = self.trails[index]
        if trail.first > now:
            trail.first = now
            self._standings[trail.prefill].prefilled(self._keys[index])
        if ends:
            self.ended(index, now)

    def ended(self, index: int, now: float) -> None:
        trail = self.trails[index]
        trail.last = now
        key = self._keys[index]
        self._standings[trail.prefill].close(key)
        self._standings[trail.decode].close(key)

    # ── transfers ────────────────────────────────────────────────────────────────────────────────────────────────────

    def stage(self, source: int, sequence: Counted, start: int, end: int, now: float) -> None:
        path = self.deployment.path(source, sequence.destination)
        self._links.start(path, (end - start) * self._kv_bytes[source], (sequence, end - start), now)
        self._plan_links()

    def _plan_links(self) -> None:
        due = self._links.next_end()
        if due is not None and due != self._links_due:
            self._links_due = due
            self._push(due, TRANSFER, None)

    def _transferred(self) -> None:
        for sequence, tokens in self._links.finish(self.now):
            if self.deployment.link_latency_s:
                self._push(self.now + self.deployment.link_latency_s, MESSAGE, (sequence, tokens))
            else:
                self._landed(sequence, tokens)
        self._plan_links()

    def _landed(self, sequence: Counted, tokens: int) -> None:
        move = self._moves.get(sequence.index)
        if move is not None:  # else its sequence ended meanwhile
            self._instances[sequence.destination].stored(move, tokens, self.now)

    # ── requests ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _arrive(self, index: int) -> None:
        trail = self.trails[index]
        total = trail.prompt + trail.output
        prefills, decodes = self._prefills, self._decodes
        if total > self._least:
            decodes = [s for s in decodes if s.member.spec.max_sequence_tokens >= total]
            prefills = [s for s in prefills if s.member.spec.max_sequence_tokens >= self._need(s, trail)]
            if not prefills or not decodes:
                largest = max(s.member.spec.max_sequence_tokens for s in self._decodes)
                trail.refused = f"the request needs room for {total} tokens; the largest instance holds {largest}"
                return
        prefill, decode, _ = pair(prefills, decodes, trail.prompt, (), self.deployment.cluster)
        key = self._keys[index]
        prefill.send_prompt(key, trail.prompt)
        decode.send_decode(key, total)
        trail.prefill, trail.decode = prefill.joined_order - 1, decode.joined_order - 1
        destination = trail.decode if decode is not prefill else -1
        self._instances[trail.prefill].submit(index, trail.prompt, trail.output, destination, self.now)

    def _need(self, standing: Standing, trail: Trail) -> int:
        return trail.prompt + trail.output if standing.member.role is Role.MIXED else trail.prompt

    # ── the end ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _result(self) -> SimulationResult:
        links = {
            name: LinkReport(capacity, self._links.carried[name], self._links.busy_s[name])
            for name, capacity in self.deployment.links.items()
        }
        reports: list[InstanceReport] = report(
            self.trails, [(i.steps, i.busy_s, i.preemptions, i.kv_peak, i.total) for i in self._instances]
        )
        return SimulationResult(tuple(self.trails), tuple(reports), links, self.now, self.events)
