"""Prometheus text: a process's own, several processes' as one, and a small server for processes without HTTP.

The server is for probes and scrapes on an operations port: GET /metrics, /livez, /readyz. Knows no machine.
"""

from __future__ import annotations

import asyncio
import resource
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_REQUEST_TIMEOUT_S = 5.0
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024


class ProcessCost(Collector):
    """CPU seconds and peak memory of this process, labelled with who it is."""

    def __init__(self, process: str) -> None:
        self._process = process

    def collect(self) -> Iterator[Metric]:
        used = resource.getrusage(resource.RUSAGE_SELF)
        cpu = CounterMetricFamily("distserve_process_cpu_seconds", "CPU time used", labels=["process"])
        cpu.add_metric([self._process], used.ru_utime + used.ru_stime)
        yield cpu
        peak = GaugeMetricFamily("distserve_process_peak_memory_bytes", "Most memory held so far", labels=["process"])
        peak.add_metric([self._process], used.ru_maxrss * _RSS_UNIT)
        yield peak


def text(registry: CollectorRegistry) -> bytes:
    """The registry in Prometheus's text format, without the series that only tell when a counter was made."""
    disable_created_metrics()  # type: ignore[no-untyped-call]
    return generate_latest(registry)


def merge(texts: Iterable[bytes]) -> bytes:
    """Several processes' texts as one, each family told once. Their samples must differ in labels."""
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for one in texts:
        family = ""
        seen_here: set[str] = set()
        for line in one.decode().splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                family = line.split(" ", 3)[2]
                if family not in heads or family in seen_here:
                    seen_here.add(family)
                    heads.setdefault(family, []).append(line)
                samples.setdefault(family, [])
            elif line:
                samples.setdefault(family, []).append(line)
    lines = [line for family in samples for line in (*heads.get(family, ()), *samples[family])]
    return ("\n".join(lines) + "\n").encode() if lines else b""


async def scrape(host: str, port: int, timeout_s: float) -> bytes:
    """The metrics page of an ``OpsServer``. Raises ``OSError``, ``TimeoutError``, ``asyncio.IncompleteReadError``."""
    async with asyncio.timeout(timeout_s):
        reader, writer = await asyncio.open_connection(host, port)
        try:
            writer.write(f"GET /metrics HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            await reader.readuntil(b"\r\n\r\n")
            return await reader.read()
        finally:
            writer.close()


class OpsServer:
    """GET /metrics, /livez and /readyz for kubelets and Prometheus. Runs on the asyncio loop that starts it."""

    def __init__(
        self, exposition: Callable[[], Awaitable[bytes]], alive: Callable[[], bool], ready: Callable[[], bool]
    ) -> None:
        self._exposition = exposition
        self._alive = alive
        self._ready = ready
        self._server: asyncio.Server | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen; returns the port (0 takes any). Raises ``OSError`` when it is in use."""
        self._server = await asyncio.start_server(self._serve, host, port)
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()
            self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_REQUEST_TIMEOUT_S):
                head = await reader.readuntil(b"\r\n\r\n")
                method, path, *_ = head.split(b" ", 2)
                status, body = await self._answer(method, path.split(b"?")[0])
                writer.write(
                    f"HTTP/1.1 {status}\r\nContent-Type: {CONTENT_TYPE}\r\nContent-Length: {len(body)}\r\n"
                    "Connection: close\r\n\r\n".encode()
                    + body
                )
                await writer.drain()
        except (TimeoutError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError):
            pass  # a client that speaks no HTTP, or left
        finally:
            writer.close()

    async def _answer(self, method: bytes, path: bytes) -> tuple[str, bytes]:
        if method != b"GET":
            return "405 Method Not Allowed", b"GET only\n"
        match path:
            case b"/metrics":
                return "200 OK", await self._exposition()
            case b"/livez":
                return _health(self._alive())
            case b"/readyz":
                return _health(self._ready())
            case _:
                return "404 Not Found", b"/metrics, /livez and /readyz are served here\n"


def _health(good: bool) -> tuple[str, bytes]:
    return ("200 OK", b"ok\n") if good else ("503 Service Unavailable", b"not now\n")
