"""What the step loop needs of the parts it drives, as shapes. The real ones are ``sched``, ``engine``, ``transfer`` and
``observe``; tests bring scripted ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from distserve.core.effects import Effect
from distserve.core.events import InstanceEvent
from distserve.core.types import InstanceRef, Load, StepPlan, Ticket, Token
from distserve.sched.awaiting import Awaiting


class Machine(Protocol):
    """``sched.instance.InstanceState``."""

    def handle(self, event: InstanceEvent, now: float) -> list[Effect]: ...

    def next_deadline(self) -> float | None: ...

    def load(self) -> Load: ...

    def awaiting(self) -> Awaiting: ...

    @property
    def idle(self) -> bool: ...


class StepOutput(Protocol):
    """What a forward pass chose: (request id, token) for each item that samples, in item order."""

    @property
    def tokens(self) -> tuple[tuple[str, Token], ...]: ...

    @property
    def forward_s(self) -> float: ...


class Engine(Protocol):
    """``engine.Engine``: forward passes, computed in the order in which they are submitted. One thread calls ``submit``
    and ``wait``.

    ``submit`` does not wait for the step's result, though it may work on it in the calling thread; at most ``depth``
    steps are submitted and not yet waited for. ``wait`` returns the output of the oldest of them, whose KV is in all
    pools then. Whatever it raises is a failed step, but for StepGivenUp; ``submit`` raises nothing of a step's.

    A step that did not end takes all later ones with it: those that are outstanding when ``wait`` raises end with
    StepGivenUp, and were not computed with what the failed one did not make. The same holds for an item that follows
    (``StepItem.follows``) a step that has sampled nothing for it.

    ``give_up`` may come from any thread and does not wait: ``wait`` may then raise StepGivenUp for that step.
    """

    @property
    def depth(self) -> int: ...

    def submit(self, plan: StepPlan) -> None: ...

    def wait(self) -> StepOutput: ...

    def give_up(self, number: int) -> None: ...


class DataPlane(Protocol):
    """``transfer.Mover``. ``close_ticket`` and ``abort_send`` are fences."""

    def open_ticket(self, ticket: Ticket, blocks: tuple[int, ...]) -> None: ...

    def close_ticket(self, move_id: str) -> None: ...

    def send_stage(
        self, ticket: Ticket, destination_address: str, start: int, end: int, blocks: tuple[int, ...], final: bool
    ) -> None: ...

    def abort_send(self, move_id: str) -> None: ...

    def peer_lost(self, peer: InstanceRef) -> None: ...


class Observer(Protocol):
    """Whoever watches the machine: a journal, metrics."""

    def write(self, now: float, event: InstanceEvent, effects: Sequence[Effect]) -> None: ...
