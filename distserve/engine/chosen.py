"""The ids that the last steps have sampled, on the device, and how a step's followers get theirs without the host.

Owns which row of which step's ids belongs to which request. Knows neither how ids are sampled nor what a step computes.
A follower's id is copied in the order of the stream, so the step that samples it may still be running.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from distserve.engine.stopping import StepGivenUp


@dataclass(frozen=True, slots=True)
class Followers:
    """Where one step's followers find their ids: of each step that has chosen some, from which rows to which rows."""

    chosen: tuple[Tensor, ...]
    columns: tuple[array[int], ...]  # of each, the rows to read and the rows of the token ids to write, in turns

    def fill(self, token_ids: Tensor, columns: Sequence[Tensor]) -> None:
        """Write the followers' ids into ``token_ids``; ``columns`` are ours, on the device."""
        for i, ids in enumerate(self.chosen):
            token_ids.index_copy_(0, columns[2 * i + 1], ids.index_select(0, columns[2 * i]))


NOBODY = Followers((), ())


@runtime_checkable
class TakesChosen(Protocol):
    """A forward pass whose items may follow: it puts their ids in on the device."""

    chosen: ChosenIds


class ChosenIds:
    """Of the last step, or as many as are kept. One thread uses it, in the order of the steps."""

    def __init__(self) -> None:
        self._steps: deque[tuple[Tensor | None, dict[str, int]]] = deque(maxlen=1)  # newest first

    def keep(self, steps: int) -> None:
        """From now on, those of the last ``steps`` steps."""
        self._steps = deque(self._steps, maxlen=steps)

    def note(self, ids: Tensor | None, requests: Iterable[str]) -> None:
        """A step was launched: row i of ``ids`` [sampled] int64 is for the i-th request. None: it samples nothing."""
        self._steps.appendleft((ids, {request: row for row, request in enumerate(requests)}))

    def forget(self) -> None:
        """A step did not end: nothing may follow what came before it."""
        self._steps.clear()

    def followers(self, rows: Iterable[tuple[int, str]]) -> Followers:
        """For followers of these (row of the token ids, request). StepGivenUp when an id was never chosen."""
        groups: dict[int, tuple[array[int], array[int]]] = {}
        for row, request in rows:
            step, source = self._find(request)
            read, write = groups.setdefault(step, (array("q"), array("q")))
            read.append(source)
            write.append(row)
        if not groups:
            return NOBODY
        chosen = tuple(ids for step in groups if (ids := self._steps[step][0]) is not None)
        return Followers(chosen, tuple(column for pair in groups.values() for column in pair))

    def _find(self, request: str) -> tuple[int, int]:
        for step, (ids, places) in enumerate(self._steps):
            if ids is not None and request in places:
                return step, places[request]
        raise StepGivenUp(f"a step follows one that chose no token for {request}")
