"""Makes one event out of those of several senders: a stage is sent when all its parts are, and fails once, with the
first part that does. Thread-safe; decides nothing else.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from distserve.transfer.events import MoverEvent, StageFailed, StageSent


@dataclass(slots=True)
class _Stage:
    missing: int
    nbytes: int = 0
    seconds: float = 0.0


class SendTally:
    """The stages under way at a source that are sent in parts. ``report`` is called under a lock and must be quick."""

    def __init__(self, report: Callable[[MoverEvent], None]) -> None:
        self._report = report
        self._lock = threading.Lock()
        self._moves: dict[str, dict[tuple[int, int], _Stage]] = {}

    def expect(self, move_id: str, start: int, end: int, parts: int) -> None:
        """A stage of so many parts is about to be sent; one without any is sent already."""
        with self._lock:
            if parts:
                self._moves.setdefault(move_id, {})[start, end] = _Stage(parts)
            else:
                self._report(StageSent(move_id, start, end, 0, 0.0))

    def take(self, event: MoverEvent) -> None:
        """What came of a part."""
        with self._lock:
            match event:
                case StageSent():
                    self._sent(event)
                case StageFailed():
                    if self._moves.pop(event.move_id, None) is not None:  # what other parts tell adds nothing
                        self._report(event)
                case _:
                    self._report(event)

    def forget(self, move_id: str) -> None:
        """The move is over: nothing is told of it any more."""
        with self._lock:
            self._moves.pop(move_id, None)

    def _sent(self, event: StageSent) -> None:
        stages = self._moves.get(event.move_id, {})
        stage = stages.get((event.start, event.end))
        if stage is None:
            return
        stage.missing -= 1
        stage.nbytes += event.nbytes
        stage.seconds = max(stage.seconds, event.seconds)
        if stage.missing:
            return
        del stages[event.start, event.end]
        if not stages:
            del self._moves[event.move_id]
        self._report(StageSent(event.move_id, event.start, event.end, stage.nbytes, stage.seconds))
