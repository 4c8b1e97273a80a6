"""One seed, run: build the cluster, let it suffer, let it rest, look at what is left."""

from __future__ import annotations

import random
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from distserve.core.types import Request, Sampling, Stopping
from tests.faults.clients import ClientCrowd
from tests.faults.dataplane import DataPlane
from tests.faults.heap import Heap
from tests.faults.network import Network
from tests.faults.plan import Client, Fault, Plan, draw
from tests.faults.shells import ControllerShell, GatewayShell, InstanceShell, Shell
from tests.faults.truth import EOS, Truth, Violation
from tests.faults.watch import Watcher

SETTLE_S = 110.0
"""After this long without clients nothing may be remembered: tombstones, leases and the timers of both are shorter."""

HOLD_S = {"calm": 3.0, "data": 12.0, "noise": 25.0}
"""By profile: an instance holds nothing of a request this long after its client is gone.

Where messages vanish alone, an ask that nobody repeats lasts one lease, and the ticket it may get in the end another.
"""

DRAIN_S = 10.0
"""The liveness bound: with faults over, a request ends within its own timeout and this much more."""

PROBE_S = 20.0
"""And once at rest, a cluster that has suffered serves a new request within this time, without an error."""


@dataclass
class Outcome:
    """What a seed came to. ``problem`` is empty when every property held."""

    plan: Plan
    problem: str = ""
    events: int = 0
    virtual_s: float = 0.0
    ends: Counter[str] = field(default_factory=Counter)
    seen: Counter[str] = field(default_factory=Counter)  # how often rare things happened
    digest: str = ""
    trace: list[str] = field(default_factory=list)


