"""Page-locks the staging of a link where the KV is on a GPU and leaves it through the host (shared memory, gloo):
copies between the two then go at the bus's rate, and in the order of a stream.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from distserve.transfer.device_memory import cuda_memory
from distserve.transfer.errors import LaneFailed

log = logging.getLogger(__name__)


class PinnedSlots:
    """The slots of one lane, page-locked until released. Of no effect where the pool, or not even staging, is the
    host's; where the system locks no pages, copies are only slower, which the log says.
    """

    def __init__(self, slots: Sequence[Tensor], device: torch.device) -> None:
        """``device``: of the pool. The slots lie one after the other."""
        self._device = device
        self._locked: int | None = None
        if device.type != "cuda" or not slots or slots[0].is_cuda:
            return
        first = slots[0].data_ptr()
        try:  # all at once: two slots may share a page, which cannot be locked twice
            cuda_memory(device).lock_pages(first, slots[-1].data_ptr() + slots[-1].nbytes - first)
            self._locked = first
        except LaneFailed as error:
            log.warning("KV leaves %s through memory that is not page-locked, and slowly: %s", device, error)

    def release(self) -> None:
        """Before the memory goes. Idempotent."""
        locked, self._locked = self._locked, None
        if locked is not None:
            with contextlib.suppress(LaneFailed):  # of a device that broke, whose process ends
                cuda_memory(self._device).unlock_pages(locked)
