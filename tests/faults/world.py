"""One plan, run: build the cluster, let it suffer, let it rest, look at what is left."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from distserve.core.events import Draining
from distserve.core.types import InstanceRef, Request, Sampling, Stopping
from tests.faults.clients import ClientCrowd
from tests.faults.coverage import Coverage
from tests.faults.dataplane import DataPlane
from tests.faults.draw import draw
from tests.faults.heap import Heap
from tests.faults.instances import InstanceShell
from tests.faults.network import Network
from tests.faults.plan import Client, Fault, Plan
from tests.faults.properties import Property, Violation
from tests.faults.shells import ControllerShell, GatewayShell, Shell
from tests.faults.truth import EOS, Truth
from tests.faults.watch import Watcher

SETTLE_S = 110.0
"""After this long without clients nothing may be remembered: tombstones, leases and the timers of both are shorter."""

HOLD_S = {"calm": 3.0, "data": 12.0, "noise": 25.0}
"""By profile: an instance holds nothing of a request this long after its client is gone.

Where messages vanish alone, an ask that nobody repeats lasts one lease, and the ticket it may get in the end another.
"""

DRAIN_S = 10.0
"""The liveness bound: with faults over, a request ends within its own timeout and this much more."""

STANDSTILL_S = 12.0
"""Bounded recovery: once faults are over, some KV moves or some client hears something this often while any waits."""

PROBE_S = 20.0
"""And once at rest, a cluster that has suffered serves a new request within this time, without an error."""

LOOK_S = 1.0
"""How often everybody is looked at though nothing happens there."""


@dataclass
class Outcome:
    """What a plan came to. ``problem`` is empty when every property held; ``broken`` names the one that did not."""

    plan: Plan
    problem: str = ""
    broken: Property | None = None
    events: int = 0
    virtual_s: float = 0.0
    ends: Counter[str] = field(default_factory=Counter)
    seen: Counter[str] = field(default_factory=Counter)  # how moves ended, and what was done
    coverage: Coverage = field(default_factory=Coverage)
    standstill_s: float = 0.0  # the longest after faults and leases
    longest_wait_s: float = 0.0  # of one client, since faults were over
    digest: str = ""
    trace: list[str] = field(default_factory=list)


class World:
    """The cluster of one plan."""

    def __init__(self, plan: Plan, *, trace: bool = False, digest: bool = False, journal: bool = False) -> None:
        self.plan = plan
        self.heap = Heap()
        self.watcher = Watcher(self.heap, trace=trace, digest=digest, journal=journal)
        self.coverage = self.watcher.coverage
        self.network = Network(plan, self.heap, self.coverage)
        self.truths: dict[str, Truth] = {}
        self.clients = ClientCrowd(plan, self.heap, self.watcher, self._ended)
        self.data = DataPlane(plan, self.heap, self.network, self.truths, self.coverage)
        self.shells: dict[str, Shell] = {}
        self.instances: list[InstanceShell] = []
        self.standstill_s = 0.0
        self._looked_at = 0.0
        self._gone: set[str] = set()
        self._build()
        self.watcher.reached = self.clients.reached
        self.watcher.beats = self._beats
        self.clients.phases_of = self.watcher.phases_of
        self._exact_beats = not (plan.rates.drop or plan.rates.slow) and all(f.kind != "partition" for f in plan.faults)

    def _build(self) -> None:
        plan = self.plan
        common = (plan, self.heap, self.network, self.watcher)
        for node in plan.instances:
            instance = InstanceShell(node.name, *common, self.truths)
            instance.movers = self.data
            self.instances.append(instance)
            self.shells[node.name] = instance
        for name in plan.gateways:
            self.shells[name] = GatewayShell(name, *common, self.clients)
        self.shells["c"] = ControllerShell("c", *common)
        for shell in self.shells.values():
            shell.kill = self._kill
        self.network.processes.update(self.shells)
        self.clients.processes.update(self.shells)

    # ── the run ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def run(self) -> Outcome:
        outcome = Outcome(self.plan)
        try:
            self._suffer()
            self._rest()
            self._probe()
            self._rest()
        except Violation as violation:
            outcome.problem, outcome.broken = f"{violation.broken}: {violation}", violation.broken
        except Exception as error:  # of the harness, or of a patched machine's part: this too is for a person to read
            where = "".join(traceback.format_tb(error.__traceback__)[-2:])
            outcome.problem, outcome.broken = f"{type(error).__name__}: {error}\n{where}", Property.CRASH
        outcome.events, outcome.virtual_s = self.watcher.events, self.heap.now
        outcome.ends.update(reader.end or "open" for reader in self.clients.readers.values())
        outcome.standstill_s = self.standstill_s
        outcome.longest_wait_s = self.clients.longest_wait_s
        outcome.seen = self._seen()
        outcome.coverage = self.coverage
        if self.watcher.digest is not None:
            outcome.digest = self.watcher.digest.hexdigest()
        outcome.trace = list(self.watcher.trace or ())
        return outcome

    def _suffer(self) -> None:
        """Clients come while things go wrong; all of them end in time."""
        luck = self.plan.stream_of("start")
        starts = {node.name: node.starts_at for node in self.plan.instances}
        for name, shell in self.shells.items():
            self.heap.at(starts.get(name, luck.uniform(0, 0.2)), self._start, shell)
        for client in self.plan.clients:
            self._admit(client)
        for fault in self.plan.faults:
            self.heap.at(fault.at, self._strike, fault)
        last = max((c.at + c.request.timeout_s for c in self.plan.clients), default=0.0)
        bound = max(last, self.plan.faults_end) + DRAIN_S
        leaves = (f.at + f.duration_s for f in self.plan.faults if f.kind == "leave")
        over = max([self.plan.faults_end, *starts.values(), *(f.at for f in self.plan.faults), *leaves])
        self._until(lambda: self.clients.done and self.heap.now >= over, bound)

    def _probe(self) -> None:
        """Every gateway serves again."""
        for number, gateway in enumerate(self.plan.gateways, start=900):
            prompt = tuple(range(100, 100 + 17 + number % 7))
            request = Request(
                f"probe{number}", "m", prompt, Sampling(temperature=0.0), Stopping(4, 0, (EOS,)), timeout_s=PROBE_S
            )
            self._admit(Client(self.heap.now + 0.01, gateway, number, request, None))
        self._until(lambda: self.clients.done, self.heap.now + PROBE_S + DRAIN_S)
        for name, reader in self.clients.readers.items():
            if reader.client.number >= 900 and reader.end != "length":
                raise Violation(Property.SERVES, f"{name}, sent to a cluster at rest, ended as {reader.end!r}")

    def _admit(self, client: Client) -> None:
        truth = self.truths[client.request.id] = client.truth()
        self.clients.add(client, truth)

    def _ended(self, request_id: str) -> None:
        if self.plan.profile in HOLD_S:
            self.heap.after(HOLD_S[self.plan.profile], self._let_go, request_id)

    def _let_go(self, request_id: str) -> None:
        for instance in self.instances:
            machine = instance.machine
            if machine.residents.sequences.get(request_id) or machine.arrivals.of_request(request_id):
                raise Violation(Property.LETGO, f"{instance.name} still holds {request_id}, its client is long gone")

    def _until(self, done: Callable[[], bool], bound: float) -> None:
        while not done():
            self._turn()
            if self.heap.now > bound:
                raise Violation(Property.LIVENESS, f"not at rest at {bound:.1f}: {self._open()}")
            lately = max(self.clients.last_word, self.clients.last_submit, self.data.last_moved)
            stood = self.heap.now - max(self.plan.faults_end, lately)
            if stood > self.standstill_s and self.clients.waiting:
                self.standstill_s = stood
                if stood > STANDSTILL_S:
                    what = f"nothing has come to any client for {stood:.1f} s: {self._open()}"
                    raise Violation(Property.RECOVERY, what)

    def _turn(self) -> None:
        self.heap.step()
        if self.heap.now >= self._looked_at + LOOK_S:
            self._looked_at = self.heap.now
            for shell in self.shells.values():
                self.watcher.look(shell)

    def _open(self) -> str:
        readers = [(name, r) for name, r in self.clients.readers.items() if r.open]
        return "; ".join(f"{name} of {r.client.gateway} has {r.received} tokens" for name, r in readers)

    def _rest(self) -> None:
        """Nothing is held, nothing is awaited, nothing is under way."""
        end = self.heap.now + SETTLE_S
        while self.heap.now < end:
            self._turn()
        for shell in self.shells.values():
            if shell.alive and shell.kind != "controller" and (due := shell.machine.next_deadline()) is not None:
                raise Violation(Property.REST, f"{shell.name} has a timer in {due - shell.clock:.1f} s")
            if shell.alive and shell.inbox:
                raise Violation(Property.REST, f"{shell.name} has not read {shell.inbox[0]}")
        living = [instance for instance in self.instances if instance.alive]
        for instance in living:
            self._empty(instance)
        controller = self.shells["c"]
        assert isinstance(controller, ControllerShell)
        if sorted(controller.machine.members) != sorted(instance.name for instance in living):
            raise Violation(Property.REST, f"the controller knows {sorted(controller.machine.members)}")
        if controller.machine.open_requests:
            raise Violation(Property.REST, f"the controller counts {controller.machine.open_requests} open requests")

    def _empty(self, instance: InstanceShell) -> None:
        machine = instance.machine
        ledger = machine.residents.ledger
        if not machine.idle or ledger.available != ledger.total or ledger.owners():
            counts = {str(k): v for k, v in ledger.counts().items() if v}
            raise Violation(Property.REST, f"{instance.name} holds {counts} for {ledger.owners()}")
        if instance.tickets:
            raise Violation(Property.REST, f"{instance.name} has open tickets {sorted(instance.tickets)}")
        remembered = len(machine._abandoned) + len(machine._submitted) + len(machine.arrivals.tombstones)
        if remembered or machine.arrivals._adopted:
            raise Violation(Property.TOMBSTONE, f"{instance.name} remembers {remembered} things of long ago")

    # ── faults ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _start(self, shell: Shell) -> None:
        if not shell.alive and shell.name not in self._gone:
            shell.start()
            self.coverage.faults["instance joined late"] += shell.kind == "instance" and self.heap.now > 0.2

    def _strike(self, fault: Fault) -> None:
        shell = self.shells[fault.target]
        until = min(self.heap.now + fault.duration_s, max(self.plan.faults_end, self.heap.now + 0.05))
        self.watcher.note(f"fault: {fault} until {until:.3f}")
        faults = self.coverage.faults
        match fault.kind:
            case "crash" if shell.alive:
                self._kill(shell, until)
            case "cut" if shell.alive:
                shell.cut_after = fault.after
                self.heap.at(until, self._spare, shell)
            case "leave" if shell.alive:
                self._gone.add(shell.name)
                if fault.duration_s:
                    faults["instance told to drain"] += 1
                    shell.deliver(Draining())
                self.heap.after(fault.duration_s, self._depart, shell)
            case "stall" | "freeze" if shell.alive:
                faults["process frozen" if fault.kind == "freeze" else "machine stalled"] += 1
                shell.stall(until, freeze=fault.kind == "freeze")
            case "break":
                for stream in self.network.streams_of(fault.target, fault.other):
                    self.network.break_stream(stream)
            case "partition":
                self.network.partition(fault.target, fault.other, until, one_way=fault.one_way)

    def _depart(self, shell: Shell) -> None:
        """Gone for good."""
        self.coverage.faults["instance left"] += 1
        if shell.alive:
            self._kill(shell)

    def _spare(self, shell: Shell) -> None:
        shell.cut_after = None

    def _kill(self, shell: Shell, until: float | None = None) -> None:
        """End a life; another begins ``until`` then, unless the process has left for good."""
        kind = "the controller" if shell.kind == "controller" else f"a{'n' * (shell.kind == 'instance')} {shell.kind}"
        if shell.name not in self._gone:
            self.coverage.faults[f"crash of {kind}"] += 1
            self.heap.at(until if until is not None else self.heap.now + 1.0, self._start, shell)
        self.watcher.note(f"{shell.name}#{shell.incarnation} dies")
        self.watcher.died(shell)
        shell.die()
        self.network.died(shell)
        if shell.kind == "gateway":
            self.clients.gateway_died(shell)

    def _beats(self, ref: InstanceRef) -> bool:
        """Whether a life's heartbeats surely reached the controller all through its last lease."""
        shell, controller = self.shells[ref.id], self.shells["c"]
        stream = self.network.dialed.get((ref.id, "c"))
        since = self.heap.now - self.plan.cluster_config.lease_s - 0.5
        return (
            self._exact_beats
            and shell.alive
            and shell.incarnation == ref.incarnation
            and shell.frozen_until < since
            and stream is not None
            and stream.stands
            and stream.since < since
            and controller.stalled_until < since
        )

    def _seen(self) -> Counter[str]:
        seen: Counter[str] = Counter()
        situations = self.coverage.situations
        for instance in self.instances:
            if instance.incarnation:
                machine = instance.machine
                situations["sequence preempted"] += machine.residents.preemptions
                seen["steps"] += instance.steps_run
                for side in (machine.arrivals, machine.departures):
                    for reason, count in side.ended.items():
                        name = "in" if side is machine.arrivals else "out"
                        seen[f"{name}: {reason.split(' ')[0]}"] += count
        seen["kv tokens moved"] = self.data.tokens_moved
        situations["owner changed"] += seen["in: committed"]
        gateways = [s for s in self.shells.values() if isinstance(s, GatewayShell) and s.incarnation]
        situations["attempt retried"] += sum(sum(gateway.machine.retries.values()) for gateway in gateways)
        return seen


def run_plan(plan: Plan, *, trace: bool = False, digest: bool = False) -> Outcome:
    """Run one plan to its end; never raises for a broken property, see ``Outcome.problem``."""
    return World(plan, trace=trace, digest=digest).run()


def run_seed(
    seed: int, *, profile: str | None = None, topology: str | None = None, trace: bool = False, digest: bool = False
) -> Outcome:
    """``run_plan`` of what a seed stands for."""
    return run_plan(draw(seed, profile, topology), trace=trace, digest=digest)


def command(seed: int, profile: str | None = None, topology: str | None = None) -> str:
    """What replays a seed with its event log."""
    options = "".join(f" --{k} {v}" for k, v in (("profile", profile), ("topology", topology)) if v)
    return f"python -m tests.faults --replay {seed}{options}"
