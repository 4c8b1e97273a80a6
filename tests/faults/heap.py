"""The virtual clock: what is due, in order of (time, sequence number). Knows nothing of the cluster."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any


class Heap:
    """Actions at virtual times, in seconds. Equal times run in the order they were set."""

    def __init__(self) -> None:
        self.now = 0.0
        self.ran = 0
        self._due: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._set = 0

    def at(self, time: float, act: Callable[..., None], *args: Any) -> None:
        self._set += 1
        heappush(self._due, (max(time, self.now), self._set, act, args))

    def after(self, delay: float, act: Callable[..., None], *args: Any) -> None:
        self.at(self.now + delay, act, *args)

    def __len__(self) -> int:
        return len(self._due)

    def step(self) -> None:
        self.now, _, act, args = heappop(self._due)
        self.ran += 1
        act(*args)
