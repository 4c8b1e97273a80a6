"""Frames on a socket, each behind its length and its checksum. Knows no handshake and no stage.

A changed byte anywhere in a frame or before it is noticed, and ends the connection: where the next frame begins is not
known any more.

One thread reads, writes and closes a channel; any thread may ``interrupt`` it, which wakes that one. Every wait but an
idle one has a deadline, and a frame's size is bounded before it is read.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time

import xxhash
from google.protobuf.message import DecodeError

from distserve.transfer.errors import Garbled, PeerGone, Stalled
from distserve.v1 import transfer_pb2 as pb

MAX_FRAME_BYTES = 64 << 10
_PREFIX = struct.Struct("<IIQ")  # length, its complement, XXH3-64 of the frame
_COMPLEMENT = (1 << 32) - 1
_READ_BYTES = 64 << 10


class Channel:
    """Frames over one connected TCP socket, which it owns."""

    def __init__(self, sock: socket.socket, send_s: float) -> None:
        self._sock = sock
        self._send_s = send_s
        self._buffer = bytearray()
        self._shut = socket.SHUT_RDWR  # what an interruption does to the socket
        self._interrupted = False
        _make_prompt(sock)

    @property
    def local_host(self) -> str:
        """The address of this end's interface towards the peer."""
        return str(self._sock.getsockname()[0])

    @property
    def remote_host(self) -> str:
        return str(self._sock.getpeername()[0])

    def send(self, frame: pb.TransferFrame) -> None:
        """Send a frame; PeerGone or Stalled if it cannot be."""
        data = frame.SerializeToString()
        self._check()
        try:
            self._sock.settimeout(self._send_s)
            self._sock.sendall(_PREFIX.pack(len(data), len(data) ^ _COMPLEMENT, _digest(data)) + data)
        except TimeoutError:
            raise Stalled(f"the peer took no bytes for {self._send_s:g} s") from None
        except OSError as error:
            raise PeerGone(f"the connection broke: {error.strerror or error}") from None

    def receive(self, timeout_s: float | None) -> pb.TransferFrame:
        """Wait for the next frame, forever when ``timeout_s`` is None; PeerGone, Stalled or Garbled."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while (frame := self._parse()) is None:
            self._fill(deadline)
        return frame

    def receive_ready(self) -> pb.TransferFrame | None:
        """The next frame if it has arrived; never waits."""
        while (frame := self._parse()) is None:
            if not self._fill_ready():
                return None
        return frame

    def is_open(self) -> bool:
        """False when the peer is known to have closed; what it said before is kept."""
        try:
            while self._fill_ready():
                continue
        except PeerGone:
            return False
        return True

    def interrupt(self) -> None:
        """Break the connection and wake whoever waits here. From any thread, at any time, any number of times."""
        self._interrupted = True  # for a socket that is shut for reading still gives what comes
        with contextlib.suppress(OSError):
            self._sock.shutdown(self._shut)

    def end_by_closing(self) -> None:
        """From now on only ``close``, or our death, ends the connection for the peer: it takes that for word that we
        hold nothing of its any more. ``interrupt`` still wakes whoever waits here."""
        self._shut = socket.SHUT_RD

    def watch(self) -> socket.socket:
        """The same connection once more, for the caller to own: to ask later whether the peer has closed it."""
        return self._sock.dup()

    def close(self) -> None:
        """Release the socket. Only from the thread that reads and writes, or when there is none any more."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _parse(self) -> pb.TransferFrame | None:
        if len(self._buffer) < _PREFIX.size:
            return None
        length, complement, digest = _PREFIX.unpack_from(self._buffer)
        if length ^ complement != _COMPLEMENT:
            raise Garbled("bytes that are no frame's beginning")
        if length > MAX_FRAME_BYTES:
            raise Garbled(f"a frame of {length} bytes was announced; at most {MAX_FRAME_BYTES} are allowed")
        end = _PREFIX.size + length
        if len(self._buffer) < end:
            return None
        data = bytes(self._buffer[_PREFIX.size : end])
        del self._buffer[:end]
        if _digest(data) != digest:
            raise Garbled("a frame whose bytes changed on the way")
        try:
            return pb.TransferFrame.FromString(data)
        except DecodeError:
            raise Garbled("bytes that are no frame") from None

    def _fill(self, deadline: float | None) -> None:
        """Wait for bytes until ``deadline`` on the monotonic clock, forever when None."""
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            raise Stalled("the peer said nothing before the deadline")
        try:
            self._sock.settimeout(left)
            data = self._sock.recv(_READ_BYTES)
        except TimeoutError:
            raise Stalled("the peer said nothing before the deadline") from None
        except OSError as error:
            raise PeerGone(f"the connection broke: {error.strerror or error}") from None
        self._take(data)

    def _fill_ready(self) -> bool:
        """Take what has arrived; False if nothing has."""
        try:
            self._sock.settimeout(0)
            data = self._sock.recv(_READ_BYTES)
        except BlockingIOError:
            return False
        except OSError as error:
            raise PeerGone(f"the connection broke: {error.strerror or error}") from None
        self._take(data)
        return True

    def _check(self) -> None:
        if self._interrupted:
            raise PeerGone("the connection was broken off here")

    def _take(self, data: bytes) -> None:
        self._check()
        if not data:
            raise PeerGone("the peer closed the connection")
        self._buffer += data


def _digest(data: bytes) -> int:
    return int(xxhash.xxh3_64_intdigest(data))


def _make_prompt(sock: socket.socket) -> None:
    """Send small frames at once, and notice a peer whose host is gone while the link is idle (about half a minute)."""
    with contextlib.suppress(OSError):  # broken already: the first use will say so
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
