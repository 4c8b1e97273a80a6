"""Copies between a paged KV pool and contiguous staging memory, in bytes.

pool:    [num_blocks, layers, 2, kv_heads, block_size, head_dim], contiguous; one block is one run of bytes, and
         blocks of adjacent ids are one larger run.
staging: bytes; whole blocks one after another, each laid out like a block of the pool it came from; or some of the
         rows of one block, where a row is what a block holds for one (layer, k or v, head): block_size tokens.

Tokens are addressed by their position in the sequence; position p is in entry p // block_size of the block table. The
two ends may use different block sizes: the tokens that a row has in common with the same row of another block are then
copied row by row.

On a CPU the copies go through NumPy views of the same memory: one memcpy a run, on the calling thread and without the
GIL, whereas torch would start a pool of threads for each thread that copies. On other devices they are torch copies.
Knows no tickets, no sockets and no checksums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

Bytes = Any
"""A uint8 array: numpy.ndarray for memory of the host, torch.Tensor for a device's. Both slice and assign alike."""

_GATHER_BYTES = 512 << 10
"""A larger copy would bypass the cache (memcpy's non-temporal stores), but staging is read again at once."""


def byte_view(tensor: Tensor, *shape: int) -> Bytes:
    """The tensor's own memory as uint8, reshaped; no copy. The tensor must be contiguous."""
    flat = tensor.detach().view(torch.uint8).view(*shape)
    return flat.numpy() if flat.device.type == "cpu" else flat


class PagedBytes:
    """A pool seen as bytes: what can be gathered from it and scattered into it.

    Stateless beyond the views; who may touch which block, and when, is the caller's concern.
    """

    def __init__(self, pool: Tensor) -> None:
        if pool.dim() != 6 or not pool.is_contiguous():
            raise ValueError(
                "a KV pool is one contiguous tensor [num_blocks, layers, 2, kv_heads, block_size, head_dim], "
                f"not {tuple(pool.shape)}"
            )
        blocks, layers, pair, heads, block_size, head_dim = pool.shape
        self.num_blocks = blocks
        self.block_size = block_size
        self.rows = layers * pair * heads
        self.token_bytes = head_dim * pool.element_size()  # in one row
        self.row_bytes = block_size * self.token_bytes
        self.block_bytes = self.rows * self.row_bytes
        self.on_host = pool.device.type == "cpu"
        self._blocks = byte_view(pool, blocks, self.block_bytes)
        self._tokens = byte_view(pool, blocks, self.rows, block_size, self.token_bytes)

    def staging(self, memory: Tensor) -> Bytes:
        """Staging memory (a flat uint8 tensor) in the form that gather and scatter take."""
        return memory.numpy() if self.on_host else memory

    def gather(self, blocks: Sequence[int], out: Bytes, rows: tuple[int, int] | None = None) -> int:
        """Copy whole blocks, in this order, to the front of ``out``; or of one block the ``rows`` [low, high).

        Returns the bytes written.
        """
        if rows is not None:
            (block,) = blocks
            low, high = rows[0] * self.row_bytes, rows[1] * self.row_bytes
            out[: high - low] = self._blocks[block, low:high]
            return high - low
        at = 0
        for first, count in runs(blocks):
            run = self._blocks[first : first + count].reshape(-1)
            step = _GATHER_BYTES if self.on_host else len(run)
            for low in range(0, len(run), step):
                part = run[low : low + step]
                out[at : at + len(part)] = part
                at += len(part)
        return at

    def scatter(
        self,
        table: Sequence[int],
        staged: Bytes,
        staged_block_size: int,
        first_token: int,
        start: int,
        end: int,
        rows: tuple[int, int] | None = None,
    ) -> None:
        """Write tokens ``[start, end)`` from staging into the blocks of ``table``; no other byte of the pool changes.

        ``table`` covers positions ``0 .. end`` in blocks of this pool. ``staged`` holds whole blocks of
        ``staged_block_size`` tokens, or of one block the ``rows`` [low, high); its first token is position
        ``first_token``.
        """
        if staged_block_size == self.block_size:
            low, high = -(-start // self.block_size), end // self.block_size  # the whole blocks of the range
            if low < high:
                at = low - first_token // self.block_size
                self._write_blocks(table[low:high], staged, at, rows)
                self._write_tokens(table, staged, staged_block_size, first_token, (start, low * self.block_size), rows)
                start = high * self.block_size
        self._write_tokens(table, staged, staged_block_size, first_token, (start, end), rows)
        if not self.on_host:
            torch.cuda.current_stream(self._blocks.device).synchronize()  # the caller gives staging back now

    def _write_blocks(self, blocks: Sequence[int], staged: Bytes, at: int, rows: tuple[int, int] | None) -> None:
        """Write whole blocks of this pool's own size, the first being block ``at`` of staging: one copy a run."""
        if rows is not None:
            low, high = rows[0] * self.row_bytes, rows[1] * self.row_bytes
            self._blocks[blocks[0], low:high] = staged[: high - low]
            return
        at *= self.block_bytes
        for first, count in runs(blocks):
            nbytes = count * self.block_bytes
            self._blocks[first : first + count].reshape(-1)[:] = staged[at : at + nbytes]
            at += nbytes

    def _write_tokens(
        self,
        table: Sequence[int],
        staged: Bytes,
        size: int,
        first_token: int,
        span: tuple[int, int],
        rows: tuple[int, int] | None,
    ) -> None:
        """Write the tokens of ``span`` row by row; staging holds blocks of ``size`` tokens."""
        if span[0] >= span[1]:
            return
        low, high = rows or (0, self.rows)
        block_bytes = (high - low) * size * self.token_bytes
        count = len(staged) // block_bytes
        source = staged[: count * block_bytes].reshape(count, high - low, size, self.token_bytes)
        for at, stop in shared_spans(*span, size, self.block_size):
            block, offset = divmod(at - first_token, size)
            target, shift = divmod(at, self.block_size)
            n = stop - at
            self._tokens[table[target], low:high, shift : shift + n] = source[block, :, offset : offset + n]


def runs(blocks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Coalesce a block table into runs ``(first id, count)`` of adjacent ids, in order."""
    first, count = -1, 0
    for block in blocks:
        if block == first + count and count:
            count += 1
            continue
        if count:
            yield first, count
        first, count = block, 1
    if count:
        yield first, count


def shared_spans(start: int, end: int, one: int, other: int) -> Iterator[tuple[int, int]]:
    """Cut ``[start, end)`` at every block boundary of either block size."""
    at = start
    while at < end:
        stop = min(end, (at // one + 1) * one, (at // other + 1) * other)
        yield at, stop
        at = stop
