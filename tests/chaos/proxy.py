"""A TCP proxy between two processes, and what can be made to go wrong on it.

One ``Proxy`` stands before one listening port. Troubles are laid on it for a while and apply to the connections that
stand and to those that come; who dialled a connection is found in /proc, so that a trouble can be between two
processes only. Knows bytes, no protocol.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

CHUNK = 1 << 16
LINGER_NONE = struct.pack("ii", 1, 0)
"""A socket that is closed with this set says RST and not FIN."""


class Way(StrEnum):
    """A direction of a connection, seen from who dialled."""

    OUT = "out"
    BACK = "back"


BOTH = (Way.OUT, Way.BACK)


@dataclass(slots=True, eq=False)
class Trouble:
    """What happens to bytes that go a way while it lasts: held back entirely, or slowed."""

    ways: tuple[Way, ...] = BOTH
    dialler: str = ""  # only connections that this process dialled; empty: all
    hold: bool = False
    delay_s: float = 0.0  # for each chunk
    bytes_per_s: float = 0.0  # 0: no limit
    over: asyncio.Event = field(default_factory=asyncio.Event)

    def hits(self, dialler: str, way: Way) -> bool:
        return way in self.ways and self.dialler in ("", dialler)

    def pause_s(self, nbytes: int) -> float:
        return self.delay_s + (nbytes / self.bytes_per_s if self.bytes_per_s else 0.0)


@dataclass(slots=True, eq=False)
class Connection:
    """One connection through a proxy: two sockets, two pumps."""

    dialler: str
    writers: dict[Way, asyncio.StreamWriter]  # where bytes of a way go
    closed: set[Way] = field(default_factory=set)

    def reset(self) -> None:
        """Break it at both ends, as a middlebox does that forgot it."""
        for writer in self.writers.values():
            raw = writer.get_extra_info("socket")
            with contextlib.suppress(OSError):
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_NONE)
            writer.transport.abort()

    def half_close(self, way: Way) -> None:
        """Tell the end that bytes go to that no more will come; what comes for it is dropped."""
        self.closed.add(way)
        writer = self.writers[way]
        if not writer.is_closing() and writer.can_write_eof():
            with contextlib.suppress(OSError):
                writer.write_eof()


class Proxy:
    """See the module. ``who`` names the process that owns a local port; ``upstream`` may change while it runs."""

    def __init__(self, name: str, who: Callable[[int], str] = lambda port: "") -> None:
        self.name = name
        self.upstream: tuple[str, int] | None = None
        self.carried = 0  # bytes
        self.connections: dict[Connection, None] = {}
        self._who = who
        self._troubles: list[Trouble] = []
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen on a free port of the loopback."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)

    @property
    def port(self) -> int:
        assert self._server is not None, "the proxy has been started"
        return int(self._server.sockets[0].getsockname()[1])

    @property
    def address(self) -> str:
        """``host:port`` to dial."""
        return f"127.0.0.1:{self.port}"

    def leads_to(self, address: str) -> None:
        """Where connections go from now on: ``host:port``."""
        host, _, port = address.rpartition(":")
        self.upstream = (host, int(port))

    @contextlib.contextmanager
    def trouble(self, trouble: Trouble) -> Iterator[Trouble]:
        """Lay a trouble on the proxy for as long as the block lasts."""
        self._troubles.append(trouble)
        try:
            yield trouble
        finally:
            self._troubles.remove(trouble)
            trouble.over.set()

    def hit(self, dialler: str = "") -> list[Connection]:
        """The connections that stand now, of one dialler or of all."""
        return [c for c in self.connections if dialler in ("", c.dialler)]

    async def stop(self) -> None:
        """Reset everything and stop listening."""
        if self._server is None:
            return
        self._server.close()
        for trouble in self._troubles:
            trouble.over.set()
        for connection in list(self.connections):
            connection.reset()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        dialler = self._who(writer.get_extra_info("peername")[1])
        try:
            if self.upstream is None:
                raise ConnectionRefusedError
            back, out = await asyncio.open_connection(*self.upstream)
        except OSError:
            Connection(dialler, {Way.BACK: writer}).reset()
            return
        connection = Connection(dialler, {Way.OUT: out, Way.BACK: writer})
        self.connections[connection] = None
        pumps = [
            asyncio.ensure_future(self._pump(connection, Way.OUT, reader)),
            asyncio.ensure_future(self._pump(connection, Way.BACK, back)),
        ]
        try:
            await asyncio.gather(*pumps)
        except (OSError, asyncio.CancelledError):
            connection.reset()
        finally:
            for pump in pumps:
                pump.cancel()
            del self.connections[connection]
            for each in connection.writers.values():
                each.close()

    async def _pump(self, connection: Connection, way: Way, reader: asyncio.StreamReader) -> None:
        """Carry one way until its end, which is carried on as well."""
        writer = connection.writers[way]
        while data := await reader.read(CHUNK):
            await self._held(connection, way, len(data))
            if way in connection.closed:
                continue
            self.carried += len(data)
            writer.write(data)
            await writer.drain()
        await self._held(connection, way, 0)
        connection.half_close(way)

    async def _held(self, connection: Connection, way: Way, nbytes: int) -> None:
        """Wait for as long as the troubles of the moment want it."""
        while holding := [t for t in self._troubles if t.hold and t.hits(connection.dialler, way)]:
            await holding[0].over.wait()
        pause = sum(t.pause_s(nbytes) for t in self._troubles if t.hits(connection.dialler, way))
        if pause:
            await asyncio.sleep(pause)


def owner_of_port(port: int, processes: dict[int, str]) -> str:
    """The name of the process (of those given, by pid) that holds the connected local TCP port; empty if none does."""
    inode = _inode(port)
    for pid, name in processes.items() if inode else ():
        with contextlib.suppress(OSError):
            for fd in Path(f"/proc/{pid}/fd").iterdir():
                if fd.readlink().name == f"socket:[{inode}]":
                    return name
    return ""


def _inode(port: int) -> str:
    wanted = f":{port:04X}"
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):  # gRPC dials IPv4 from IPv6 sockets
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[1].endswith(wanted) and fields[3] == "01":  # established
                return fields[9]
    return ""
