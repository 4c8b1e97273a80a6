"""The three shells: what stands between a machine and the simulated world.

They do what the live shells must do and nothing more: connect, join, report, redial, and perform effects in order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from distserve.core import events as ev
from distserve.core.effects import (
    CONTROLLER,
    AbortSend,
    CloseTicket,
    Complete,
    Deliver,
    Effect,
    Fail,
    OpenTicket,
    RunStep,
    Send,
    SendStage,
)
from distserve.core.types import Endpoint, GatewayRef, InstanceRef, Member, StepItem, StepPlan, Ticket, Token
from distserve.sched.awaiting import Awaiting
from distserve.sched.cluster import ClusterState
from distserve.sched.gateway import GatewayState
from distserve.sched.instance import InstanceState
from distserve.sched.lifecycle import InPhase
from tests.faults.heap import Heap
from tests.faults.network import Network
from tests.faults.plan import Plan
from tests.faults.process import Process, Watch
from tests.faults.properties import Property, Violation
from tests.faults.truth import IN_STEP, Pool, Truth

REDIAL_S = 0.5
MISTAKES = 0.02  # share of steps given up although somebody waits for them: a hint may be wrong, the machine not


class Movers(Protocol):
    """The data plane, as an instance sees it."""

    def send(self, source: InstanceShell, stage: SendStage) -> None: ...


class Clients(Protocol):
    """Whoever reads the streams."""

    def hear(self, gateway: Process, effect: Deliver | Complete | Fail) -> None: ...


class Shell(Process):
    """What all three share: a place in the network, and redialing."""

    def __init__(self, name: str, plan: Plan, heap: Heap, network: Network, watch: Watch) -> None:
        super().__init__(name, heap, plan.offset(name), watch)
        self.plan = plan
        self.network = network
        self.kill: Callable[[Shell], None] = lambda _: None  # how the world ends this life

    def start(self) -> None:
        super().start()
        if self.incarnation > 1:
            self.watch.coverage.faults["restart as a new incarnation"] += 1

    def cut(self) -> None:
        self.watch.coverage.faults["crash between two effects"] += 1
        self.kill(self)

    def redial(self, acceptor: Process) -> None:
        self.heap.after(REDIAL_S, self._redial, self.incarnation, acceptor)

    def _redial(self, mine: int, acceptor: Process) -> None:
        if self.alive and self.incarnation == mine and (lives := self.wanted(acceptor)):
            self.network.dial(self, acceptor, lives[0])

    def wanted(self, acceptor: Process) -> tuple[int | None, ...]:
        """The life of ``acceptor`` worth a stream (None: any); empty when none is."""
        return (None,)


class ControllerShell(Shell):
    kind = "controller"
    machine: ClusterState

    def new_machine(self) -> ClusterState:
        return ClusterState(self.plan.cluster_config)

    def perform(self, effect: Effect) -> None:
        if not isinstance(effect, Send):
            super().perform(effect)
        else:
            self.network.send(self, effect.to, effect.event)

    def lost(self, other: Process, life: int, *, dialed: bool) -> None:
        if other.kind == "gateway":
            self.deliver(ev.GatewayLeft(GatewayRef(other.name, life), "stream broke"))
        else:
            self.deliver(ev.InstanceLeft(InstanceRef(other.name, life), "stream broke"))


class GatewayShell(Shell):
    """Dials the controller, and every member it hears of until that life is lost for good."""

    kind = "gateway"
    machine: GatewayState

    def __init__(self, name: str, plan: Plan, heap: Heap, network: Network, watch: Watch, clients: Clients) -> None:
        super().__init__(name, plan, heap, network, watch)
        self.clients = clients
        self._wanted: dict[str, int] = {}  # instance → the life to be connected to
        self._version = -1  # of the members last heard of, in this controller's life

    @property
    def ref(self) -> GatewayRef:
        return GatewayRef(self.name, self.incarnation)

    def new_machine(self) -> GatewayState:
        return GatewayState(self.ref, self.plan.gateway_config)

    def start(self) -> None:
        super().start()
        self._wanted, self._version = {}, -1
        self.network.dial(self, self.network.processes["c"], None)

    def perform(self, effect: Effect) -> None:
        match effect:
            case Send(to, event):
                self.network.send(self, to, event)
            case Deliver() | Complete() | Fail():
                self.clients.hear(self, effect)
            case _:
                super().perform(effect)

    def handled(self, event: ev.Event) -> None:
        super().handled(event)
        if isinstance(event, ev.ControllerFound):
            self._version = -1
        if isinstance(event, ev.MembersChanged) and event.version >= self._version:
            self._version = event.version
            for ref in event.lost:
                if self._wanted.get(ref.id) == ref.incarnation:
                    del self._wanted[ref.id]
            for member in event.members:
                self._wanted[member.ref.id] = member.ref.incarnation
                self.network.dial(self, self.network.processes[member.ref.id], member.ref.incarnation)

    def wanted(self, acceptor: Process) -> tuple[int | None, ...]:
        if acceptor.kind == "controller":
            return (None,)
        return (self._wanted[acceptor.name],) if acceptor.name in self._wanted else ()

    def connected(self, acceptor: Process) -> None:
        if acceptor.kind == "controller":
            self.deliver(ev.ControllerFound())
            self.network.send(self, CONTROLLER, ev.GatewayJoined(self.ref))
        else:
            self.deliver(ev.InstanceFound(InstanceRef(acceptor.name, acceptor.incarnation)))

    def dial_failed(self, acceptor: Process, life: int | None) -> None:
        self.redial(acceptor)

    def lost(self, other: Process, life: int, *, dialed: bool) -> None:
        if other.kind == "controller":
            self.deliver(ev.ControllerLost())
        else:
            self.deliver(ev.InstanceLost(InstanceRef(other.name, life), "stream broke"))
        self.redial(other)  # to the life that is wanted now, which may be a later one


class InstanceShell(Shell):
    """Dials the controller, joins and reports; runs steps against a pool of known content."""

    kind = "instance"
    machine: InstanceState

    def __init__(
        self, name: str, plan: Plan, heap: Heap, network: Network, watch: Watch, truths: dict[str, Truth]
    ) -> None:
        super().__init__(name, plan, heap, network, watch)
        self.truths = truths
        self.movers: Movers
        self.pool: Pool
        self.tickets: dict[str, tuple[Ticket, tuple[int, ...]]] = {}
        self.granted: dict[str, tuple[int, ...]] = {}  # of all tickets of this life, closed ones too
        self.aborted: set[str] = set()
        self.steps_run = 0
        self.member: Member
        self._node = next(n for n in plan.instances if n.name == name)
        self._luck = plan.stream_of("steps", name)
        self._stops = plan.stream_of("gives up", name)
        self._running: StepPlan | None = None
        self._awaiting: Awaiting | None = None  # who waits for it, where steps may be given up

    def new_machine(self) -> InstanceState:
        ref = InstanceRef(self.name, self.incarnation)
        endpoint = Endpoint(ref, f"{self.name}:1", f"{self.name}:2")
        self.member = Member(endpoint, self._node.role, self._node.spec)
        return InstanceState(self.member, self.plan.instance_config, seed=self.incarnation)

    def start(self) -> None:
        super().start()
        self.pool = Pool(self._node.spec.pool_blocks, self._node.spec.block_size)
        self.tickets, self.granted, self.aborted, self._running, self._awaiting = {}, {}, set(), None, None
        self.network.dial(self, self.network.processes["c"], None)
        self._report(self.incarnation)

    def ready(self) -> bool:
        return super().ready() and not (self.plan.inline_steps and self._running is not None)

    def ticks_before(self, event: ev.Event) -> bool:
        """As live: what came while a step ran, then the tick, then the step's outcome."""
        return isinstance(event, ev.StepDone | ev.StepFailed | ev.StepAbandoned)

    def deliver(self, event: ev.Event) -> None:
        self._hear(event)
        super().deliver(event)

    # ── the network ──────────────────────────────────────────────────────────────────────────────────────────────────

    def connected(self, acceptor: Process) -> None:
        if acceptor.kind == "controller":
            self.deliver(ev.ControllerFound())
            self._join()

    def handled(self, event: ev.Event) -> None:
        if isinstance(event, ev.JoinAsked):
            self._join()
        opened = {m.id for m in self.machine.arrivals.moves.values() if m.phase is InPhase.OPEN}
        if self.tickets.keys() != opened:
            have = f"tickets of {sorted(self.tickets)} are open, the machine knows {sorted(opened)}"
            raise Violation(Property.WRITES, f"{self.name}: {have}")

    def _join(self) -> None:
        self.network.send(self, CONTROLLER, ev.Joined(self.member, self.machine.load()))

    def dial_failed(self, acceptor: Process, life: int | None) -> None:
        if acceptor.kind == "controller":
            self.redial(acceptor)
        else:
            self.deliver(ev.PeerLost(InstanceRef(acceptor.name, life or 0), "no connection"))

    def attached(self, dialer: Process) -> None:
        if dialer.kind == "gateway":
            self.deliver(ev.GatewayAttached(GatewayRef(dialer.name, dialer.incarnation)))

    def lost(self, other: Process, life: int, *, dialed: bool) -> None:
        if other.kind == "controller":
            self.deliver(ev.ControllerLost())
            self.redial(other)
        elif other.kind == "gateway":
            self.deliver(ev.GatewayLost(GatewayRef(other.name, life)))
        else:
            self.deliver(ev.PeerLost(InstanceRef(other.name, life), "stream broke"))

    def beats(self) -> bool:
        """Whether the heartbeat thread runs now: a stalled step loop does not stop it."""
        return self.heap.now >= self.frozen_until

    def _report(self, life: int) -> None:
        """Heartbeats have a thread of their own: they go on while the step loop stalls."""
        if self.alive and self.incarnation == life:
            if self.beats():
                self.network.send(self, CONTROLLER, ev.Reported(self.member.ref, self.machine.load()))
            self.heap.after(self.plan.cluster_config.lease_s / 4, self._report, life)

    # ── effects ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def perform(self, effect: Effect) -> None:
        match effect:
            case Send(to, event):
                self.network.send(self, to, event)
            case RunStep(plan):
                self._begin_step(plan)
            case OpenTicket(ticket, blocks):
                if ticket.move_id in self.tickets:
                    raise Violation(Property.WRITES, f"{self.name}: ticket of {ticket.move_id} opened twice")
                self.tickets[ticket.move_id] = (ticket, blocks)
                self.granted[ticket.move_id] = blocks
            case CloseTicket(move_id):
                if self.tickets.pop(move_id, None) is None:
                    raise Violation(Property.WRITES, f"{self.name}: no ticket of {move_id} to close")
            case SendStage():
                if effect.ticket.move_id in self.aborted:
                    raise Violation(Property.WRITES, f"{self.name}: a stage of {effect.ticket.move_id} after its abort")
                self.movers.send(self, effect)
            case AbortSend(move_id):
                self.aborted.add(move_id)
            case _:
                super().perform(effect)

    def admits(self, ticket: Ticket) -> bool:
        """Whether this very ticket is open."""
        opened = self.tickets.get(ticket.move_id)
        return opened is not None and opened[0] == ticket

    def granted_blocks(self, ticket: Ticket) -> tuple[int, ...]:
        """The table that was opened for a ticket."""
        return self.granted[ticket.move_id]

    def may_write(self, owner: str, blocks: tuple[int, ...], start: int, end: int) -> None:
        """Raises unless the ledger lets ``owner`` write positions ``[start, end)`` of this very table."""
        ledger = self.machine.residents.ledger
        if not ledger.holds(owner) or ledger.table(owner)[: len(blocks)] != blocks:
            raise Violation(Property.WRITES, f"{self.name}: {owner} writes into blocks {blocks} that it does not hold")
        if ledger.writable_from(owner) > start or len(blocks) * ledger.block_size < end:
            what = f"{owner} writes [{start}, {end}) into shared or missing blocks"
            raise Violation(Property.WRITES, f"{self.name}: {what}")

    # ── the engine ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _begin_step(self, plan: StepPlan) -> None:
        if self._running is not None:
            raise Violation(Property.STEP, f"{self.name}: step {plan.number} while step {self._running.number} runs")
        if not plan.items or len({i.request_id for i in plan.items}) != len(plan.items):
            raise Violation(Property.STEP, f"{self.name}: step {plan.number} is empty or names a sequence twice")
        self._running = plan
        for item in plan.items:
            self._check_item(item)
            self.may_write(f"s:{item.request_id}", item.blocks, item.start, item.start + len(item.token_ids))
        for item in plan.items:
            self.pool.write(item.blocks, item.start, [IN_STEP] * len(item.token_ids))
        duration = self.plan.step_s * self._luck.uniform(0.5, 1.5) + plan.tokens * 1e-5
        self.heap.after(duration, self._end_step, self.incarnation, plan)
        if self.plan.gives_up:
            self._awaiting = self.machine.awaiting()
            for event in list(self.inbox):
                self._hear(event)
            if self._stops.random() < MISTAKES:
                self.heap.after(duration * self._stops.random(), self._give_up, self.incarnation, plan, "by mistake")

    def _check_item(self, item: StepItem) -> None:
        """The right tokens, at the right place, over exactly the right KV."""
        truth = self.truths[item.request_id]
        end = item.start + len(item.token_ids)
        what = f"{self.name} computes [{item.start}, {end}) of {item.request_id}"
        if not item.token_ids or item.token_ids != truth.tokens(item.start, end):
            raise Violation(Property.STEP, f"{what}: not its tokens")
        if item.sample and item.output_index != end - truth.prompt_len:
            raise Violation(Property.STEP, f"{what}: samples index {item.output_index} after {end - truth.prompt_len}")
        if item.sample and item.output_index >= len(truth.output):
            raise Violation(Property.STEP, f"{what}: samples past its end")
        if item.sample and truth.output[item.output_index] in item.banned:
            raise Violation(Property.STEP, f"{what}: index {item.output_index} may be a stop token, yet it is banned")
        self.pool.must_hold(what, item.blocks, 0, item.start, truth.chain)

    def _still_held(self, what: str, item: StepItem) -> None:
        """The blocks that a step writes belong to its sequence, or to what is left of it, until the step is done."""
        ledger = self.machine.residents.ledger
        size = ledger.block_size
        written = item.blocks[item.start // size : -(-(item.start + len(item.token_ids)) // size)]
        names = (f"s:{item.request_id}", f":{item.request_id}")
        if not any(set(written) <= set(ledger.table(o)) for o in ledger.owners() if o.endswith(names)):
            raise Violation(Property.STEP, f"{what}: its blocks {written} were given away while it ran")

    def _hear(self, event: ev.Event) -> None:
        """What comes in while a step runs may leave it to nobody; it ends soon then, at the next layer."""
        if self.alive and self._awaiting is not None and self._awaiting.hear(event):  # type: ignore[arg-type]
            soon = self.plan.step_s / 10 * self._stops.random()
            self.heap.after(soon, self._give_up, self.incarnation, self._running, "for nobody")

    def _give_up(self, life: int, plan: StepPlan, why: str) -> None:
        """What the step has written stays as it is: nobody may take it for KV."""
        if self._ends(life, plan):
            self.watch.coverage.situations[f"step given up: {why}"] += 1
            for item in plan.items:
                self._still_held(f"{self.name} gives up step {plan.number} with {item.request_id}", item)
            self.deliver(ev.StepAbandoned(plan.number))

    def _ends(self, life: int, plan: StepPlan) -> bool:
        """Whether this step runs; if so, it does no more."""
        if not self.alive or self.incarnation != life or self._running is not plan:
            return False
        self._running = self._awaiting = None
        self.steps_run += 1
        return True

    def _end_step(self, life: int, plan: StepPlan) -> None:
        if not self._ends(life, plan):
            return
        failed = self._luck.random() < self.network.rates.step_fails
        self.watch.coverage.faults["step failed"] += failed
        tokens = []
        for item in plan.items:
            truth = self.truths[item.request_id]
            end = item.start + len(item.token_ids)
            what = f"{self.name} ends step {plan.number} with [{item.start}, {end}) of {item.request_id}"
            self.pool.must_hold(what, item.blocks, 0, item.start, truth.chain)
            if self.pool.read(item.blocks, item.start, end) != [IN_STEP] * len(item.token_ids):
                raise Violation(Property.STEP, f"{what}: somebody else wrote into its blocks")
            self._still_held(what, item)
            if not failed:
                self.pool.write(item.blocks, item.start, truth.chain[item.start : end])
            if item.sample:
                tokens.append((item.request_id, Token(truth.output[item.output_index])))
        done = ev.StepFailed(plan.number, "out of memory") if failed else ev.StepDone(plan.number, tuple(tokens), 0.0)
        self.deliver(done)  # behind what came while it ran: ahead of it, one step after another would starve the rest
