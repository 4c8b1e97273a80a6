"""The checksum of staged bytes, with a seed: XXH3-64 of bytes on the host, a sum of mixed words of bytes on a device.
Not a signature: it finds bytes that changed.

Bytes that live on a device are summed up there, for copying them to the host would cost more than moving them.
"""

from __future__ import annotations

from typing import Any

import xxhash
from torch import Tensor

from distserve_kernels.kv_device import device_sum

Bytes = Any
"""A uint8 array: numpy.ndarray for memory of the host, torch.Tensor for a device's. Both slice and assign alike."""

_MASK = (1 << 64) - 1


def digest(staged: Bytes, seed: int) -> int:
    """The checksum of staged bytes, a flat uint8 array of the host or tensor of a device: an unsigned 64-bit integer.

    Equal at both ends for equal bytes and seeds, provided that both stage on the host or both on a device. On a device
    (``paged_reference.staging_checksum``) it waits for what the calling thread's stream was given before.
    """
    if not isinstance(staged, Tensor):
        return int(xxhash.xxh3_64_intdigest(staged.data, seed))
    if staged.device.type == "cpu":
        return int(xxhash.xxh3_64_intdigest(staged.numpy().data, seed))
    return (int(device_sum(staged).item()) & _MASK) ^ seed
