"""What waits for the step loop. Threads hand things in and never wait; the loop blocks here when it is idle."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from distserve.core.events import InstanceEvent

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Question(Generic[T]):
    """Something to be found out between two steps, by the thread that owns the answer."""

    ask: Callable[[], T]
    answer: Future[T]


@dataclass(frozen=True, slots=True)
class Stop:
    """The last item of an inbox."""


class Inbox:
    """What waits for the step loop: events, questions, the order to stop. Filled from any thread, never waiting."""

    def __init__(self) -> None:
        self._items: queue.SimpleQueue[InstanceEvent | Question[Any] | Stop] = queue.SimpleQueue()
        self._closed = threading.Event()

    def put(self, event: InstanceEvent) -> None:
        """Hand in an event."""
        self._items.put(event)

    def ask(self, question: Callable[[], T]) -> Future[T]:
        """Have something found out between two steps. The future is cancelled if the loop stops first."""
        answer: Future[T] = Future()
        self._items.put(Question(question, answer))
        if self._closed.is_set():
            answer.cancel()
        return answer

    @property
    def closed(self) -> bool:
        """Whether the loop has ended."""
        return self._closed.is_set()

    def stop(self) -> None:
        """Let the loop end after the step it runs."""
        self._items.put(Stop())

    def take(self, *, wait: bool, timeout_s: float | None) -> list[InstanceEvent | Question[Any] | Stop]:
        """All that is there; if asked to wait and nothing is, the first thing that comes within the time, if any."""
        try:
            items = [self._items.get(block=wait, timeout=timeout_s)]
        except queue.Empty:
            return []
        items += [self._items.get() for _ in range(self._items.qsize())]
        return items

    def close(self) -> None:
        """The loop has ended: whoever asked or asks gets no answer."""
        self._closed.set()
        for item in self.take(wait=False, timeout_s=None):
            if isinstance(item, Question):
                item.answer.cancel()
