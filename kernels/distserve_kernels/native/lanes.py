"""The lanes of a stage whose ranks share a machine: they meet in memory that all of them map, see ``lanes.cpp``.

Knows the memory and what is done in it; how ranks come to map the same memory is another's.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref

import torch
from torch import Tensor

SLOT_BYTES = 256 << 10
"""Of a lane's part in one round; more is taken in so many rounds. It stays in the second-level cache."""

PROOF_BYTES = 64
"""At the beginning of the memory, for whoever shares it out."""

SPINS = 2000
"""Looks, some 30 microseconds, before a lane that waits goes to sleep."""

SUMMED = {torch.float32: "ds_lanes_sum_float32", torch.bfloat16: "ds_lanes_sum_bfloat16"}


def lanes_bytes(library: ctypes.CDLL, size: int) -> int:
    """Of the memory that ``size`` lanes need; 0 where they cannot meet so."""
    return int(library.ds_lanes_bytes(size, SLOT_BYTES))


class SharedLanes:
    """One lane's end. All lanes make the same calls in the same order, one at a time."""

    def __init__(self, library: ctypes.CDLL, memory: mmap.mmap, lane: int, size: int, timeout_s: float) -> None:
        """``memory``: of ``lanes_bytes``, zeros but for the proof. Raises MemoryError."""
        self._library, self._size, self._timeout_s = library, size, timeout_s
        self._view = (ctypes.c_char * len(memory)).from_buffer(memory)  # holds the memory
        spins = SPINS if (os.cpu_count() or 1) >= size else 0
        handle = library.ds_lanes_open(ctypes.addressof(self._view), lane, size, SLOT_BYTES, timeout_s, spins)
        if not handle:
            raise MemoryError("not enough memory for the lanes of a stage")
        self._handle = ctypes.c_void_p(handle)
        weakref.finalize(self, library.ds_lanes_close, self._handle)

    def native_sum(self, dtype: torch.dtype) -> tuple[int | None, int | None]:
        """The function and its context, as ``Model.sum`` and ``Model.context``."""
        return ctypes.cast(getattr(self._library, SUMMED[dtype]), ctypes.c_void_p).value, self._handle.value

    def sum_(self, x: Tensor) -> Tensor:
        """The sum over all lanes, in place; ``x`` is contiguous, of float32 or bfloat16. RuntimeError when a lane does
        not come in time.
        """
        self._check(getattr(self._library, SUMMED[x.dtype])(self._handle, x.data_ptr(), x.numel()))
        return x

    def gather(self, x: Tensor) -> Tensor:
        """[rows, n] of each lane → [rows, size * n], in the order of the lanes. RuntimeError as ``sum_``."""
        x = x.contiguous()
        rows, width = x.shape
        found = x.new_empty((rows, self._size * width))
        each = width * x.element_size()
        self._check(self._library.ds_lanes_gather(self._handle, x.data_ptr(), found.data_ptr(), rows, each))
        return found

    def late(self) -> RuntimeError:
        """What is raised when a lane does not come in time."""
        return RuntimeError(f"another rank of this stage did not come within {self._timeout_s:.0f} s")

    def _check(self, code: int) -> None:
        if code != 0:
            raise self.late()
