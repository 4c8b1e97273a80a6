"""A cluster in a process of its own, started with ``distserve serve`` and stopped with its block.

For the demo, benchmarks and tests: whoever wants a real cluster and its ready line, and nothing left behind, even if
they are killed themselves: the cluster hears of that through its parent descriptor (``distserve.wire.life``).
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import IO, Any

STOP_S = 30.0
END_S = 5.0
"""How long a process may take to be gone once it has closed its output."""


class ClusterFailed(RuntimeError):
    """The cluster did not become ready, or ended badly; the text is for the user."""


class Cluster:
    """``with Cluster([...]) as cluster`` – ``cluster.ready`` is the ready line (see ``launch.serve.ready_facts``)."""

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        environ: Mapping[str, str] | None = None,
        start_timeout_s: float = 300.0,
        log: IO[Any] | None = None,
    ) -> None:
        """``arguments`` of ``distserve serve``; ports of 0 where none is named. ``log``: where stderr goes."""
        ports = [p for flag in ("--http-port", "--grpc-port") if flag not in arguments for p in (flag, "0")]
        self._command = [sys.executable, "-m", "distserve.cli", "serve", *arguments, *ports, "--print-ready"]
        self._environ = dict(os.environ if environ is None else environ)
        self._start_timeout_s = start_timeout_s
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._alive_fd = -1
        self.ready: dict[str, Any] = {}

    @property
    def http_url(self) -> str:
        return str(self.ready["http_url"])

    @property
    def grpc_address(self) -> str:
        return str(self.ready["grpc_address"])

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "the cluster has been started"
        return self._process

    def __enter__(self) -> Cluster:
        parent_read, self._alive_fd = os.pipe()
        try:
            self._process = subprocess.Popen(
                [*self._command, "--parent-fd", str(parent_read)],
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=self._environ,
                pass_fds=(parent_read,),
                start_new_session=True,
            )
        except BaseException:
            self._let_go()
            raise
        finally:
            os.close(parent_read)
        try:
            self.ready = self._read_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def stop(self, stop_s: float = STOP_S) -> int:
        """SIGTERM, and SIGKILL after ``stop_s``; returns the exit code. Idempotent."""
        process = self.process
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            return process.wait(stop_s)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()
        finally:
            if process.stdout is not None:
                process.stdout.close()
            self._let_go()

    def _let_go(self) -> None:
        """Close our end of the parent descriptor. Idempotent."""
        if self._alive_fd >= 0:
            os.close(self._alive_fd)
            self._alive_fd = -1

    def _read_ready(self) -> dict[str, Any]:
        process = self.process
        assert process.stdout is not None
        deadline = time.monotonic() + self._start_timeout_s
        heard = b""
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while b"\n" not in heard:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise ClusterFailed(f"the cluster was not ready after {self._start_timeout_s:g} s")
                data = os.read(process.stdout.fileno(), 1 << 16)
                if not data:
                    raise ClusterFailed(self._why_silent())
                heard += data
        return dict(json.loads(heard.split(b"\n", 1)[0]))

    def _why_silent(self) -> str:
        """What became of a cluster that closed its stdout; one that lives on for all that is not waited for."""
        try:
            return f"the cluster ended with code {self.process.wait(END_S)} before it was ready"
        except subprocess.TimeoutExpired:
            return "the cluster closed its output before it was ready, and went on"
