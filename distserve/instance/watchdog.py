"""Notices a step that hangs: heartbeats go on then, and the instance would be taken for healthy for ever.

One thread, blocked while no step runs; while steps run it wakes once a limit, not once a step.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from distserve.core.types import StepPlan
from distserve.instance.ports import Engine, StepOutput

CLOSE_S = 1.0
"""How long ``close`` waits for the watching thread, which has nothing to finish."""

PAUSE_SHARE = 0.1
"""A wait that ends by this share of the limit too late was a pause of the process (stopped, or its machine asleep)."""


class WatchedEngine:
    """An engine whose oldest outstanding step is watched, from when it was submitted or the one before it ended.

    ``late`` is called once, from the watching thread, with a sentence.
    """

    def __init__(
        self, engine: Engine, limit_s: float, late: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._engine = engine
        self._limit_s = limit_s
        self._late = late
        self._clock = clock
        self._outstanding: deque[int] = deque()  # step numbers
        self._running: tuple[int, float] | None = None  # the oldest, when it began; one store, so never half seen
        self._asleep = False
        self._closed = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="step-watch", daemon=True)
        self._thread.start()

    @property
    def depth(self) -> int:
        return self._engine.depth

    def submit(self, plan: StepPlan) -> None:
        """As the engine's own."""
        self._outstanding.append(plan.number)
        if len(self._outstanding) == 1:
            self._running = (plan.number, self._clock())
            if self._asleep:
                self._wake.set()
        self._engine.submit(plan)

    def wait(self) -> StepOutput:
        """As the engine's own."""
        try:
            return self._engine.wait()
        finally:
            self._outstanding.popleft()
            self._running = (self._outstanding[0], self._clock()) if self._outstanding else None

    def give_up(self, number: int) -> None:
        """As the engine's own."""
        self._engine.give_up(number)

    def close(self) -> None:
        """Watch no more, and wait for the thread. Idempotent."""
        self._closed = True
        self._wake.set()
        self._thread.join(CLOSE_S)

    def _watch(self) -> None:
        watched, paused_s = None, 0.0
        while not self._closed:
            running = self._running
            if running is None:
                self._sleep()
                continue
            if running is not watched:
                watched, paused_s = running, 0.0
            number, began = running
            left = began + self._limit_s + paused_s - self._clock()
            if left > 0:
                paused_s += self._overslept(min(left, threading.TIMEOUT_MAX))
            elif self._running is running:
                self._late(
                    f"step {number} has run for {self._limit_s:g} s and counts as hung; if it is only slow, "
                    "give steps more time with --step-timeout"
                )
                return

    def _overslept(self, seconds: float) -> float:
        """Wait; how much longer it took when the whole process did not run meanwhile, which is not the step's fault."""
        until = self._clock() + seconds
        self._wait(seconds)
        over = self._clock() - until
        return over if over > PAUSE_SHARE * self._limit_s else 0.0

    def _sleep(self) -> None:
        """Block until a step begins."""
        self._asleep = True
        if self._running is None:  # one that began meanwhile may not have seen us asleep
            self._wait(None)
        self._asleep = False

    def _wait(self, seconds: float | None) -> None:
        self._wake.wait(seconds)
        self._wake.clear()
