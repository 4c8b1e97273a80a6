"""Small numbers of a step, from Python's arrays to the device in one copy that nobody waits for.

Owns two page-locked buffers, used in turn: the next step is written into one while the copy out of the other may still
be under way. On a CPU the same code fills ordinary memory. Knows no step.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_LEAST_BYTES = 1 << 16
_ALIGNED = 16
"""Bytes. Triton compiles a kernel anew for a pointer that is not aligned so: all are, so that none is met late."""

_DTYPES = {"q": torch.int64, "i": torch.int32, "d": torch.float64}


@dataclass(slots=True)
class _Turn:
    """One host buffer, and the event that says its last copy has been made."""

    memory: Tensor
    copied: torch.cuda.Event | None


class Upload:
    """Copies to one device. One thread uses it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._turns = [_Turn(self._memory(_LEAST_BYTES), None) for _ in range(2)]

    def send(self, *columns: array[Any]) -> tuple[Tensor, ...]:
        """Each column (typecode q, i or d) on the device, flat, int64, int32 or float64, in fresh memory, aligned to 16
        bytes.

        Returns at once; what the current stream does later sees them.
        """
        sizes = [len(column) * column.itemsize for column in columns]
        firsts = [0]
        for nbytes in sizes:
            firsts.append(firsts[-1] + -(-nbytes // _ALIGNED) * _ALIGNED)
        turn = self._next(firsts[-1])
        for column, first, nbytes in zip(columns, firsts, sizes, strict=False):
            if nbytes:
                turn.memory[first : first + nbytes].copy_(torch.frombuffer(column, dtype=torch.uint8))
        there = torch.empty(firsts[-1], dtype=torch.uint8, device=self._device)
        there.copy_(turn.memory[: firsts[-1]], non_blocking=True)
        if self._on_gpu:
            turn.copied = turn.copied or torch.cuda.Event()
            turn.copied.record()
        return tuple(
            there[first : first + nbytes].view(_DTYPES[column.typecode])
            for column, first, nbytes in zip(columns, firsts, sizes, strict=False)
        )

    def _next(self, nbytes: int) -> _Turn:
        """The buffer whose copy is oldest, with room for ``nbytes``, free to be written."""
        self._turns.reverse()
        turn = self._turns[0]
        if turn.copied is not None:
            turn.copied.synchronize()  # of the step before the last: nearly always done
        if turn.memory.numel() < nbytes:
            turn.memory = self._memory(2 * nbytes)
        return turn

    def _memory(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._on_gpu)
