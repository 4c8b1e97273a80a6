"""A part of a paged KV pool, seen as bytes: what can be gathered from it into staging, and scattered into it.

pool:    [num_blocks, layers, 2, kv_heads, block_size, head_dim], contiguous.
staging: bytes; whole blocks of the part one after another; or some of the rows of one block, where a row is what a
         block holds for one (layer, k or v, head): block_size tokens.

Tokens are addressed by their position in the sequence; position p is in entry p // block_size of the block table. The
two ends may use different block sizes: the tokens that a row has in common with the same row of another block are then
copied row by row.

On a CPU the copies go through NumPy views of the same memory, on the calling thread and without the GIL, whereas torch
would start a pool of threads for each thread that copies. On a device they go to the calling thread's stream
(``streams.own_stream``), as kernels between pool and staging there (``kv_device``), else as torch's copies. ``gather``
and ``scatter`` return when the bytes are where they belong, so that what is done under a lock is done when the lock is
given back; they wait for that stream alone. What has to come before, a step that writes what is read, must be done on
the device already. Knows no tickets and no sockets.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distserve_kernels.checksum import Bytes, digest
from distserve_kernels.kv_device import DeviceCopies
from distserve_kernels.streams import settle

Rows = tuple[int, int]
"""Rows [low, high) of one block, of this part."""


@dataclass(frozen=True, slots=True)
class StagedSlice:
    """Staged bytes, and the seed of their checksum."""

    staged: Bytes
    seed: int

    def digest(self) -> int:
        """Their checksum."""
        return digest(self.staged, self.seed)


class PagedPart(ABC):
    """So many ``layers`` and ``heads`` of a pool. Who may touch which block, and when, is the caller's concern.

    Stateless beyond its views. ValueError for what is no pool.
    """

    def __init__(self, pool: Tensor, layers: range | None = None, heads: range | None = None) -> None:
        if pool.dim() != 6 or not pool.is_contiguous():
            raise ValueError(
                "a KV pool is one contiguous tensor [num_blocks, layers, 2, kv_heads, block_size, head_dim], "
                f"not {tuple(pool.shape)}"
            )
        self.num_blocks, all_layers, pair, all_heads, self.block_size, head_dim = pool.shape
        layers = range(all_layers) if layers is None else layers
        heads = range(all_heads) if heads is None else heads
        self.rows = len(layers) * pair * len(heads)
        self.token_bytes = head_dim * pool.element_size()  # in one row
        self.row_bytes = self.block_size * self.token_bytes
        self.block_bytes = self.rows * self.row_bytes
        self.on_host = pool.device.type == "cpu"
        self.device = pool.device
        self._copies = None if self.on_host else DeviceCopies.fitting(pool, layers, heads)

    def staging(self, memory: Tensor) -> Bytes:
        """Staging memory (a flat uint8 tensor) in the form that gather and scatter take."""
        return memory.numpy() if self.on_host else memory

    def gather(self, blocks: Sequence[int], out: Bytes, rows: Rows | None = None, seed: int | None = None) -> int:
        """Copy whole blocks, in this order, to the front of ``out``; or of one block some ``rows``.

        Returns the checksum of the bytes copied, under ``seed``; 0 without one.
        """
        if seed is not None:
            return self._read_summing(blocks, out, rows, seed)
        self._read_any(blocks, out, rows)
        settle(self.device)
        return 0

    def scatter(
        self,
        table: Sequence[int],
        staged: Bytes,
        staged_block_size: int,
        first_token: int,
        start: int,
        end: int,
        rows: Rows | None = None,
        ahead: StagedSlice | None = None,
    ) -> int:
        """Write tokens ``[start, end)`` from staging into the blocks of ``table``; no other byte of the pool changes.

        ``table`` covers positions ``0 .. end`` in blocks of this pool. ``staged`` holds whole blocks of
        ``staged_block_size`` tokens, or of one block some ``rows``; its first token is position ``first_token``.
        Returns the checksum of the slice ``ahead``, which is to be written next; 0 without one.
        """
        found = self._write_summing(table, staged, staged_block_size, first_token, (start, end), rows, ahead)
        settle(self.device)  # the caller gives staging, and its lock, back now
        return found

    def warm(self) -> None:
        """Compile what a device's copies need, on the first block, whose bytes stay as they are: before any is used."""
        if self._copies is None or not self.num_blocks:
            return
        stream = torch.cuda.current_stream(self.device)
        stream.wait_stream(torch.cuda.default_stream(self.device))  # which may still be clearing the pool
        staged = torch.empty(self.block_bytes, dtype=torch.uint8, device=self.device)
        self._copies.gather((0,), staged, None)
        self._copies.scatter((0,), staged)
        self._copies.gather((0,), staged, 0)
        digest(staged, 0)

    def _nbytes(self, blocks: Sequence[int], rows: Rows | None) -> int:
        return len(blocks) * self.block_bytes if rows is None else (rows[1] - rows[0]) * self.row_bytes

    def _read_summing(self, blocks: Sequence[int], out: Bytes, rows: Rows | None, seed: int) -> int:
        """Copy to the front of ``out``; the checksum of that. In two passes, unless somebody knows better."""
        if self._copies is not None and rows is None and _on_device(out):
            return self._copies.gather(blocks, out, seed)
        self._read_any(blocks, out, rows)
        if not _on_device(out):
            settle(self.device)
        return digest(out[: self._nbytes(blocks, rows)], seed)

    def _read_any(self, blocks: Sequence[int], out: Bytes, rows: Rows | None) -> None:
        """As ``_read``, by the kernels of a device where they serve; may return before it is done."""
        if self._copies is not None and rows is None and _on_device(out):
            self._copies.gather(blocks, out, None)
        else:
            self._read(blocks, out, rows)

    def _write_summing(
        self,
        table: Sequence[int],
        staged: Bytes,
        size: int,
        first_token: int,
        span: tuple[int, int],
        rows: Rows | None,
        ahead: StagedSlice | None,
    ) -> int:
        """As ``_write``; the checksum of what is ahead, or 0. In two passes, unless somebody knows better."""
        start, end = span
        whole = size == self.block_size and first_token == start and start % size == end % size == 0
        if self._copies is not None and rows is None and whole and _on_device(staged):
            self._copies.scatter(table[start // size : end // size], staged)
        else:
            self._write(table, staged, size, first_token, span, rows)
        return 0 if ahead is None else ahead.digest()

    @abstractmethod
    def _read(self, blocks: Sequence[int], out: Bytes, rows: Rows | None) -> None:
        """Copy to the front of ``out``; on a device perhaps later, in the order of the thread's stream."""

    @abstractmethod
    def _write(
        self, table: Sequence[int], staged: Bytes, size: int, first_token: int, span: tuple[int, int], rows: Rows | None
    ) -> None:
        """Write the tokens of ``span``; staging holds blocks of ``size`` tokens. On a device perhaps later, in turn."""


def put(target: Bytes, source: Bytes) -> None:
    """target[:] = source; between a device and the host (page-locked memory) in the order of the stream, unwaited."""
    if isinstance(target, Tensor):
        target.copy_(source, non_blocking=True)
    else:
        target[:] = source


def _on_device(staged: Bytes) -> bool:
    return isinstance(staged, Tensor) and staged.device.type != "cpu"


def byte_view(tensor: Tensor, *shape: int) -> Bytes:
    """The tensor's own memory as uint8, reshaped; no copy. The tensor must be contiguous."""
    flat = tensor.detach().view(torch.uint8).view(*shape)
    return flat.numpy() if flat.device.type == "cpu" else flat


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
