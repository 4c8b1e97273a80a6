"""The wrong methods of deliberate bugs (``breakages``) that are about steps, each made from the right one."""

from __future__ import annotations

from typing import Any

from distserve.core import effects as fx
from distserve.core import events as ev
from distserve.sched.ahead import Ahead
from distserve.sched.lifecycle import Phase
from distserve.sched.residents import Residents
from distserve.sched.sequence import Sequence
from distserve.sched.steps import Steps


def release_at_once(right: Any) -> Any:
    return lambda self, sequence: self.ledger.release(sequence.owner)


def tokens_last(right: Any) -> Any:
    def done(self: Steps, event: ev.StepDone, now: float) -> list[fx.Effect]:
        effects = right(self, event, now)
        return sorted(effects, key=lambda e: isinstance(e, fx.Send) and isinstance(e.event, ev.TokensMade))

    return done


def counts_as_run(right: Any) -> Any:
    def abandoned(self: Steps, event: ev.StepAbandoned) -> list[fx.Effect]:
        oldest = self._outstanding[0] if self._outstanding else None
        parts = oldest.parts if oldest is not None and oldest.number == event.number and not oldest.void else []
        for part in parts:
            if not part.sample and part.sequence.phase is not Phase.ENDED:
                part.sequence.computed += part.count
        return right(self, event)  # type: ignore[no-any-return]

    return abandoned


def freed_after_the_oldest(right: Any) -> Any:
    def release(self: Residents, sequence: Sequence) -> None:
        last, sequence.last_step = sequence.last_step, min(sequence.last_step, self._steps_done + 1)
        right(self, sequence)
        sequence.last_step = last

    return release


def preempts_ahead(right: Any) -> Any:
    return lambda self, *, first: right(self, first=True)


def chooses_once(right: Any) -> Any:
    """As it was: when all of a step's share gave way to others, no step was planned at all."""

    def choose(self: Ahead, *, first: bool) -> Any:
        return self._residents.secure(self._chosen()) if first else right(self, first=False)

    return choose


def newest_first(right: Any) -> Any:
    def answered(self: Steps, number: int) -> Any:
        if self._outstanding and number == self._outstanding[0].number:
            self._outstanding.rotate(1)
            self._outstanding[0].number, self._outstanding[-1].number = number, self._outstanding[0].number
        return right(self, number)

    return answered


def void_counts(right: Any) -> Any:
    def void(self: Steps) -> None:
        """As if the steps behind one that did not end went on."""

    return void
