"""One child process: started without a fork of ours, heard through its ready descriptor, ended with all it started.

Python's own ``subprocess`` starts it (vfork, where there is one) and not the event loop: uvloop forks, and between fork
and exec gRPC's handlers for forks would start threads in the child, which crash it now and then.

The child is told of our death by the end of file on its parent descriptor (``distserve.wire.life``), so that even a
killed launcher leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

_LINE_BYTES = 1 << 16
KILL_AFTER_S = 5.0
"""Beyond its own grace, how long a child may take to end before it is killed."""


class Child:
    """A running ``distserve`` process in a session of its own. Made by ``start``."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], alive_fd: int) -> None:
        self.name = name
        self._process = process
        self._exit = _exit_of(process)
        self._alive_fd = alive_fd
        self._lines = asyncio.StreamReader()  # until ``start`` has opened the ready descriptor

    @classmethod
    async def start(
        cls, name: str, arguments: Sequence[str], environ: Mapping[str, str], module: str = "distserve.cli"
    ) -> Child:
        """Run ``python -m MODULE ARGUMENTS`` with a ready and a parent descriptor."""
        ready_read, ready_write = os.pipe()
        parent_read, parent_write = os.pipe()
        try:
            process = _spawned(module, arguments, environ, ready_write, parent_read)
        except BaseException:
            os.close(ready_read)
            os.close(parent_write)
            raise
        finally:
            os.close(ready_write)
            os.close(parent_read)
        child = cls(name, process, parent_write)
        try:
            child._lines = await _reader(ready_read)
        except BaseException:
            child.kill()
            await child.ended()
            raise
        return child

    @property
    def pid(self) -> int:
        return self._process.pid

    async def lines(self) -> AsyncIterator[dict[str, Any]]:
        """What the child tells of itself, until it has ended."""
        while line := await self._lines.readline():
            with contextlib.suppress(json.JSONDecodeError):  # a line cut short by its death
                yield json.loads(line)

    async def ended(self) -> int:
        """Wait for its end; returns the exit code, negative for a signal. Frees what we hold for it."""
        code = await asyncio.shield(self._exit)
        self.hurry()
        self._signal_all(signal.SIGKILL)  # whatever it had started and did not end
        return code

    def ask_to_end(self) -> None:
        """SIGTERM."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()

    def hurry(self) -> None:
        """Let go of its parent descriptor: it stops at once, without grace but in order. Idempotent."""
        if self._alive_fd >= 0:
            os.close(self._alive_fd)
            self._alive_fd = -1

    def kill(self) -> None:
        """End it and everything it started, now."""
        self._signal_all(signal.SIGKILL)

    async def end(self, grace_s: float) -> int:
        """Ask it to end, wait, and kill it when it takes longer than its grace and a little more."""
        self.ask_to_end()
        if grace_s <= 0:
            self.hurry()
        try:
            async with asyncio.timeout(grace_s + KILL_AFTER_S):
                await asyncio.shield(self._exit)
        except TimeoutError:
            self.kill()
        return await self.ended()

    def _signal_all(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)


def _spawned(
    module: str, arguments: Sequence[str], environ: Mapping[str, str], ready_fd: int, parent_fd: int
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments, "--ready-fd", str(ready_fd), "--parent-fd", str(parent_fd)],
        stdin=subprocess.DEVNULL,
        pass_fds=(ready_fd, parent_fd),
        start_new_session=True,  # a Ctrl-C at the terminal is ours to pass on
        env=dict(environ),
    )


def _exit_of(process: subprocess.Popen[bytes]) -> asyncio.Future[int]:
    """Becomes the exit code, negative for a signal. A thread waits for it, which dies with us."""
    loop = asyncio.get_running_loop()
    known: asyncio.Future[int] = loop.create_future()

    def wait() -> None:
        code = process.wait()
        with contextlib.suppress(RuntimeError):  # the loop has ended before the child
            loop.call_soon_threadsafe(known.set_result, code)

    threading.Thread(target=wait, name=f"child {process.pid}", daemon=True).start()
    return known


async def _reader(fd: int) -> asyncio.StreamReader:
    """The read end of a pipe as a stream; the transport closes the descriptor at its end."""
    reader = asyncio.StreamReader(limit=_LINE_BYTES)
    pipe = os.fdopen(fd, "rb", buffering=0)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
    return reader
