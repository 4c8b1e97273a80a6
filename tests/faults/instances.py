"""An instance's shell in the simulated world: joins and reports, performs effects, and runs steps against a pool whose
content is known. Steps end in the order in which they were asked for; several may be outstanding, all of them writing.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Protocol

from distserve.core import events as ev
from distserve.core.effects import CONTROLLER, AbortSend, CloseTicket, Effect, OpenTicket, RunStep, Send, SendStage
from distserve.core.types import Endpoint, GatewayRef, InstanceRef, Member, StepItem, StepPlan, Ticket, Token
from distserve.sched.awaiting import Awaiting
from distserve.sched.instance import InstanceState
from distserve.sched.lifecycle import InPhase
from tests.faults.heap import Heap
from tests.faults.network import Network
from tests.faults.plan import Plan
from tests.faults.process import Process, Watch
from tests.faults.properties import Property, Violation
from tests.faults.shells import Shell
from tests.faults.truth import BEYOND, IN_STEP, Pool, Truth

MISTAKES = 0.02  # share of steps given up although somebody waits for them: a hint may be wrong, the machine not


class Movers(Protocol):
    """The data plane, as an instance sees it."""

    def send(self, source: InstanceShell, stage: SendStage) -> None: ...


@dataclass(slots=True, eq=False)
class Step:
    """One that was asked for and has not ended. ``void``: one before it did not end."""

    plan: StepPlan
    void: bool
    leaving: bool = False  # it is about to be given up


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
        self._outstanding: deque[Step] = deque()  # oldest first
        self._busy_until = 0.0  # with these
        self._unheard: deque[bool] = deque()  # outcomes under way to the machine: whether the step ended well
        self._awaiting: Awaiting | None = None  # who waits for the steps, where they may be given up

    def new_machine(self) -> InstanceState:
        ref = InstanceRef(self.name, self.incarnation)
        endpoint = Endpoint(ref, f"{self.name}:1", f"{self.name}:2")
        self.member = Member(endpoint, self._node.role, self._node.spec)
        return InstanceState(self.member, self.plan.instance_config, seed=self.incarnation)

    def start(self) -> None:
        super().start()
        self.pool = Pool(self._node.spec.pool_blocks, self._node.spec.block_size)
        self.tickets, self.granted, self.aborted, self._awaiting = {}, {}, set(), None
        self._outstanding, self._unheard = deque(), deque()
        self.network.dial(self, self.network.processes["c"], None)
        self._report(self.incarnation)

    def ready(self) -> bool:
        waits = self.plan.inline_steps and self._outstanding and not self._unheard
        return super().ready() and not waits

    def ticks_before(self, event: ev.Event) -> bool:
        """As live: what came while a step ran, then the tick, then the step's outcome."""
        return isinstance(event, ev.StepDone | ev.StepFailed | ev.StepAbandoned)

    def deliver(self, event: ev.Event) -> None:
        self._hear(event)
        super().deliver(event)

    def handle(self, event: ev.Event) -> None:
        if isinstance(event, ev.StepDone | ev.StepFailed | ev.StepAbandoned):
            self._unheard.popleft()
        super().handle(event)

    # ── the network ──────────────────────────────────────────────────────────────────────────────────────────────────

    def connected(self, acceptor: Process) -> None:
        if acceptor.kind == "controller":
            self.deliver(ev.ControllerFound())
            self._join()

    def handled(self, event: ev.Event) -> None:
        if isinstance(event, ev.JoinAsked):
            self._join()
        self._await()
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
        most = self.plan.instance_config.steps_in_flight
        if len(self._outstanding) + len(self._unheard) >= most:
            raise Violation(Property.STEP, f"{self.name}: step {plan.number} beside {most} that are outstanding")
        if not plan.items or len({i.request_id for i in plan.items}) != len(plan.items):
            raise Violation(Property.STEP, f"{self.name}: step {plan.number} is empty or names a sequence twice")
        step = Step(plan, void=not all(self._unheard) or any(s.void for s in self._outstanding))
        for item in plan.items:
            self._check_item(item, void=step.void)
            self.may_write(f"s:{item.request_id}", item.blocks, item.start, item.start + len(item.token_ids))
        for item in plan.items:
            self.pool.write(item.blocks, item.start, [IN_STEP] * len(item.token_ids))
        self.watch.coverage.situations["steps in flight together"] += bool(self._outstanding)
        duration = self.plan.step_s * self._luck.uniform(0.5, 1.5) + plan.tokens * 1e-5
        delay = duration + (self._busy_until - self.heap.now if self._outstanding else 0.0)
        self._busy_until = self.heap.now + delay
        self._outstanding.append(step)
        self.heap.after(delay, self._end_step, self.incarnation, step)
        if self.plan.gives_up and self._stops.random() < MISTAKES:
            self.heap.after(duration * self._stops.random(), self._give_up, self.incarnation, step, "by mistake")

    def _check_item(self, item: StepItem, *, void: bool) -> None:
        """The right tokens, at the right place, over exactly the right KV, unless the step counts for nothing."""
        truth = self.truths[item.request_id]
        end = item.start + len(item.token_ids)
        what = f"{self.name} computes [{item.start}, {end}) of {item.request_id}"
        before = [i for step in self._outstanding for i in step.plan.items if i.request_id == item.request_id]
        if item.follows:
            self._check_follows(what, item, before, truth)
        elif not item.token_ids or item.token_ids != truth.tokens(item.start, end):
            raise Violation(Property.STEP, f"{what}: not its tokens")
        if item.sample and item.output_index != end - truth.prompt_len:
            raise Violation(Property.STEP, f"{what}: samples index {item.output_index} after {end - truth.prompt_len}")
        if item.sample and item.output_index >= len(truth.output) and not item.follows:
            raise Violation(Property.STEP, f"{what}: samples past its end")
        if item.sample and truth.output[item.output_index : item.output_index + 1] in [(id,) for id in item.banned]:
            raise Violation(Property.STEP, f"{what}: index {item.output_index} may be a stop token, yet it is banned")
        if item.sampling.needs_history and item.output != truth.output[: len(item.output)]:
            raise Violation(Property.STEP, f"{what}: penalties over {len(item.output)} tokens that are not its own")
        if item.sample and item.sampling.needs_history and len(item.output) != item.output_index:
            raise Violation(Property.STEP, f"{what}: penalties over {len(item.output)} of {item.output_index} tokens")
        known = 0 if void else min([item.start, *(i.start for i in before)])  # from there on outstanding steps write
        self.pool.must_hold(what, item.blocks, 0, known, truth.chain)

    def _check_follows(self, what: str, item: StepItem, before: list[StepItem], truth: Truth) -> None:
        """A step that is outstanding samples this very token, and the sequence may go on after it, for all we know."""
        self.watch.coverage.situations["next token planned ahead"] += 1
        # The step just before may have ended, unheard; the truth knows what it sampled.
        last = before[-1] if before else None
        if last is not None and (last.start + len(last.token_ids), last.output_index + 1) != (
            item.start,
            item.output_index,
        ):
            raise Violation(Property.STEP, f"{what}: follows output {last.output_index}")
        if last is None and not self._unheard:
            raise Violation(Property.STEP, f"{what}: follows a step that is over")
        if item.output_index >= truth.request.stopping.max_tokens:
            raise Violation(Property.STEP, f"{what}: follows a token that ends it by length")

    def _still_held(self, what: str, item: StepItem) -> None:
        """The blocks that a step writes belong to its sequence, or to what is left of it, until the step is done."""
        ledger = self.machine.residents.ledger
        size = ledger.block_size
        written = item.blocks[item.start // size : -(-(item.start + len(item.token_ids)) // size)]
        names = (f"s:{item.request_id}", f":{item.request_id}")
        if not any(set(written) <= set(ledger.table(o)) for o in ledger.owners() if o.endswith(names)):
            raise Violation(Property.STEP, f"{what}: its blocks {written} were given away while it ran")

    def _await(self) -> None:
        """Whom the steps are for now, as the loop asks before it waits."""
        self._awaiting = None
        if self.plan.gives_up and self._outstanding and self.alive:
            self._awaiting = self.machine.awaiting()
            if self._awaiting.nobody:
                self._give_up_soon()
            for event in list(self.inbox):
                self._hear(event)

    def _hear(self, event: ev.Event) -> None:
        """What comes in while steps run may leave them to nobody; the oldest ends soon then, at the next layer."""
        if self.alive and self._awaiting is not None and self._awaiting.hear(event):  # type: ignore[arg-type]
            self._give_up_soon()

    def _give_up_soon(self) -> None:
        if self._outstanding and not self._outstanding[0].leaving:
            self._outstanding[0].leaving = True
            soon = self.plan.step_s / 10 * self._stops.random()
            self.heap.after(soon, self._give_up, self.incarnation, self._outstanding[0], "for nobody")

    def _give_up(self, life: int, step: Step, why: str) -> None:
        """What the step has written stays as it is: nobody may take it for KV."""
        if self._is_oldest(life, step):
            self.watch.coverage.situations[f"step given up: {why}"] += 1
            self._abandon(step)

    def _abandon(self, step: Step) -> None:
        plan = step.plan
        for item in plan.items:
            self._still_held(f"{self.name} gives up step {plan.number} with {item.request_id}", item)
        self._over(ev.StepAbandoned(plan.number))

    def _is_oldest(self, life: int, step: Step) -> bool:
        """Whether this step is the next to end."""
        return self.alive and self.incarnation == life and bool(self._outstanding) and self._outstanding[0] is step

    def _over(self, outcome: ev.StepDone | ev.StepFailed | ev.StepAbandoned) -> None:
        """The oldest step does no more; one that did not end takes all behind it along."""
        self._outstanding.popleft()
        self._awaiting = None
        self.steps_run += 1
        ended = isinstance(outcome, ev.StepDone)
        for step in self._outstanding if not ended else ():
            step.void = True
        self._unheard.append(ended)
        # Behind what came while it ran: ahead of it, one step after another would starve the rest.
        self.deliver(outcome)

    def _end_step(self, life: int, step: Step) -> None:
        if not self._is_oldest(life, step):
            return
        plan = step.plan
        if step.void:
            self.watch.coverage.situations["step void behind another"] += 1
            self._abandon(step)
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
                self.pool.write(item.blocks, item.start, truth.chain[item.start : end] or [BEYOND])
            if item.sample:
                known = item.output_index < len(truth.output)
                self.watch.coverage.situations["row of a sequence that had ended"] += not known
                tokens.append((item.request_id, Token(truth.output[item.output_index] if known else BEYOND)))
        self._over(
            ev.StepFailed(plan.number, "out of memory") if failed else ev.StepDone(plan.number, tuple(tokens), 0.0)
        )
