"""Whole blocks between a pool on a device and staging on the same device, one launch each, summed up on the way.

Owns the choice of kernel: Triton's where it is, the reference in torch elsewhere; both make the same checksum, so that
the two ends of a link may differ in it. Launches go to the calling thread's stream; only ``gather`` with a seed waits,
for its own sum. Knows no tickets, and not which part of a block is whose.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distserve_kernels.backend import triton_serves
from distserve_kernels.paged_ops import PAGED_REFERENCE, PagedOps, triton_paged_ops
from distserve_kernels.stored import whole_bytes

WORD_BYTES = 4
_MASK = (1 << 64) - 1


class DeviceCopies:
    """Copies of ``layers`` and ``heads`` of a pool [num_blocks, layers, 2, kv_heads, block_size, head_dim]."""

    def __init__(self, pool: Tensor, layers: range, heads: range, ops: PagedOps | None = None) -> None:
        self._pool, self._layers, self._heads = whole_bytes(pool), layers, heads
        self._ops = ops or device_ops(pool.device)
        self._shape = (len(layers), 2, len(heads), *pool.shape[4:])
        self._block_bytes = pool.element_size() * torch.Size(self._shape).numel()

    @classmethod
    def fitting(cls, pool: Tensor, layers: range, heads: range) -> DeviceCopies | None:
        """None where a run of bytes is not whole words: the kernels move nothing smaller."""
        head = pool.element_size() * pool.shape[4] * pool.shape[5]
        whole = not (head * len(heads) % WORD_BYTES or head * heads.start % WORD_BYTES)
        return cls(pool, layers, heads) if whole and not head * pool.shape[3] % WORD_BYTES else None

    def gather(self, blocks: Sequence[int], out: Tensor, seed: int | None) -> int:
        """Copy the part of ``blocks``, in this order, to the front of ``out`` (uint8, flat).

        With a seed, waits and returns the checksum (``checksum.digest`` of the same bytes); without, returns 0 at once.
        """
        staging = self._typed(out, len(blocks))
        found = self._ops.kv_gather(
            self._pool, self._table(blocks), self._layers, self._heads, staging, seed is not None
        )
        return 0 if seed is None else (int(found.item()) & _MASK) ^ seed

    def scatter(self, blocks: Sequence[int], staged: Tensor) -> None:
        """Copy the front of ``staged`` (uint8, flat) into the part of ``blocks``; returns at once."""
        staging = self._typed(staged, len(blocks))
        self._ops.kv_scatter(self._pool, self._table(blocks), self._layers, self._heads, staging, False)

    def _typed(self, staged: Tensor, blocks: int) -> Tensor:
        """The front of staging in the pool's dtype; ValueError if it is too short."""
        nbytes = blocks * self._block_bytes
        if nbytes > len(staged):
            raise ValueError(f"{blocks} blocks do not fit staging of {len(staged)} bytes")
        return staged[:nbytes].view(self._pool.dtype).view(blocks, *self._shape)

    def _table(self, blocks: Sequence[int]) -> Tensor:
        """On the device, by a copy that the host does not wait for (what it copies from is staged at once)."""
        return torch.tensor(blocks, dtype=torch.int32).to(self._pool.device, non_blocking=True)


def device_ops(device: torch.device) -> PagedOps:
    """The kernels for staging on ``device``."""
    return triton_paged_ops() if triton_serves(device) else PAGED_REFERENCE


def device_sum(staged: Tensor) -> Tensor:
    """[1] int64: the checksum of flat bytes on a device, an odd end filled up with zeros."""
    if staged.data_ptr() % WORD_BYTES or staged.storage_offset() % WORD_BYTES:
        staged = staged.clone()
    if tail := staged.numel() % WORD_BYTES:
        staged = torch.nn.functional.pad(staged, (0, WORD_BYTES - tail))
    return device_ops(staged.device).staging_checksum(staged)