class World:
    """The cluster of one plan."""

    def __init__(self, plan: Plan, *, trace: bool = False, digest: bool = False, journal: bool = False) -> None:
        self.plan = plan
        self.heap = Heap()
        self.watcher = Watcher(self.heap, trace=trace, digest=digest, journal=journal)
        self.network = Network(plan, self.heap, random.Random(plan.seed + 1))
        self.truths: dict[str, Truth] = {}
        self.clients = ClientCrowd(plan, self.heap, self.watcher.note, self._ended)
        data = DataPlane(plan, self.heap, random.Random(plan.seed + 2), self.network, self.truths)
        self.data = data
        self.shells: dict[str, Shell] = {}
        self.instances: list[InstanceShell] = []
        common = (plan, self.heap, self.network, self.watcher)
        for name in plan.roles:
            instance = InstanceShell(name, *common, self.truths)
            instance.movers = data
            self.instances.append(instance)
            self.shells[name] = instance
        for name in plan.gateways:
            self.shells[name] = GatewayShell(name, *common, self.clients)
        self.shells["c"] = ControllerShell("c", *common)
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
            outcome.problem = f"Violation: {violation}"
        except Exception as error:  # whatever a machine raises is what this seed found
            where = "".join(traceback.format_tb(error.__traceback__)[-2:])
            outcome.problem = f"{type(error).__name__}: {error}\n{where}"
        outcome.events, outcome.virtual_s = self.watcher.events, self.heap.now
        outcome.ends.update(reader.end or "open" for reader in self.clients.readers.values())
        outcome.seen = self._seen()
        if self.watcher.digest is not None:
            outcome.digest = self.watcher.digest.hexdigest()
        outcome.trace = list(self.watcher.trace or ())
        return outcome

    def _suffer(self) -> None:
        """Clients come while things go wrong; all of them end in time."""
        rng = random.Random(self.plan.seed + 3)
        for shell in self.shells.values():
            self.heap.at(rng.uniform(0, 0.2), shell.start)
        for client in self.plan.clients:
            self._admit(client)
        for fault in self.plan.faults:
            self.heap.at(fault.at, self._strike, fault)
        last = max(c.at + c.truth.request.timeout_s for c in self.plan.clients)
        bound = max(last, self.plan.faults_end) + DRAIN_S
        self._until(lambda: self.clients.done and self.heap.now >= self.plan.faults_end, bound)

    def _probe(self) -> None:
        """Every gateway serves again."""
        for number, gateway in enumerate(self.plan.gateways, start=900):
            prompt = tuple(range(100, 100 + 17 + number % 7))
            request = Request(
                f"probe{number}", "m", prompt, Sampling(temperature=0.0), Stopping(4, 0, (EOS,)), timeout_s=PROBE_S
            )
            self._admit(Client(self.heap.now + 0.01, gateway, Truth.of(number, request, None), None))
        self._until(lambda: self.clients.done, self.heap.now + PROBE_S + DRAIN_S)
        for reader in self.clients.readers.values():
            if reader.client.truth.number >= 900 and reader.end != "length":
                raise Violation(f"{reader.client.truth.request.id}, sent to a cluster at rest, ended as {reader.end!r}")

    def _admit(self, client: Client) -> None:
        self.truths[client.truth.request.id] = client.truth
        self.clients.add(client)

    def _ended(self, request_id: str) -> None:
        if self.plan.profile in HOLD_S:
            self.heap.after(HOLD_S[self.plan.profile], self._let_go, request_id)

    def _let_go(self, request_id: str) -> None:
        for instance in self.instances:
            machine = instance.machine
            if machine.residents.sequences.get(request_id) or machine.arrivals.of_request(request_id):
                raise Violation(f"{instance.name} still holds {request_id}, whose client is long gone")

    def _until(self, done: Callable[[], bool], bound: float) -> None:
        while not done():
            self.heap.step()
            if self.heap.now > bound:
                raise Violation(f"not at rest at {bound:.1f}: {self._open()}")

    def _open(self) -> str:
        readers = [(name, r) for name, r in self.clients.readers.items() if r.open]
        return "; ".join(f"{name} of {r.client.gateway} has {r.received} tokens" for name, r in readers)

    def _rest(self) -> None:
        """Nothing is held, nothing is awaited, nothing is under way."""
        end = self.heap.now + SETTLE_S
        while self.heap.now < end:
            self.heap.step()
        for shell in self.shells.values():
            if shell.kind != "controller" and (due := shell.machine.next_deadline()) is not None:
                raise Violation(f"{shell.name} is at rest but has a timer in {due - shell.clock:.1f} s")
            if shell.inbox:
                raise Violation(f"{shell.name} is at rest but has not read {shell.inbox[0]}")
        for instance in self.instances:
            ledger = instance.machine.residents.ledger
            if not instance.machine.idle or ledger.available != ledger.total or ledger.owners():
                counts = {str(k): v for k, v in ledger.counts().items() if v}
                raise Violation(f"{instance.name} is at rest but holds {counts} for {ledger.owners()}")
            if instance.tickets:
                raise Violation(f"{instance.name} is at rest with open tickets {sorted(instance.tickets)}")
        controller = self.shells["c"]
        assert isinstance(controller, ControllerShell)
        if sorted(controller.machine.members) != sorted(self.plan.roles):
            raise Violation(f"the controller knows {sorted(controller.machine.members)} at rest")
        if controller.machine.open_requests:
            raise Violation(f"the controller counts {controller.machine.open_requests} open requests at rest")

    # ── faults ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _strike(self, fault: Fault) -> None:
        shell = self.shells[fault.target]
        until = min(self.heap.now + fault.duration_s, max(self.plan.faults_end, self.heap.now + 0.05))
        self.watcher.note(f"fault: {fault} until {until:.3f}")
        if fault.kind == "crash" and shell.alive:
            shell.die()
            self.network.died(shell)
            if shell.kind == "gateway":
                self.clients.gateway_died(shell)
            self.heap.at(until, shell.start)
        elif fault.kind in ("stall", "freeze") and shell.alive:
            shell.stall(until, freeze=fault.kind == "freeze")
        elif fault.kind == "break":
            for stream in self.network.streams_of(fault.target, fault.other):
                self.network.break_stream(stream)
        elif fault.kind == "partition":
            self.network.partition(fault.target, fault.other, until, one_way=fault.one_way)

    def _seen(self) -> Counter[str]:
        seen: Counter[str] = Counter()
        for instance in self.instances:
            if hasattr(instance, "machine"):
                machine = instance.machine
                seen["preemptions"] += machine.residents.preemptions
                seen["steps"] += instance.steps_run
                for side in (machine.arrivals, machine.departures):
                    for reason, count in side.ended.items():
                        name = "in" if side is machine.arrivals else "out"
                        seen[f"{name}: {reason.split(' ')[0]}"] += count
        seen["kv tokens moved"] = self.data.tokens_moved
        seen["repeated"] = self.network.repeated
        seen["dropped"] = self.network.dropped
        gateways = [s for s in self.shells.values() if isinstance(s, GatewayShell) and s.incarnation]
        seen["retries"] = sum(sum(gateway.machine.retries.values()) for gateway in gateways)
        return seen


def run_seed(
    seed: int, *, profile: str | None = None, topology: str | None = None, trace: bool = False, digest: bool = False
) -> Outcome:
    """Run one seed to its end; never raises for a broken property, see ``Outcome.problem``."""
    return World(draw(seed, profile, topology), trace=trace, digest=digest).run()


def command(seed: int, profile: str | None = None, topology: str | None = None) -> str:
    """What replays a seed with its event log."""
    options = "".join(f" --{k} {v}" for k, v in (("profile", profile), ("topology", topology)) if v)
    return f"python -m tests.faults --replay {seed}{options}"
