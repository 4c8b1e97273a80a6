"""The checksum of staged bytes: XXH3-64 with a seed. Not a signature: it finds bytes that changed.

Bytes that live on a device are folded there, for copying them to the host would cost more than moving them.
"""

from __future__ import annotations

from typing import Any

import torch
import xxhash
from torch import Tensor

Bytes = Any
"""A uint8 array: numpy.ndarray for memory of the host, torch.Tensor for a device's. Both slice and assign alike."""

_MASK = (1 << 64) - 1
_ODD = 0x9E3779B97F4A7C15
_FOLD_ODD = _ODD - (1 << 64)  # the same as a signed 64-bit integer


def digest(staged: Bytes, seed: int) -> int:
    """The checksum of staged bytes, a flat uint8 array of the host or tensor of a device: an unsigned 64-bit integer.

    Equal at both ends for equal bytes and seeds, provided that both stage on the host or both on a device.
    """
    if not isinstance(staged, Tensor):
        return int(xxhash.xxh3_64_intdigest(staged.data, seed))
    if staged.device.type == "cpu":
        return int(xxhash.xxh3_64_intdigest(staged.numpy().data, seed))
    return _fold(staged) ^ seed


def _fold(data: Tensor) -> int:
    """Sum of 64-bit words, each times an odd number of its own, modulo 2**64: any one changed word changes it."""
    if data.storage_offset() % 8:
        data = data.clone()
    tail = data.numel() % 8
    if tail:
        data = torch.nn.functional.pad(data, (0, 8 - tail))
    words = data.view(torch.int64)
    weights = torch.arange(words.numel(), device=words.device, dtype=torch.int64).mul_(2).add_(1).mul_(_FOLD_ODD)
    return int((words * weights).sum().item()) & _MASK
