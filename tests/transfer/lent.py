"""Stands in for the memory of a GPU in tests without one: anonymous memory files, which another process maps through
/proc as it would map device memory. Everything of a device-memory lane but CUDA itself then runs.

It shows what is held, so that a test sees what was not given back.
"""

from __future__ import annotations

import mmap
import os
import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from distserve.transfer.device_memory import HANDLE_BYTES
from distserve.transfer.errors import LaneFailed

GPU = "GPU-of-tests"


@dataclass
class _Block:
    memory: mmap.mmap
    fd: int
    bytes: Tensor


class FakeDevice:
    """``device_memory.DeviceMemory``. Addresses are made up, one run for each allocation."""

    def __init__(self) -> None:
        self.owned: dict[int, _Block] = {}
        self.mapped: dict[int, _Block] = {}
        self.fail: set[str] = set()
        self._next = 1 << 32
        self._lock = threading.Lock()

    def allocate(self, nbytes: int) -> int:
        self._may("allocate")
        fd = os.memfd_create("distserve-fake-gpu")
        os.ftruncate(fd, nbytes)
        return self._add(self.owned, fd, nbytes)

    def free(self, address: int) -> None:
        with self._lock:
            block = self.owned.pop(address)
        os.close(block.fd)

    def export(self, address: int) -> bytes:
        return f"{os.getpid()}:{self.owned[address].fd}".encode().ljust(HANDLE_BYTES, b"\0")

    def map(self, handle: bytes) -> int:
        self._may("map")
        if len(handle) != HANDLE_BYTES:
            raise LaneFailed(f"a handle of {len(handle)} bytes")
        pid, _, fd = handle.rstrip(b"\0").decode().partition(":")
        try:
            here = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR)
        except OSError as error:
            raise LaneFailed(f"no such memory: {error.strerror}") from None
        return self._add(self.mapped, here, os.fstat(here).st_size)

    def unmap(self, address: int) -> None:
        with self._lock:
            block = self.mapped.pop(address)
        os.close(block.fd)

    def extent(self, address: int) -> int:
        return len(self._block(address).bytes)

    def view(self, address: int, nbytes: int) -> Tensor:
        base, block = self._find(address)
        return block.bytes[address - base : address - base + nbytes]

    def copy(self, target: int, source: Tensor, nbytes: int) -> None:
        self._may("copy")
        self.view(target, nbytes).copy_(source[:nbytes])

    def write(self, target: int, data: bytes) -> None:
        self.view(target, len(data)).copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))

    def read(self, source: int, nbytes: int) -> bytes:
        return bytes(self.view(source, nbytes).numpy())

    def _may(self, what: str) -> None:
        if what in self.fail:
            raise LaneFailed(f"the device will not {what}")

    def _add(self, where: dict[int, _Block], fd: int, nbytes: int) -> int:
        memory = mmap.mmap(fd, nbytes)
        with self._lock:
            address = self._next
            self._next += 1 << 32
            where[address] = _Block(memory, fd, torch.frombuffer(memory, dtype=torch.uint8))
        return address

    def _block(self, address: int) -> _Block:
        return self._find(address)[1]

    def _find(self, address: int) -> tuple[int, _Block]:
        base = address >> 32 << 32
        return base, (self.owned.get(base) or self.mapped[base])
