"""How long a process took to become useful, phase by phase: from its first instruction to its first duty."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

Mark = Callable[[str], None]
"""mark(phase): the phase has ended, and with it all time since the last mark."""


def unmarked(_: str) -> None:
    """For whoever does not ask."""


class Startup:
    """Phases in the order in which they ended. Marked by one thread at a time."""

    def __init__(self, age_s: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        """``age_s``: how old the process is; that belongs to the first phase."""
        self._clock = clock
        self._last = clock() - age_s
        self._seconds: dict[str, float] = {}

    def mark(self, phase: str) -> None:
        """``phase`` has ended now. A phase that is named again grows."""
        now = self._clock()
        self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._last
        self._last = now

    @property
    def seconds(self) -> Mapping[str, float]:
        return dict(self._seconds)

    @property
    def total_s(self) -> float:
        return sum(self._seconds.values())

    def words(self) -> str:
        """As ``3.1 s (python 1.9, weights 1.2)``."""
        parts = ", ".join(f"{phase.replace('_', ' ')} {seconds:.1f}" for phase, seconds in self._seconds.items())
        return f"{self.total_s:.1f} s ({parts})"


def process_age_s(root: Path = Path("/")) -> float:
    """Seconds since this process began, to a hundredth; 0 where the system does not say. ``root``: where proc is."""
    try:
        after_name = (root / "proc/self/stat").read_text().rpartition(")")[2].split()
        began = int(after_name[19]) / os.sysconf("SC_CLK_TCK")  # field 22: ticks between boot and our start
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - began)
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0
