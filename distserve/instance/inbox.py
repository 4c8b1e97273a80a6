"""What waits for the step loop. Threads hand things in and never wait; the loop blocks here when it is idle."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from distserve.core.events import InstanceEvent
from distserve.sched.awaiting import Awaiting

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Question(Generic[T]):
    """Something to be found out between two steps, by the thread that owns the answer."""

    ask: Callable[[], T]
    answer: Future[T]


@dataclass(frozen=True, slots=True)
class Stop:
    """The last item of an inbox."""


Item = InstanceEvent | Question[Any] | Stop


class Inbox:
    """What waits for the step loop: events, questions, the order to stop. Filled from any thread, never waiting.

    Events wait for the end of the step that runs, with one exception: that nobody waits for that step any more is
    noticed at once, by the thread that hands the last of the cancels in.
    """

    def __init__(self) -> None:
        self._items: deque[Item] = deque()
        self._filled = threading.Condition()
        self._closed = threading.Event()
        self._step: Awaiting | None = None
        self._give_up: Callable[[int], None] = lambda _: None

    def put(self, event: InstanceEvent) -> None:
        """Hand in an event."""
        self._put(event)

    def ask(self, question: Callable[[], T]) -> Future[T]:
        """Have something found out between two steps. The future is cancelled if the loop stops first."""
        answer: Future[T] = Future()
        self._put(Question(question, answer))
        if self._closed.is_set():
            answer.cancel()
        return answer

    @property
    def closed(self) -> bool:
        """Whether the loop has ended."""
        return self._closed.is_set()

    def stop(self) -> None:
        """Let the loop end after the step it runs."""
        self._put(Stop())

    def take(self, *, wait: bool, timeout_s: float | None) -> list[Item]:
        """All that is there; if asked to wait and nothing is, the first thing that comes within the time, if any."""
        with self._filled:
            if wait:
                self._filled.wait_for(lambda: self._items, timeout_s)
            items = list(self._items)
            self._items.clear()
            return items

    @contextmanager
    def during(self, step: Awaiting, give_up: Callable[[int], None]) -> Iterator[None]:
        """While a step runs: once nobody waits for it, ``give_up`` is called with its number, by whatever thread.

        What was handed in since the last ``take`` counts. After the block it is not called any more.
        """
        with self._filled:
            self._step, self._give_up = step, give_up
            for item in self._items:
                self._hear(item)
        try:
            yield
        finally:
            with self._filled:
                self._step = None

    def close(self) -> None:
        """The loop has ended: whoever asked or asks gets no answer."""
        self._closed.set()
        for item in self.take(wait=False, timeout_s=None):
            if isinstance(item, Question):
                item.answer.cancel()

    def _put(self, item: Item) -> None:
        with self._filled:
            self._items.append(item)
            self._hear(item)
            self._filled.notify()

    def _hear(self, item: Item) -> None:
        """Called with the lock held."""
        if self._step is not None and not isinstance(item, Question | Stop) and self._step.hear(item):
            self._give_up(self._step.number)
