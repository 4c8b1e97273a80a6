"""A controller that runs alone can be watched: /metrics, /livez and /readyz on its operations port."""

from __future__ import annotations

import asyncio
import signal
import socket

from distserve.observe.exposition import scrape
from tests.shells.cluster import start


async def status(port: int, path: str) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    async with asyncio.timeout(20):
        line = await reader.readline()
    writer.close()
    return line.split(b" ", 1)[1].strip()


async def test_a_controller_alone_has_metrics_and_health() -> None:
    part = start("controller", ops_port=0, log_level="warning")
    try:
        facts = await part.said("bound")
        page = await scrape("127.0.0.1", facts["ops_port"], 20.0)
        assert b'distserve_process_cpu_seconds_total{process="controller"}' in page
        assert b"distserve_" in page
        assert await status(facts["ops_port"], "/livez") == b"200 OK"
        assert await status(facts["ops_port"], "/readyz") == b"200 OK"
        part.process.send_signal(signal.SIGTERM)
        assert await part.ended() == 0
    finally:
        part.close()


async def test_an_operations_port_that_is_taken_is_an_error_and_off_is_off() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        part = start("controller", ops_port=taken.getsockname()[1], log_level="error")
        try:
            assert await part.ended() == 2
        finally:
            part.close()
    part = start("controller", log_level="error")
    try:
        assert (await part.said("bound"))["ops_port"] is None
    finally:
        part.close()
