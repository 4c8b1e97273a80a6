"""How far the loading of a model is, as log lines: at its start, at each tenth, never more often than it helps."""

from __future__ import annotations

import logging
import time

log = logging.getLogger(__name__)
SHORTEST_GAP_S = 1.0


class LoadProgress:
    """Called after each tensor with (bytes done, bytes in all or 0, what)."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._said_at = time.monotonic()
        self._tenth = 0
        log.info("loading %s", model)

    def __call__(self, done_bytes: int, total_bytes: int, what: str) -> None:
        tenth = 10 * done_bytes // total_bytes if total_bytes else 0
        now = time.monotonic()
        if tenth > self._tenth and now - self._said_at >= SHORTEST_GAP_S:
            self._tenth, self._said_at = tenth, now
            log.info("loading %s: %d %% of %.2f GB", self._model, 10 * tenth, total_bytes / 1e9)
