"""A scripted OpenAI-compatible server: it answers what the test says, when the test says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Script:
    """How requests are answered. ``gap_s`` before each token; at most ``slots`` requests at a time."""

    tokens: Callable[[dict[str, Any]], int] = lambda body: int(body["max_tokens"])
    first_s: float = 0.0
    gap_s: float = 0.0
    slots: int = 10_000
    status: int = 200
    error_after: int | None = None  # an error event in place of this token
    break_after: int | None = None  # the connection ends in place of this token
    usage: bool = True
    seen: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)


@asynccontextmanager
async def sse_server(script: Script) -> AsyncIterator[str]:
    """Serve on a loopback port; gives the URL."""
    slots = asyncio.Semaphore(script.slots)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            method, path, _ = head.split(" ", 2)
            script.paths.append(path)
            if method == "GET" and path == "/stream":
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\ndata: x")
                return
            if method == "GET":
                _plain(writer, 200, {"object": "list", "data": [{"id": "scripted"}]})
                return
            length = next(int(line.split(":")[1]) for line in head.splitlines() if line.lower().startswith("content-l"))
            body = json.loads(await reader.readexactly(length))
            script.seen.append(body)
            if script.status != 200:
                _plain(writer, script.status, {"error": {"message": "go away", "type": "x"}})
                return
            async with slots:
                await _stream(script, body, writer, chat=path.endswith("chat/completions"))
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client left
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


def _plain(writer: asyncio.StreamWriter, status: int, body: dict[str, Any]) -> None:
    data = json.dumps(body).encode()
    writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)


async def _stream(script: Script, body: dict[str, Any], writer: asyncio.StreamWriter, *, chat: bool) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
    count = script.tokens(body)
    if chat:
        _event(writer, {"choices": [{"delta": {"role": "assistant", "content": ""}}]})
    for number in range(count):
        await asyncio.sleep(script.first_s if number == 0 else script.gap_s)
        if script.error_after == number:
            _event(writer, {"error": {"message": "the instance is gone"}})
            break
        if script.break_after == number:
            return
        text = f" w{number}"
        _event(writer, {"choices": [{"delta": {"content": text}} if chat else {"text": text, "finish_reason": None}]})
        await writer.drain()
    _event(writer, {"choices": [{"text": "", "delta": {}, "finish_reason": "length"}]})
    if script.usage:
        _event(writer, {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": count}})
    _chunk(writer, b"data: [DONE]\n\n")
    writer.write(b"0\r\n\r\n")
    await writer.drain()


def _event(writer: asyncio.StreamWriter, message: dict[str, Any]) -> None:
    _chunk(writer, b"data: " + json.dumps(message).encode() + b"\n\n")


def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    """As one chunk, in two pieces: nothing says that events and chunks end together."""
    half = len(data) // 2
    for piece in (data[:half], data[half:]):
        writer.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
