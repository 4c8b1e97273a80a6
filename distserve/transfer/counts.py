"""Counters of one mover, read by whoever makes metrics of them."""

from __future__ import annotations

import threading
from collections import Counter


class Counts:
    """Named counts that only grow. Thread-safe."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, name: str, amount: int = 1) -> None:
        with self._lock:
            self._counts[name] += amount

    def snapshot(self) -> dict[str, int]:
        with self._lock:
            return dict(self._counts)
