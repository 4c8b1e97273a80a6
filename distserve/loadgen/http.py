"""A streamed POST over HTTP/1.1: one connection a request, server-sent events out, each with the time it came.

Written for measuring: a C parser and nothing between the socket and the clock. Knows no OpenAI.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

import httptools
import orjson

_READ_BYTES = 1 << 16
_ERROR_BYTES = 2000


class HttpFailed(Exception):
    """The server answered with an error status, broke off, or spoke no HTTP."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Target:
    """Where a server listens, taken from a URL such as ``http://127.0.0.1:8000``."""

    host: str
    port: int
    path: str
    tls: ssl.SSLContext | None

    @classmethod
    def parse(cls, url: str, ca: str = "") -> Target:
        """``ca``: file of the CA to trust for https; empty: the system's. Raises ``ValueError`` with a sentence."""
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is no http:// or https:// address; give one like http://127.0.0.1:8000")
        tls = None
        if parts.scheme == "https":
            try:
                tls = ssl.create_default_context(cafile=None if ca in ("", "system") else ca)
            except OSError as error:
                raise ValueError(f"{ca} holds no CA certificate: {error.strerror or error}") from error
        return cls(parts.hostname, parts.port or (443 if tls else 80), parts.path.rstrip("/"), tls)


class _Answer:
    """Collects what the parser finds: status, and the body not yet taken."""

    def __init__(self) -> None:
        self.body = bytearray()
        self.complete = False

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        self.complete = True


async def post_events(
    target: Target, path: str, body: object, headers: Mapping[str, str], timeout_s: float
) -> AsyncIterator[tuple[float, bytes]]:
    """POST JSON and yield (``time.perf_counter()`` of arrival, data) for each event, ``[DONE]`` included.

    A server that answers in one JSON body yields it as one event. Raises ``HttpFailed``, ``TimeoutError``, ``OSError``.
    """
    async with asyncio.timeout(timeout_s):
        reader, writer = await asyncio.open_connection(target.host, target.port, ssl=target.tls)
        try:
            writer.write(_request("POST", target, path, headers, orjson.dumps(body)))
            async for event in _events(reader):
                yield event
        finally:
            writer.close()


async def get_json(target: Target, path: str, headers: Mapping[str, str], timeout_s: float) -> object:
    """GET a JSON document. Raises like ``post_events``, and ``HttpFailed`` when it is none."""
    async with asyncio.timeout(timeout_s):
        reader, writer = await asyncio.open_connection(target.host, target.port, ssl=target.tls)
        try:
            writer.write(_request("GET", target, path, headers, b""))
            answer, parser = _Answer(), None
            parser = httptools.HttpResponseParser(answer)
            while not answer.complete and (data := await reader.read(_READ_BYTES)):
                _feed(parser, data)
            if parser.get_status_code() != 200:
                raise HttpFailed(_error_words(parser.get_status_code(), answer.body), parser.get_status_code())
            try:
                return orjson.loads(bytes(answer.body))
            except orjson.JSONDecodeError as error:
                raise HttpFailed(f"{path} did not answer with JSON: {error}") from error
        finally:
            writer.close()


def _request(method: str, target: Target, path: str, headers: Mapping[str, str], body: bytes) -> bytes:
    lines = [
        f"{method} {target.path}{path} HTTP/1.1",
        f"Host: {target.host}:{target.port}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Connection: close",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


def _feed(parser: httptools.HttpResponseParser, data: bytes) -> None:
    try:
        parser.feed_data(data)
    except httptools.HttpParserError as error:
        raise HttpFailed(f"the answer is no HTTP: {error}") from error


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[tuple[float, bytes]]:
    answer = _Answer()
    parser = httptools.HttpResponseParser(answer)
    while not answer.complete:
        data = await reader.read(_READ_BYTES)
        came = time.perf_counter()
        if not data:
            raise HttpFailed("the server broke off in the middle of an answer")
        _feed(parser, data)
        if not answer.body or _is_error(parser):
            continue
        *lines, rest = bytes(answer.body).split(b"\n")
        answer.body[:] = rest
        for line in lines:
            if line.startswith(b"data:"):
                yield came, line[5:].strip()
            elif line.startswith(b"{"):
                yield came, line
    if _is_error(parser):
        raise HttpFailed(_error_words(parser.get_status_code(), answer.body), parser.get_status_code())
    if rest := bytes(answer.body).strip():
        yield time.perf_counter(), rest.removeprefix(b"data:").strip()


def _is_error(parser: httptools.HttpResponseParser) -> bool:
    return bool(parser.get_status_code() >= 400)


def _error_words(status: int, body: bytearray) -> str:
    text = bytes(body[:_ERROR_BYTES]).decode(errors="replace").strip()
    try:
        told = orjson.loads(bytes(body))
        error = told.get("error", told) if isinstance(told, dict) else told
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except orjson.JSONDecodeError:
        pass
    return f"HTTP {status}: {text}"
