"""The shells: what stands between a machine and the simulated world; an instance's is in ``instances``.

They do what the live shells must do and nothing more: connect, join, report, redial, and perform effects in order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from distserve.core import events as ev
from distserve.core.effects import (
    CONTROLLER,
    Complete,
    Deliver,
    Effect,
    Fail,
    Send,
)
from distserve.core.types import GatewayRef, InstanceRef
from distserve.sched.cluster import ClusterState
from distserve.sched.gateway import GatewayState
from tests.faults.heap import Heap
from tests.faults.network import Network
from tests.faults.plan import Plan
from tests.faults.process import Process, Watch

REDIAL_S = 0.5


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
