"""The checksum of a piece: XXH3-64 of its bytes, seeded by what the stage's head says and the piece's index.

Not a signature: it finds bytes that changed and pieces that do not belong together. Who may write is the ticket's
concern. Bytes that live on a device are folded there, for copying them to the host would cost more than moving them.
"""

from __future__ import annotations

import struct

import torch
import xxhash
from torch import Tensor

_MASK = (1 << 64) - 1
_FOLD_ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # an odd number, as a signed 64-bit integer


def seed_of(head: bytes, index: int) -> int:
    """The seed for piece ``index`` of the stage whose head was sent as ``head``."""
    return int(xxhash.xxh3_64_intdigest(head + struct.pack("<q", index)))


def digest(staged: Tensor, nbytes: int, seed: int) -> int:
    """The checksum of the first ``nbytes`` of a flat uint8 tensor, as an unsigned 64-bit integer."""
    if staged.device.type == "cpu":
        return int(xxhash.xxh3_64_intdigest(staged.numpy().data[:nbytes], seed))
    return _fold(staged[:nbytes]) ^ seed


def _fold(data: Tensor) -> int:
    """Sum of 64-bit words, each times an odd number of its own, modulo 2**64: any one changed word changes it."""
    tail = data.numel() % 8
    if tail:
        data = torch.nn.functional.pad(data, (0, 8 - tail))
    words = data.view(torch.int64)
    weights = torch.arange(words.numel(), device=words.device, dtype=torch.int64).mul_(2).add_(1).mul_(_FOLD_ODD)
    return int((words * weights).sum().item()) & _MASK
