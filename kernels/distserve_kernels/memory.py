"""Ask the system for large pages under a large tensor: fewer address translations while it is read from end to end."""

from __future__ import annotations

import ctypes
import sys

from torch import Tensor

PAGE_BYTES = 2 << 20
_MADV_HUGEPAGE = 14


def advise_large_pages(tensor: Tensor) -> None:
    """Before ``tensor`` is first written. A wish: where the system has no such pages, nothing changes."""
    if sys.platform != "linux" or tensor.device.type != "cpu" or tensor.nbytes < 2 * PAGE_BYTES:
        return
    first = -(-tensor.data_ptr() // PAGE_BYTES) * PAGE_BYTES
    last = (tensor.data_ptr() + tensor.nbytes) // PAGE_BYTES * PAGE_BYTES
    ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_HUGEPAGE)
