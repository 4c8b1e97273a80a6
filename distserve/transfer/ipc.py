"""The device-memory lane: staging in the destination's GPU memory that the source maps as well (CUDA IPC), on one host,
within one GPU or between two that reach each other.

The source gathers into staging of its own and copies a piece across in one run, which is what NVLink and PCIe are good
at; it tells of the piece when the copy is done, so that the destination's kernels, launched later, see it. The
destination verifies and scatters out of its staging.

CUDA wants memory unmapped before it is freed. A source unmaps before it closes its socket, and the kernel closes the
socket of one that dies: so the destination keeps what it has lent until its socket says that the other end is closed.
It never waits for that; what is still lent is looked after when a lane is made or ended.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from distserve.transfer.device_memory import DeviceMemory
from distserve.transfer.errors import LaneFailed

PROOF_BYTES = 16
_FIRST_SLOT = 4096
_ALIGNED = 256
_STILL_OPEN = (1, 2, 3, 4, 5)
"""TCP's states, in Linux's numbers, in which the other end has not closed: established to FIN-WAIT-2."""


def slot_places(slots: int, slot_bytes: int) -> tuple[list[int], int]:
    """Where each slot begins in the memory, and the size of all."""
    stride = -(-slot_bytes // _ALIGNED) * _ALIGNED
    return [_FIRST_SLOT + i * stride for i in range(slots)], _FIRST_SLOT + slots * stride


class IpcTarget:
    """The destination's end: it owns the memory."""

    def __init__(
        self, memory: DeviceMemory, address: int, slots: list[Tensor], handle: bytes, proof: bytes, watch: socket.socket
    ) -> None:
        self.slots = slots
        self.handle, self.proof = handle, proof
        self._memory, self._address = memory, address
        self._watch: socket.socket | None = watch

    @classmethod
    def create(cls, memory: DeviceMemory, watch: socket.socket, slots: int, slot_bytes: int) -> IpcTarget:
        """New memory, with a fresh proof in it. ``watch``: a socket of the link that closes with the source's; ours
        from now on. LaneFailed when there is no memory to be had."""
        with contextlib.ExitStack() as undo:
            undo.callback(watch.close)
            LENT.sweep()
            places, size = slot_places(slots, slot_bytes)
            address = memory.allocate(size)
            undo.callback(memory.free, address)  # nobody was told of it
            proof = secrets.token_bytes(PROOF_BYTES)
            memory.write(address, proof)
            views = [memory.view(address + at, slot_bytes) for at in places]
            lane = cls(memory, address, views, memory.export(address), proof, watch)
            undo.pop_all()
            return lane

    def push(self, slot: int, nbytes: int) -> None:
        """A destination sends nothing."""

    def expect(self, slot: int, nbytes: int) -> None:
        """Nothing to do: it is there already."""

    def take(self, slot: int, timeout_s: float) -> None:
        """Nothing to wait for: the channel's frame was the signal."""

    def free(self, slot: int) -> None:
        """Nothing to do: the source hears of it on the channel."""

    def close(self) -> None:
        """Drop the views; the memory goes when the source has let go of it."""
        self.slots = []
        watch, self._watch = self._watch, None
        if watch is not None:
            LENT.take_back(self._memory, self._address, watch)


class IpcSource:
    """The source's end: it maps the memory, and stages in its own."""

    def __init__(self, memory: DeviceMemory, address: int, places: list[int], slots: list[Tensor]) -> None:
        self.slots = slots
        self._memory, self._address = memory, address
        self._places = places
        self._mapped = True

    @classmethod
    def open(
        cls, memory: DeviceMemory, device: torch.device, handle: bytes, proof: bytes, slots: int, slot_bytes: int
    ) -> IpcSource:
        """Map a peer's memory; LaneFailed with a sentence if it is not what was named, or not reachable from here."""
        places, size = slot_places(slots, slot_bytes)
        with contextlib.ExitStack() as undo:
            address = memory.map(handle)
            undo.callback(_quietly_unmap, memory, address)
            if (extent := memory.extent(address)) < size:
                raise LaneFailed(f"the peer named {extent} bytes of device memory for slots that need {size}")
            if len(proof) != PROOF_BYTES or memory.read(address, PROOF_BYTES) != proof:
                raise LaneFailed("what the peer named is not its device memory")
            try:
                own = list(torch.empty(slots, slot_bytes, dtype=torch.uint8, device=device))
            except torch.OutOfMemoryError:
                raise LaneFailed(f"no {slots * slot_bytes >> 20} MiB of device memory for staging") from None
            undo.pop_all()
            return cls(memory, address, places, own)

    def push(self, slot: int, nbytes: int) -> None:
        """Copy the first ``nbytes`` of a slot across; returns when they are there."""
        self._memory.copy(self._address + self._places[slot], self.slots[slot], nbytes)

    def expect(self, slot: int, nbytes: int) -> None:
        """A source receives nothing."""

    def take(self, slot: int, timeout_s: float) -> None:
        """A source receives nothing."""

    def free(self, slot: int) -> None:
        """A source receives nothing."""

    def close(self) -> None:
        """Unmap; no copy is under way, for each was waited for."""
        self.slots = []
        if self._mapped:
            self._mapped = False
            _quietly_unmap(self._memory, self._address)


def _quietly_unmap(memory: DeviceMemory, address: int) -> None:
    with contextlib.suppress(LaneFailed):  # of a device that broke, whose process ends
        memory.unmap(address)


@dataclass(frozen=True, slots=True)
class _Lent:
    memory: DeviceMemory
    address: int
    watch: socket.socket


class LentMemory:
    """Memory of lanes that have ended here, which a source may still map. Thread-safe."""

    def __init__(self) -> None:
        self._lent: list[_Lent] = []
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._lent)

    def take_back(self, memory: DeviceMemory, address: int, watch: socket.socket) -> None:
        """Free it, now or when ``watch`` is found closed at its other end."""
        with self._lock:
            self._lent.append(_Lent(memory, address, watch))
        self.sweep()

    def sweep(self) -> None:
        """Free what is not mapped any more. Never waits for a peer."""
        with self._lock:
            given_up = [each for each in self._lent if other_end_closed(each.watch)]
            self._lent = [each for each in self._lent if each not in given_up]
        for each in given_up:
            each.watch.close()
            with contextlib.suppress(LaneFailed):  # of a device that broke, whose process ends
                each.memory.free(each.address)


LENT = LentMemory()
"""Of this process: what a lane leaves may outlive its mover."""


def other_end_closed(sock: socket.socket) -> bool:
    """Whether the peer of a TCP socket has closed, or is gone; whatever was shut down at this end."""
    try:
        return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] not in _STILL_OPEN
    except OSError:
        return True
