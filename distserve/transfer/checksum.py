"""What the checksum of a slice is seeded by: the stage's head and the slice's index, so that slices that do not belong
together are found as bytes that changed are. Who may write is the ticket's concern."""

from __future__ import annotations

import xxhash

_MASK = (1 << 64) - 1
_ODD = 0x9E3779B97F4A7C15


def stage_seed(head: bytes) -> int:
    """What the seeds of all slices of a stage come from: a digest of its head."""
    return int(xxhash.xxh3_64_intdigest(head))


def slice_seed(stage: int, index: int) -> int:
    """The seed for slice ``index`` of the stage with this seed; no two slices of a stage have the same."""
    return (stage + index * _ODD) & _MASK
