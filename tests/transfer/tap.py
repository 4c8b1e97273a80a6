"""A man in the middle of a link's control connection: passes frames on, changed as a test wants them.

Knows where frames begin and end, not what they say.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable

PREFIX = struct.Struct("<IIQ")
Edit = Callable[[int, bytes], list[bytes]]
"""What to pass on for frame number n of a connection, its 16 bytes of prefix included."""


def unchanged(number: int, frame: bytes) -> list[bytes]:
    return [frame]


class Tap:
    """Listens where a source dials, and dials the mover behind it. ``outward`` edits what the source says, ``back`` the
    answers; ``seen`` and ``answered`` hold what both said on the connection made last."""

    def __init__(self, behind: str) -> None:
        host, port = behind.split(":")
        self._behind = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.outward: Edit = unchanged
        self.back: Edit = unchanged
        self.seen: list[bytes] = []
        self.answered: list[bytes] = []
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, name="tap", daemon=True)]
        self._threads[0].start()

    def close(self) -> None:
        """End every connection and thread."""
        for sock in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        for thread in self._threads:
            thread.join(30.0)
            assert not thread.is_alive()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(self._behind, timeout=30.0)
            far.settimeout(None)
            self.seen, self.answered = [], []
            self._sockets += [near, far]
            for ends in ((near, far, self.seen, lambda *f: self.outward(*f)), (far, near, self.answered, self._back)):
                self._threads.append(threading.Thread(target=_pass, args=ends, name="tap", daemon=True))
                self._threads[-1].start()

    def _back(self, number: int, frame: bytes) -> list[bytes]:
        return self.back(number, frame)


def _pass(source: socket.socket, target: socket.socket, seen: list[bytes], edit: Edit) -> None:
    """Until either end closes; then both are."""
    held = b""
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            held += data
            while len(held) >= PREFIX.size and len(held) >= (end := PREFIX.size + PREFIX.unpack_from(held)[0]):
                frame, held = held[:end], held[end:]
                seen.append(frame)
                target.sendall(b"".join(edit(len(seen) - 1, frame)))
    for sock in (source, target):
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
