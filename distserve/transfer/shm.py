"""The shared-memory lane: both processes map the same staging, so a piece is gathered by one and scattered by the
other.

The destination creates the memory, the source maps it. On Linux it is an anonymous memory file (memfd) that the source
opens through /proc: it has no name, so a killed process leaves nothing behind, and it is sealed against resizing, so
that a peer cannot take the memory away. Elsewhere it is a temporary file, unlinked as soon as both have mapped it.
Signals (“a piece is there”, “the slot is free”) travel on the link's channel: nobody polls memory.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import re
import secrets
import stat
import tempfile

import torch
from torch import Tensor

from distserve.transfer.errors import LaneFailed

PAGE = mmap.PAGESIZE
_PROOF_BYTES = 16
_NAME = "distserve-kv-"
_LOCATOR = re.compile(r"(\d+):(\d+)|" + _NAME + r"[0-9a-f]{32}")


class Segment:
    """Memory that two processes map: one page that holds the proof, then the slots.

    ``close`` gives back the file; the memory itself goes with the last tensor that views it.
    """

    def __init__(self, memory: mmap.mmap, fd: int, path: str, locator: str) -> None:
        self.locator = locator
        self._memory: mmap.mmap | None = memory
        self._fd = fd
        self._path = path

    @classmethod
    def create(cls, slots: int, slot_bytes: int) -> Segment:
        """New memory of this process, with a fresh proof in it. OSError when there is none to be had."""
        size = PAGE + slots * slot_bytes
        if hasattr(os, "memfd_create"):
            fd = os.memfd_create("distserve-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            path, locator = "", f"{os.getpid()}:{fd}"
        else:
            locator = _NAME + secrets.token_hex(16)
            path = os.path.join(tempfile.gettempdir(), locator)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.ftruncate(fd, size)
            if not path:
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            memory = mmap.mmap(fd, size)
        except BaseException:
            _discard(fd, path)
            raise
        memory[:_PROOF_BYTES] = secrets.token_bytes(_PROOF_BYTES)
        return cls(memory, fd, path, locator)

    @classmethod
    def attach(cls, locator: str, proof: bytes, slots: int, slot_bytes: int) -> Segment:
        """Map a peer's memory; LaneFailed with a sentence if it is not reachable from here."""
        match = _LOCATOR.fullmatch(locator)
        if not match:
            raise LaneFailed(f"{locator!r} names no shared memory")
        path = f"/proc/{match[1]}/fd/{match[2]}" if match[1] else os.path.join(tempfile.gettempdir(), locator)
        size = PAGE + slots * slot_bytes
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError as error:
            raise LaneFailed(f"the peer's shared memory cannot be opened from here: {error.strerror}") from None
        try:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode) or info.st_size != size:
                raise LaneFailed("what the peer named is not its shared memory")
            memory = mmap.mmap(fd, size)
        except (OSError, ValueError) as error:
            raise LaneFailed(f"the peer's shared memory cannot be mapped here: {error}") from None
        finally:
            os.close(fd)
        if len(proof) != _PROOF_BYTES or memory[:_PROOF_BYTES] != proof:
            memory.close()
            raise LaneFailed("what the peer named is not its shared memory")
        return cls(memory, -1, "", locator)

    @property
    def proof(self) -> bytes:
        """The first bytes of the memory. Whoever can tell them has mapped it."""
        assert self._memory is not None
        return self._memory[:_PROOF_BYTES]

    def slots(self, count: int, slot_bytes: int) -> list[Tensor]:
        """The slots as flat uint8 tensors over the shared memory."""
        assert self._memory is not None
        return [
            torch.frombuffer(self._memory, dtype=torch.uint8, count=slot_bytes, offset=PAGE + i * slot_bytes)
            for i in range(count)
        ]

    def mapped_by_both(self) -> None:
        """Take away the name: from here on the memory lives exactly as long as the two processes map it."""
        fd, self._fd = self._fd, -1
        path, self._path = self._path, ""
        if fd >= 0:
            _discard(fd, path)

    def close(self) -> None:
        """Give the file back and unmap; while a tensor still views the memory, it is unmapped with that one."""
        self.mapped_by_both()
        memory, self._memory = self._memory, None
        if memory is not None:
            with contextlib.suppress(BufferError):
                memory.close()


def _discard(fd: int, path: str) -> None:
    os.close(fd)
    if path:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


class ShmLane:
    """Either end of a shared-memory lane; the bytes are where they belong as soon as they are gathered."""

    def __init__(self, segment: Segment, slots: int, slot_bytes: int) -> None:
        self._segment = segment
        self.slots = segment.slots(slots, slot_bytes)

    def push(self, slot: int, nbytes: int) -> None:
        """Nothing to do: the channel's frame is the signal."""

    def expect(self, slot: int, nbytes: int) -> None:
        """Nothing to do: it is there already."""

    def free(self, slot: int) -> None:
        """Nothing to do: the source hears of it on the channel."""

    def take(self, slot: int, timeout_s: float) -> None:
        """Nothing to wait for: the channel's frame was the signal."""

    def close(self) -> None:
        """Drop the views and the memory with them."""
        self.slots = []
        self._segment.close()


def host_identity() -> str:
    """Names the running kernel of this host; equal at two ends means that sharing memory is worth trying."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return f"{os.uname().nodename}/{os.uname().version}"
