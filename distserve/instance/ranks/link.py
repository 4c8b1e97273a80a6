"""One connection between rank 0 and another rank: length-prefixed frames on a socket, read by one thread at each end.

Whoever has nothing to say or to hear blocks; there are no heartbeats, for the system closes a dead process's socket.
Knows no frame's meaning.
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import socket
import struct
import threading

from google.protobuf.message import DecodeError

from distserve.v1 import ranks_pb2 as pb

MAX_FRAME_BYTES = 256 << 20
"""A step of 8192 sequences of a million tokens each would not fit; all that runs does."""

NONCE_BYTES = 32
_LENGTH = struct.Struct("<I")


class LinkClosed(Exception):
    """The other end is gone, or said what is no frame."""


class RankLink:
    """Frames over a connected socket, which it owns. Any thread sends; one receives."""

    def __init__(self, sock: socket.socket, send_s: float) -> None:
        sock.settimeout(None)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _watch_for_lost_hosts(sock)
        seconds, micros = int(send_s), int(send_s % 1 * 1e6)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", seconds, micros))
        self._sock = sock
        self._sending = threading.Lock()

    def send(self, frame: pb.RankFrame) -> None:
        """Send a frame. LinkClosed when the other end is gone or takes nothing."""
        data = frame.SerializeToString()
        try:
            with self._sending:
                self._sock.sendall(_LENGTH.pack(len(data)) + data)
        except OSError as error:
            raise LinkClosed(error.strerror or "the connection broke") from None

    def receive(self, timeout_s: float | None = None) -> pb.RankFrame:
        """Wait for the next frame, for ever when there is no timeout. LinkClosed."""
        try:
            self._sock.settimeout(timeout_s)
            (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
            if length > MAX_FRAME_BYTES:
                raise LinkClosed(f"a frame of {length} bytes was announced")
            return pb.RankFrame.FromString(self._read(length))
        except TimeoutError:
            raise LinkClosed(f"it said nothing for {timeout_s:g} s") from None
        except (OSError, DecodeError) as error:
            raise LinkClosed(str(error) or "the connection broke") from None

    def close(self) -> None:
        """Break the connection and wake who reads it. From any thread, any number of times."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _read(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            part = self._sock.recv(min(count - len(data), 1 << 20))
            if not part:
                raise LinkClosed("it closed the connection")
            data += part
        return bytes(data)


def fresh_nonce() -> bytes:
    """A challenge."""
    return secrets.token_bytes(NONCE_BYTES)


def proof(key: bytes, nonce: bytes, rank: int) -> bytes:
    """What shows that a rank knows the instance's key."""
    return hmac.digest(key, b"distserve rank %d\0" % rank + nonce, "sha256")


def _watch_for_lost_hosts(sock: socket.socket) -> None:
    """Notice, within about half a minute, a host that went away without a word while nothing is said."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
