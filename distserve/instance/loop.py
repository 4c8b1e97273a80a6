"""The step loop: the one thread that touches the machine, the engine and the blocks (DESIGN §3).

It takes what came in, hands it to the machine, performs what the machine asks, submits the steps that were planned and
waits for the oldest; what is to be sent leaves in one batch a turn. It blocks when there is nothing to do, and decides
nothing. What comes in while a step runs waits for the end of the oldest one, and steps that nobody waits for any more
are given up, so that a cancel does not wait long.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from distserve.core.effects import AbortSend, CloseTicket, Effect, OpenTicket, RunStep, Send, SendStage
from distserve.core.events import InstanceEvent, MembersChanged, PeerLost, StepAbandoned, StepDone, StepFailed, Tick
from distserve.core.types import Load, StepPlan
from distserve.engine.stopping import StepGivenUp
from distserve.instance.inbox import Inbox, Question, Stop
from distserve.instance.ports import DataPlane, Engine, Machine, Observer
from distserve.sched.awaiting import Awaiting

log = logging.getLogger(__name__)
FAILED_STEPS_LIMIT = 2
"""So many failed steps in a row end the process: whatever is wrong with it, a fresh one does not have it."""


class EngineBroken(RuntimeError):
    """Steps fail one after the other."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What one turn of the loop hands to the network: messages in order, and the load they leave behind."""

    sends: tuple[Send, ...]
    load: Load
    idle: bool


class StepLoop:
    """See the module. ``outward`` is called from this thread, once a turn that has something to say."""

    def __init__(
        self,
        inbox: Inbox,
        machine: Machine,
        engine: Engine,
        data_plane: DataPlane,
        outward: Callable[[Turn], None],
        observers: Sequence[Observer] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._machine = machine
        self._engine = engine
        self._data_plane = data_plane
        self._outward = outward
        self._observers = tuple(observers)
        self._clock = clock
        self._inbox = inbox
        self._asked: deque[StepPlan] = deque()  # steps not yet answered, oldest first
        self._submitted = 0  # so many of them, from the oldest on
        self._void = 0  # up to this number no step is submitted any more: one before it did not end
        self._sends: list[Send] = []
        self._said: tuple[Load, bool] | None = None
        self._failed_steps = 0

    def run(self) -> None:
        """Turn until stopped. Raises ``EngineBroken``, or whatever a broken invariant raises."""
        outcome: StepDone | StepFailed | StepAbandoned | None = None
        try:
            while self._take(wait=outcome is None and not self._asked):
                if outcome is not None:
                    self._take_outcome(outcome)
                self._say()
                outcome = self._step()
        finally:
            self._inbox.close()

    def _take_outcome(self, outcome: StepDone | StepFailed | StepAbandoned) -> None:
        """What was planned behind a step that did not end, not knowing it, is void; so the machine takes it, too."""
        if not isinstance(outcome, StepDone) and self._asked:
            self._void = self._asked[-1].number
        self._handle(outcome)

    def _take(self, *, wait: bool) -> bool:
        """Handle all that is in the inbox, waiting for something (or a deadline) if asked to. False: stop."""
        deadline = self._machine.next_deadline() if wait else None
        items = self._inbox.take(wait=wait, timeout_s=self._until(deadline))
        going_on = [self._take_in(item) for item in items]  # what came with the order to stop is still taken in
        if False in going_on:
            return False
        deadline = self._machine.next_deadline()
        if deadline is not None and self._clock() >= deadline:
            self._handle(Tick())
        return True

    def _until(self, deadline: float | None) -> float | None:
        return None if deadline is None else max(0.0, deadline - self._clock())

    def _take_in(self, item: InstanceEvent | Question[Any] | Stop) -> bool:
        match item:
            case Stop():
                return False
            case Question(ask, answer):
                if answer.set_running_or_notify_cancel():
                    answer.set_result(ask())
            case _:
                self._handle(item)
        return True

    def _handle(self, event: InstanceEvent) -> None:
        now = self._clock()
        self._cut_data_plane(event)
        effects = self._machine.handle(event, now)
        for observer in self._observers:
            observer.write(now, event, effects)
        for effect in effects:
            self._perform(effect)

    def _cut_data_plane(self, event: InstanceEvent) -> None:
        """Links to a life that is gone go before the machine ends its moves."""
        match event:
            case PeerLost(ref, _):
                self._data_plane.peer_lost(ref)
            case MembersChanged(_, _, lost):
                for ref in lost:
                    self._data_plane.peer_lost(ref)

    def _perform(self, effect: Effect) -> None:
        match effect:
            case Send():
                self._sends.append(effect)
            case RunStep(plan):
                if len(self._asked) >= self._engine.depth:
                    raise RuntimeError(
                        f"step {plan.number} was asked for while step {self._asked[0].number} is outstanding"
                    )
                self._asked.append(plan)
            case OpenTicket(ticket, blocks):
                self._data_plane.open_ticket(ticket, blocks)
            case CloseTicket(move_id):
                self._data_plane.close_ticket(move_id)
            case SendStage(ticket, address, start, end, blocks, final):
                self._data_plane.send_stage(ticket, address, start, end, blocks, final)
            case AbortSend(move_id):
                self._data_plane.abort_send(move_id)
            case _:
                raise TypeError(f"an instance does not perform {effect}")

    def _say(self) -> None:
        """Hand this turn's messages over, before the next step makes them wait."""
        now = self._machine.load(), self._machine.idle
        if self._sends or now != self._said:
            self._said = now
            self._outward(Turn(tuple(self._sends), *now))
            self._sends.clear()

    def _step(self) -> StepDone | StepFailed | StepAbandoned | None:
        """The outcome of the oldest step, once all that were planned are submitted; None when there is none."""
        if not self._asked:
            return None
        awaiting = self._machine.awaiting()
        if not awaiting.nobody and self._asked[0].number > self._void:
            self._submit()
        plan = self._asked.popleft()
        if not self._submitted:  # cancelled in the turn that planned it, or behind one that did not end
            return StepAbandoned(plan.number)
        self._submitted -= 1
        return self._outcome(plan, awaiting)

    def _submit(self) -> None:
        for plan in islice(self._asked, self._submitted, None):
            self._engine.submit(plan)
            self._submitted += 1

    def _outcome(self, plan: StepPlan, awaiting: Awaiting) -> StepDone | StepFailed | StepAbandoned:
        if awaiting.nobody:
            self._engine.give_up(plan.number)
        try:
            with self._inbox.during(awaiting, self._engine.give_up):
                output = self._engine.wait()
        except StepGivenUp:
            return StepAbandoned(plan.number)
        except Exception as error:
            log.exception("step %d failed", plan.number)
            self._failed_steps += 1
            if self._failed_steps >= FAILED_STEPS_LIMIT:
                raise EngineBroken(f"{self._failed_steps} steps in a row failed, the last with: {error}") from error
            return StepFailed(plan.number, f"{type(error).__name__}: {error}")
        self._failed_steps = 0
        return StepDone(plan.number, output.tokens, output.forward_s)
