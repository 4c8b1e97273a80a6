"""The virtual clock and everything on it: arrivals, the controller, the instances, the links between them.

Equal times are ordered: steps end before messages and transfers, these before arrivals, and then by a sequence number.
Gateways are left out (each request's tokens are noted by this module) unless the caller wants every machine to run.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable
from typing import Any

from distserve.core.effects import Controller, Effect, Send, SendStage
from distserve.core.events import (
    AttemptFailed,
    DispatchAsked,
    Dispatched,
    DispatchRefused,
    GatewayAttached,
    GatewayJoined,
    Joined,
    PrefillFinished,
    RequestEnded,
    SequenceOutput,
    StageSent,
    StageStored,
    Submit,
    TokensMade,
)
from distserve.core.types import (
    Endpoint,
    GatewayRef,
    InstanceRef,
    Member,
    ModelSpec,
    Request,
    Sampling,
    Stopping,
    Timings,
    first_epoch,
)
from distserve.kv.prefix import PREFIX_RUN, chain_hashes
from distserve.sched.cluster import ClusterState
from distserve.sched.sequence import Sequence
from distserve_planner.simulation.deployment import NEVER_S, Deployment, InstanceSpec
from distserve_planner.simulation.links import Links
from distserve_planner.simulation.prompts import Prompts
from distserve_planner.simulation.result import InstanceReport, LinkReport, SimulationResult, Trail
from distserve_planner.simulation.shell import SimulatedInstance, StepWatch
from distserve_planner.workload import Workload

GATEWAY = GatewayRef("gateway", 1)
EPOCH = first_epoch(1)
GREEDY = Sampling(temperature=0.0)
MODEL = "m"
Flight = tuple[int, int, SendStage, float]
"""A stage on its way: source, destination, what was asked, bytes."""
Measured = Callable[[int, Timings, float], None]
"""Told what an instance measured of a request, and when. Only without jumps is all of it told."""
STEP, TRANSFER, MESSAGE, ARRIVAL = range(4)  # the order of equal times


def member(index: int, spec: InstanceSpec) -> Member:
    """An instance as the cluster knows it."""
    blocks = spec.kv_tokens // spec.block_size
    model = ModelSpec(MODEL, "f", 1 << 32, 1 << 40, (), 1, 1, 1, "float16", spec.block_size, blocks)
    return Member(Endpoint(InstanceRef(f"{spec.role}-{index}", 1), f"i{index}", f"i{index}"), spec.role, model)


class World:
    """One run. Build it, ``run`` it once."""

    def __init__(
        self,
        deployment: Deployment,
        workload: Workload,
        *,
        jumps: bool,
        seed: int,
        watch: StepWatch | None = None,
        measured: Measured | None = None,
    ) -> None:
        self.deployment = deployment
        self._measured = measured
        self.now = 0.0
        self.events = 0
        self.trails = [Trail(j.arrival_s, j.prompt, j.output) for j in workload.jobs]
        self._caching = any(s.config.prefix_cache for s in deployment.instances)
        self._prompts = Prompts(workload, distinct=self._caching)
        self._cluster = ClusterState(deployment.cluster)
        self._links: Links[Flight] = Links(deployment.links)
        self._heap: list[tuple[float, int, int, Any]] = []
        self._order = 0
        self._posted: deque[Send] = deque()
        self._members = [member(i, s) for i, s in enumerate(deployment.instances)]
        self._at = {m.ref: i for i, m in enumerate(self._members)}
        self._instances = [
            SimulatedInstance(i, m, s, self, jumps=jumps, seed=seed + i, watch=watch)
            for i, (m, s) in enumerate(zip(self._members, deployment.instances, strict=True))
        ]
        self._wake: list[float] = [-1.0] * len(self._instances)
        self._links_due = -1.0
        self._join()

    def _join(self) -> None:
        self._cluster.handle(GatewayJoined(GATEWAY), 0.0)
        for shell in self._instances:
            self._cluster.handle(Joined(shell.state.member, shell.state.load()), 0.0)
            shell.state.handle(GatewayAttached(GATEWAY), 0.0)

    # ── the clock ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _push(self, at: float, rank: int, payload: Any) -> None:
        self._order += 1
        heapq.heappush(self._heap, (at, rank, self._order, payload))

    def run(self) -> SimulationResult:
        """Until nothing happens any more."""
        arrivals = sorted(range(len(self.trails)), key=lambda i: (self.trails[i].arrival, i))
        coming = iter(arrivals)
        upcoming = next(coming, None)
        heap = self._heap
        while heap or upcoming is not None:
            if upcoming is not None and (not heap or self.trails[upcoming].arrival < heap[0][0]):
                self.now = self.trails[upcoming].arrival
                self._arrive(upcoming)
                upcoming = next(coming, None)
            else:
                self.now, rank, _, payload = heapq.heappop(heap)
                self._happen(rank, payload)
            self.events += 1
        return self._result()

    def _happen(self, rank: int, payload: Any) -> None:
        if rank == STEP:
            if self._wake[payload] == self.now:  # else a wake-up that was put off or brought forward
                self._wake[payload] = -1.0
                self._instances[payload].run_to(self.now)
        elif rank == TRANSFER:
            if self._links_due == self.now:
                self._links_due = -1.0
                self._transferred()
        elif isinstance(payload, Send):
            self._deliver(payload)
        elif len(payload) > 2:
            self._landed(payload)
        else:
            index, effects = payload
            for effect in effects:
                self._instances[index].release(effect, self.now)
        self._drain()

    def _drain(self) -> None:
        posted = self._posted
        while posted:
            self._deliver(posted.popleft())

    # ── what shells ask for ──────────────────────────────────────────────────────────────────────────────────────────

    def wake_at(self, instance: int, at: float) -> None:
        self._wake[instance] = at
        self._push(at, STEP, instance)

    def after(self, at: float, instance: int, effects: list[Effect]) -> None:
        self._push(at, MESSAGE, (instance, effects))

    def send(self, source: int, effect: Send, now: float) -> None:
        if now > self.now:
            self._push(now, MESSAGE, effect)
        elif isinstance(effect.to, InstanceRef):
            self._posted.append(effect)
        else:
            self._to_gateway(effect, now)

    def stage(self, source: int, effect: SendStage, now: float) -> None:
        destination = self._at[effect.ticket.destination]
        nbytes = (effect.end - effect.start) * self.deployment.instances[source].model.kv_bytes_per_token
        path = self.deployment.path(source, destination)
        self._links.start(path, nbytes, (source, destination, effect, nbytes), now)
        self._plan_links()

    def abort(self, move_id: str, now: float) -> None:
        self._links.cancel(lambda flow: flow[2].ticket.move_id == move_id, now)
        self._plan_links()

    def ended(self, instance: int, sequence: Sequence, now: float) -> None:
        self._end(int(sequence.id), now)

    # ── transfers ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _plan_links(self) -> None:
        due = self._links.next_end()
        if due is not None and due != self._links_due:
            self._links_due = due
            self._push(due, TRANSFER, None)

    def _transferred(self) -> None:
        for flow in self._links.finish(self.now):
            if self.deployment.link_latency_s:
                self._push(self.now + self.deployment.link_latency_s, MESSAGE, flow)
            else:
                self._landed(flow)
        self._plan_links()

    def _landed(self, flow: Flight) -> None:
        source, destination, effect, nbytes = flow
        ticket, size = effect.ticket, int(nbytes)
        self._instances[destination].stored(ticket.move_id, effect.end - effect.start)
        stored = StageStored(ticket.move_id, ticket.nonce, effect.start, effect.end, size)
        sent = StageSent(ticket.move_id, effect.start, effect.end, size, 0.0)
        self._instances[source].handle(sent, self.now)
        self._instances[destination].handle(stored, self.now)

    # ── requests ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _arrive(self, index: int) -> None:
        trail = self.trails[index]
        tokens = self._prompts.tokens(index)
        request = Request(str(index), MODEL, tokens, GREEDY, Stopping(trail.output), NEVER_S)
        hashes = chain_hashes(tokens, PREFIX_RUN) if self._caching else ()
        asked = DispatchAsked(
            GATEWAY, request.id, EPOCH, MODEL, trail.prompt, trail.prompt + trail.output, prefix_hashes=hashes
        )
        for effect in self._cluster.handle(asked, self.now):
            assert isinstance(effect, Send)
            match effect.event:
                case Dispatched(_, _, prefill, decode):
                    trail.prefill, trail.decode = self._at[prefill.ref], self._at[decode.ref]
                    submit = Submit(GATEWAY, request, EPOCH, decode, (), NEVER_S)
                    self._instances[trail.prefill].handle(submit, self.now)
                case DispatchRefused() as refused:
                    trail.refused = refused.message
        self._drain()

    def _to_gateway(self, effect: Send, now: float) -> None:
        match effect.event:
            case TokensMade(_, outputs):
                for output in outputs:
                    self._output(output, now)
            case AttemptFailed(_, request_id, _, _, message):
                self.trails[int(request_id)].refused = message
                self._cluster.handle(RequestEnded(GATEWAY, request_id), now)
            case _:
                pass

    def _output(self, output: SequenceOutput, now: float) -> None:
        index = int(output.request_id)
        if self._measured is not None and output.timings is not None:
            self._measured(index, output.timings, now)
        trail = self.trails[index]
        if output.first_index == 0 and trail.first > now:
            trail.first = now
            trail.cached = output.timings.cached_tokens if output.timings is not None else 0
            self._cluster.handle(PrefillFinished(GATEWAY, output.request_id, EPOCH), now)
        elif output.first_index == 0:
            trail.owned = now  # the new owner repeats the last token
        if output.finish is not None:
            self._end(index, now)

    def _end(self, index: int, now: float) -> None:
        self.trails[index].last = now
        self._cluster.handle(RequestEnded(GATEWAY, str(index)), now)

    def _deliver(self, effect: Send) -> None:
        if isinstance(effect.to, InstanceRef):
            self._instances[self._at[effect.to]].handle(effect.event, self.now)  # type: ignore[arg-type]
        elif not isinstance(effect.to, Controller):
            self._to_gateway(effect, self.now)

    # ── the end ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _result(self) -> SimulationResult:
        links = {
            name: LinkReport(capacity, self._links.carried[name], self._links.busy_s[name])
            for name, capacity in self.deployment.links.items()
        }
        counts = [
            (m.state.steps.count, m.busy_s, m.state.residents.preemptions, m.kv_peak, m.state.residents.ledger.total)
            for m in self._instances
        ]
        return SimulationResult(tuple(self.trails), tuple(report(self.trails, counts)), links, self.now, self.events)


def report(trails: list[Trail], counts: list[tuple[int, float, int, int, int]]) -> list[InstanceReport]:
    """``counts`` by instance: steps, seconds busy, preemptions, most blocks held, blocks in all."""
    prompt, output = [0] * len(counts), [0] * len(counts)
    for trail in trails:
        if trail.first < math.inf:
            prompt[trail.prefill] += trail.prompt - trail.cached
            output[trail.prefill] += 1
            output[trail.decode] += trail.output - 1
    return [
        InstanceReport(steps, busy, prompt[i], output[i], preemptions, peak, total)
        for i, (steps, busy, preemptions, peak, total) in enumerate(counts)
    ]
