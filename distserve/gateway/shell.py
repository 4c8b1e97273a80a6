"""The gateway's shell: the machine on an asyncio loop, its links, and the clients' streams. Implements ``Backend``.

Gives every request an id of its own in the cluster, so that a client may use an id again, or one that another client of
another gateway uses, and no instance mistakes one for the other. Decides nothing else.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import Callable, Sequence

from distserve.core.effects import Complete, Controller, Deliver, Effect, Fail, Send
from distserve.core.events import ClientCancelled, Event, InstanceFound, InstanceLost, MembersChanged, Submitted
from distserve.core.types import Code, FinishReason, GatewayRef, InstanceRef, Member, Request
from distserve.gateway import operators
from distserve.gateway.backend import InstanceView, KvReport, RequestFailed, RequestStream, RequestView
from distserve.gateway.canary import Canary
from distserve.gateway.client_stream import ClientStream
from distserve.gateway.links import ControllerLink, InstanceLinks
from distserve.gateway.options import GatewayOptions
from distserve.sched.gateway import GatewayState
from distserve.sched.stream import Stream, StreamPhase
from distserve.wire.host import MachineHost, Observer
from distserve.wire.life import watched
from distserve.wire.trust import OPEN, Trust

_WAITS = {
    StreamPhase.DISPATCHING: "the controller to name instances",
    StreamPhase.WAITING: "an instance that can take it",
}


class GatewayShell:
    """See the module. Made on a running loop; ``start`` it, ``close`` it at the end."""

    def __init__(
        self,
        options: GatewayOptions,
        me: GatewayRef,
        controller: str,
        observers: Sequence[Observer] = (),
        on_change: Callable[[bool], None] = lambda _: None,
        broke: Callable[[BaseException], None] = lambda _: None,
        trust: Trust = OPEN,
    ) -> None:
        self._trust = trust
        self._broke = broke
        self._options = options
        self._me = me
        self._machine = GatewayState(me, options.machine)
        self._host = MachineHost(self._machine, self._perform, observers)
        self._controller = ControllerLink(me, controller, self._take_in, trust)
        self._instances = InstanceLinks(me, self._take_in, broke, trust)
        self._canary = Canary(self, self._connected, on_change, timeout_s=options.canary_timeout_s, seed=me.incarnation)
        self._streams: dict[str, ClientStream] = {}  # by the cluster's id
        self._names: dict[str, str] = {}  # a client's id → the cluster's
        self._numbers = itertools.count(1)
        self._tasks: list[asyncio.Task[None]] = []
        self._sweep: asyncio.TimerHandle | None = None
        self._refusing = ""
        self._empty = asyncio.Event()
        self._empty.set()

    # ── life ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def start(self) -> None:
        """Dial the controller; members and readiness follow from what it says."""
        self._tasks.append(watched(self._controller.run(), self._broke))
        if self._options.canary:
            self._tasks.append(watched(self._canary.run(), self._broke))

    def refuse_new(self, why: str) -> None:
        """From now on refuse every new request with this sentence."""
        self._refusing = why

    async def drained(self) -> None:
        """Wait until no stream is left."""
        await self._empty.wait()

    async def close(self) -> None:
        """End what still runs and hang up on everybody."""
        for request_id in list(self._streams):
            self._streams[request_id].cut_off(RequestFailed(Code.UNAVAILABLE, "this gateway is shutting down", 1.0))
        if self._sweep is not None:
            self._sweep.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._instances.close()
        self._host.close()

    # ── Backend: requests ────────────────────────────────────────────────────────────────────────────────────────────

    async def submit(self, request: Request, tokenize_s: float) -> RequestStream:
        """As ``Backend.submit``."""
        if self._refusing:
            raise RequestFailed(Code.UNAVAILABLE, self._refusing, 1.0)
        if request.id in self._names:
            message = f"a request with the id {request.id!r} is running already; choose another id"
            raise RequestFailed(Code.ALREADY_EXISTS, message, param="request_id")
        ours = f"{request.id}~{self._me.incarnation:x}.{next(self._numbers)}"
        stream = ClientStream(
            request.id, lambda finish: self._host.handle(ClientCancelled(ours, finish)), self._host.now
        )
        self._streams[ours], self._names[request.id] = stream, ours
        self._empty.clear()
        self._host.handle(Submitted(dataclasses.replace(request, id=ours), tokenize_s))
        if stream.failure is not None:
            raise stream.failure
        self._arm_sweep()
        return stream

    async def cancel(self, request_id: str) -> bool:
        """As ``Backend.cancel``."""
        ours = self._names.get(request_id)
        if ours is None:
            return False
        self._host.handle(ClientCancelled(ours, FinishReason.CANCELLED))
        return True

    async def where(self, request_id: str) -> RequestView | None:
        """As ``Backend.where``; asks the instances that may hold it."""
        ours = self._names.get(request_id, "")
        if (stream := self._machine.streams.get(ours)) is None:
            return None
        places = {e.ref: e for e in (stream.prefill, stream.decode) if e is not None}
        held = await operators.holdings(list(places.values()), ours, self._trust)
        owner, holding = max(held, key=lambda each: each[1].epoch, default=("", None))
        now = self._host.now()
        return RequestView(
            request_id=request_id,
            phase=holding.phase if holding is not None else str(stream.phase),
            owner=owner or _owner(stream),
            epoch=max(stream.epoch, holding.epoch if holding is not None else 0),
            age_s=now - stream.arrived,
            waits_for=holding.waits_for if holding is not None else _WAITS.get(stream.phase, ""),
            deadline_in_s=stream.deadline - now,
            output_tokens=len(stream.delivered),
        )

    # ── Backend: the cluster ─────────────────────────────────────────────────────────────────────────────────────────

    def members(self) -> Sequence[Member]:
        """As ``Backend.members``."""
        return list(self._machine.members.values())

    def ready(self) -> bool:
        """As ``Backend.ready``. Without a canary: whether anybody is connected at all."""
        if self._refusing:
            return False
        return self._canary.ready() if self._options.canary else bool(self._machine.connected)

    def max_request_tokens(self, model: str) -> int:
        """As ``Backend.max_request_tokens``."""
        fitting = (m.spec for m in self._machine.members.values() if m.role.can_decode and m.spec.name == model)
        return max((spec.max_sequence_tokens for spec in fitting), default=0)

    async def instances(self) -> Sequence[InstanceView]:
        """As ``Backend.instances``."""
        connected = self._machine.connected
        views = (operators.view(m, connected=m.ref in connected, trust=self._trust) for m in self.members())
        return list(await asyncio.gather(*views))

    async def kv_check(self) -> Sequence[KvReport]:
        """As ``Backend.kv_check``."""
        return list(await asyncio.gather(*(operators.kv_report(m, self._trust) for m in self.members())))

    # ── between machine and links ────────────────────────────────────────────────────────────────────────────────────

    def _connected(self) -> list[Member]:
        return [m for m in self._machine.members.values() if m.ref in self._machine.connected]

    def _take_in(self, event: Event) -> None:
        if isinstance(event, MembersChanged):
            self._instances.follow(event)
        self._host.handle(event)
        if isinstance(event, MembersChanged | InstanceFound | InstanceLost):
            self._canary.paths_changed()

    def _perform(self, effect: Effect) -> None:
        match effect:
            case Send(InstanceRef() as ref, event):
                self._instances.send(ref, event)
            case Send(Controller(), event):
                self._controller.send(event)
            case Deliver(request_id):
                self._streams[request_id].take(effect)
            case Complete(request_id) | Fail(request_id):
                self._finish(request_id).take(effect)
            case _:
                raise TypeError(f"a gateway does not perform {effect}")

    def _finish(self, request_id: str) -> ClientStream:
        stream = self._streams.pop(request_id)
        del self._names[stream.request_id]
        if not self._streams:
            self._empty.set()
        return stream

    # ── slow readers ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _arm_sweep(self) -> None:
        """See that readers are looked at while there are any."""
        if self._sweep is None and self._streams:
            loop = asyncio.get_running_loop()
            self._sweep = loop.call_later(self._options.unread_limit_s / 4, self._cut_slow_readers)

    def _cut_slow_readers(self) -> None:
        self._sweep = None
        limit = self._options.unread_limit_s
        late = self._host.now() - limit
        for stream in list(self._streams.values()):
            if stream.unread_since is not None and stream.unread_since <= late:
                message = f"the answer was not read for {limit:g} s; the request was ended"
                stream.cut_off(RequestFailed(Code.RESOURCE_EXHAUSTED, message))
        self._arm_sweep()


def _owner(stream: Stream) -> str:
    """The last life known to own it; empty if none does."""
    ref = stream.owner or (stream.prefill.ref if stream.prefill is not None else None)
    return str(ref) if ref is not None else ""
