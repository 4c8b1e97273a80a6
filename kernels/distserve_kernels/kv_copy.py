"""Copies between all layers and heads of a paged KV pool and staging: a block is one run of bytes there, and blocks of
adjacent ids are one larger run.

With the native library, whole blocks are copied and summed up in one pass over memory: the source sums what it copies,
and the destination sums what it is to write next while it writes what it has verified. Without it, or where blocks
are cut differently at the two ends, a copy and a checksum are two passes.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence

from torch import Tensor

from distserve_kernels.checksum import Bytes
from distserve_kernels.kv_part import PagedPart, Rows, StagedSlice, byte_view, put, runs, shared_spans
from distserve_kernels.native.abi import COPY_UNIT, SHORTEST_SUM

_GATHER_BYTES = 512 << 10
"""A larger copy would bypass the cache (memcpy's non-temporal stores), but staging is read again at once."""


class PagedBytes(PagedPart):
    """A whole pool. With a ``native`` library (``distserve_kernels.native.library``) for what is faster with it."""

    def __init__(self, pool: Tensor, native: ctypes.CDLL | None = None) -> None:
        super().__init__(pool)
        self._blocks = byte_view(pool, self.num_blocks, self.block_bytes)
        self._tokens = byte_view(pool, self.num_blocks, self.rows, self.block_size, self.token_bytes)
        self._memory = pool.data_ptr()
        self._native = native if self.on_host and self.block_bytes % COPY_UNIT == 0 else None

    def _read_summing(self, blocks: Sequence[int], out: Bytes, rows: Rows | None, seed: int) -> int:
        nbytes = self._nbytes(blocks, rows)
        if self._native is None or nbytes < SHORTEST_SUM:
            return super()._read_summing(blocks, out, rows, seed)
        if nbytes > len(out):
            raise ValueError(f"{len(blocks)} blocks do not fit staging of {len(out)} bytes")
        spans = self._spans(blocks, rows)
        return int(self._native.ds_gather(self._memory, _at(spans), len(spans) // 2, _at_bytes(out), seed))

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
        start, end = span
        whole = size == self.block_size and first_token == start and start % size == end % size == 0
        if self._native is None or not whole or (ahead is not None and len(ahead.staged) < SHORTEST_SUM):
            return super()._write_summing(table, staged, size, first_token, span, rows, ahead)
        blocks = table[start // size : end // size]
        if self._nbytes(blocks, rows) > len(staged):
            raise ValueError(f"{len(staged)} staged bytes are not tokens {start} to {end}")
        spans = self._spans(blocks, rows)
        summed = (None, 0, 0) if ahead is None else (_at_bytes(ahead.staged), len(ahead.staged), ahead.seed)
        return int(self._native.ds_scatter(self._memory, _at(spans), len(spans) // 2, _at_bytes(staged), *summed))

    def _spans(self, blocks: Sequence[int], rows: Rows | None) -> array[int]:
        """Offsets and lengths in the pool's memory, in turns."""
        spans = array("q")
        if rows is not None:
            (block,) = blocks
            spans.extend((block * self.block_bytes + rows[0] * self.row_bytes, (rows[1] - rows[0]) * self.row_bytes))
        else:
            for first, count in runs(blocks):
                spans.extend((first * self.block_bytes, count * self.block_bytes))
        return spans

    def _read(self, blocks: Sequence[int], out: Bytes, rows: Rows | None) -> None:
        if rows is not None:
            (block,) = blocks
            low, high = rows[0] * self.row_bytes, rows[1] * self.row_bytes
            put(out[: high - low], self._blocks[block, low:high])
            return
        at = 0
        for first, count in runs(blocks):
            run = self._blocks[first : first + count].reshape(-1)
            step = _GATHER_BYTES if self.on_host else len(run)
            for low in range(0, len(run), step):
                part = run[low : low + step]
                put(out[at : at + len(part)], part)
                at += len(part)

    def _write(
        self, table: Sequence[int], staged: Bytes, size: int, first_token: int, span: tuple[int, int], rows: Rows | None
    ) -> None:
        start, end = span
        if size == self.block_size:
            low, high = -(-start // size), end // size  # the whole blocks of the range
            if low < high:
                self._write_blocks(table[low:high], staged, low - first_token // size, rows)
                self._write_tokens(table, staged, size, first_token, (start, low * size), rows)
                start = high * size
        self._write_tokens(table, staged, size, first_token, (start, end), rows)

    def _write_blocks(self, blocks: Sequence[int], staged: Bytes, at: int, rows: Rows | None) -> None:
        """Write whole blocks of this pool's own size, the first being block ``at`` of staging: one copy a run."""
        if rows is not None:
            low, high = rows[0] * self.row_bytes, rows[1] * self.row_bytes
            put(self._blocks[blocks[0], low:high], staged[: high - low])
            return
        at *= self.block_bytes
        for first, count in runs(blocks):
            nbytes = count * self.block_bytes
            put(self._blocks[first : first + count].reshape(-1), staged[at : at + nbytes])
            at += nbytes

    def _write_tokens(
        self, table: Sequence[int], staged: Bytes, size: int, first_token: int, span: tuple[int, int], rows: Rows | None
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
            put(self._tokens[table[target], low:high, shift : shift + n], source[block, :, offset : offset + n])


def _at(numbers: array[int]) -> int:
    """The address of the first number."""
    return numbers.buffer_info()[0]


def _at_bytes(staged: Bytes) -> int:
    """The address of the first byte of a NumPy array."""
    return int(staged.__array_interface__["data"][0])
