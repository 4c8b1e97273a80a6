"""A process's two ties to whoever started it: how it says what it bound, and how it learns that it must end.

*Ready descriptor.* A process prints nothing on stdout. When ``ready_fd`` (the write end of an inherited pipe) is given,
it writes JSON lines there, each with ``event``, ``kind`` (``controller | gateway | instance``), ``id`` and ``pid``:

``bound``   ports are open: ``address`` (gRPC host:port), for an instance also ``data_address``, ``incarnation``,
            ``role``, and ``own_address`` and ``own_data_address``, where it listens, which ``--advertise`` may hide;
            for a gateway ``http_port``, ``grpc_port`` (null when off), and ``controller_address``; for an instance and
            a controller ``ops_port`` (null when off).
``joined``  instance only: the controller took it in.
``ready``   gateway only: a canary went through the cluster (again, after a time of not being ready).

A reader ignores events and keys that it does not know. The descriptor stays open for the life of the process.

*Parent descriptor.* When ``parent_fd`` (the read end of an inherited pipe whose write end only the parent holds) is
given, its end of file means that the parent is gone; the process then stops as it would on SIGTERM, without grace.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
import signal
import time
from collections.abc import Callable, Coroutine
from typing import Any

log = logging.getLogger(__name__)
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def fresh_incarnation() -> int:
    """A number (63 bits) for a new life: the time in ms, so that later lives compare greater, and 20 random bits."""
    return (time.time_ns() // 1_000_000) << 20 | secrets.randbits(20)


def tell(ready_fd: int | None, event: str, kind: str, ident: str, **facts: Any) -> None:
    """Write one line to the ready descriptor, if there is one. A parent that went away is not an error here."""
    if ready_fd is None:
        return
    line = json.dumps({"event": event, "kind": kind, "id": ident, "pid": os.getpid(), **facts}) + "\n"
    os.set_blocking(ready_fd, False)
    with contextlib.suppress(BrokenPipeError, BlockingIOError):  # the reader is gone, or does not read
        os.write(ready_fd, line.encode())


def watched(work: Coroutine[Any, Any, None], broke: Callable[[BaseException], None]) -> asyncio.Task[None]:
    """A task that lives as long as its process should; ``broke`` is called if it ends with an error."""

    def on_end(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.critical("a part of this process broke", exc_info=error)
            broke(error)

    task = asyncio.ensure_future(work)
    task.add_done_callback(on_end)
    return task


class Ending:
    """That the process should end, and how patiently. Lives on one asyncio loop.

    The first SIGTERM or SIGINT asks to end with grace; a second, or the parent's death, asks to end at once.
    """

    def __init__(self, parent_fd: int | None = None, on_urgent: Callable[[], None] | None = None) -> None:
        self.asked = asyncio.Event()
        self.urgent = asyncio.Event()
        self._on_urgent = on_urgent
        self._parent_fd = parent_fd
        self._loop = asyncio.get_running_loop()
        for number in SIGNALS:
            self._loop.add_signal_handler(number, self._on_signal)
        if parent_fd is not None:
            self._loop.add_reader(parent_fd, self._on_parent)

    def ask(self, *, urgent: bool = False) -> None:
        """End the process, for a reason of its own."""
        if urgent and not self.urgent.is_set():
            self.urgent.set()
            if self._on_urgent is not None:
                self._on_urgent()
        self.asked.set()

    def close(self) -> None:
        """Give signals and the parent descriptor back to their defaults."""
        for number in SIGNALS:
            self._loop.remove_signal_handler(number)
        if self._parent_fd is not None:
            self._loop.remove_reader(self._parent_fd)

    def _on_signal(self) -> None:
        self.ask(urgent=self.asked.is_set())

    def _on_parent(self) -> None:
        assert self._parent_fd is not None
        if os.read(self._parent_fd, 4096) == b"":
            self._loop.remove_reader(self._parent_fd)
            self._parent_fd = None
            self.ask(urgent=True)
