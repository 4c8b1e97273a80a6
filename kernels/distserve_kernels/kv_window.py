"""Copies between some layers and heads of a paged KV pool and staging: a rectangle [layers, heads], what two ranks have
in common whose instances are cut differently. Staging is laid out like a pool of only that rectangle.

One strided copy a run of blocks; the innermost run is at least one row, block_size tokens of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from distserve_kernels.checksum import Bytes
from distserve_kernels.kv_part import PagedPart, Rows, byte_view, put, runs, shared_spans


class PagedWindow(PagedPart):
    """``layers`` and ``heads`` of a contiguous pool [num_blocks, layers, 2, kv_heads, block_size, head_dim]."""

    def __init__(self, pool: Tensor, layers: range, heads: range) -> None:
        super().__init__(pool, layers, heads)
        blocks, all_layers, pair, all_heads, block_size, _ = pool.shape
        if not (0 <= layers.start < layers.stop <= all_layers and 0 <= heads.start < heads.stop <= all_heads):
            raise ValueError(f"layers {layers} and heads {heads} are not in a pool of {all_layers} and {all_heads}")
        self._shape = (len(layers), pair, len(heads))
        whole = byte_view(pool, blocks, all_layers, pair, all_heads, self.row_bytes)
        self._rows = whole[:, layers.start : layers.stop, :, heads.start : heads.stop]
        tokens = byte_view(pool, blocks, all_layers, pair, all_heads, block_size, self.token_bytes)
        self._tokens = tokens[:, layers.start : layers.stop, :, heads.start : heads.stop]

    def _read(self, blocks: Sequence[int], out: Bytes, rows: Rows | None) -> None:
        if rows is not None:
            (block,) = blocks
            for at, row in enumerate(range(*rows)):
                put(out[at * self.row_bytes : (at + 1) * self.row_bytes], self._rows[block][self._place(row)])
            return
        staged = out[: self._nbytes(blocks, None)].reshape(len(blocks), *self._shape, self.row_bytes)
        at = 0
        for first, count in runs(blocks):
            put(staged[at : at + count], self._rows[first : first + count])
            at += count

    def _write(
        self, table: Sequence[int], staged: Bytes, size: int, first_token: int, span: tuple[int, int], rows: Rows | None
    ) -> None:
        if rows is not None:
            self._scatter_rows(table, staged, size, first_token, span, rows)
        else:
            self._scatter_blocks(table, staged, size, first_token, span)

    def _scatter_blocks(
        self, table: Sequence[int], staged: Bytes, size: int, first_token: int, span: tuple[int, int]
    ) -> None:
        block_bytes = self.rows * size * self.token_bytes
        count = len(staged) // block_bytes
        source = staged[: count * block_bytes].reshape(count, *self._shape, size, self.token_bytes)
        if size == self.block_size and first_token == span[0] and span[1] % size == 0:
            blocks = table[span[0] // size : span[1] // size]
            at = 0
            for first, adjacent in runs(blocks):
                put(self._tokens[first : first + adjacent], source[at : at + adjacent])
                at += adjacent
            return
        for at, stop in shared_spans(*span, size, self.block_size):
            block, offset = divmod(at - first_token, size)
            target, shift = divmod(at, self.block_size)
            n = stop - at
            put(self._tokens[table[target], ..., shift : shift + n, :], source[block, ..., offset : offset + n, :])

    def _scatter_rows(
        self,
        table: Sequence[int],
        staged: Bytes,
        size: int,
        first_token: int,
        span: tuple[int, int],
        rows: Rows,
    ) -> None:
        count = rows[1] - rows[0]
        source = staged[: count * size * self.token_bytes].reshape(count, size, self.token_bytes)
        for at, stop in shared_spans(*span, size, self.block_size):
            offset = at - first_token
            target, shift = divmod(at, self.block_size)
            n = stop - at
            for index, row in enumerate(range(*rows)):
                here = self._tokens[table[target]][self._place(row)]
                put(here[shift : shift + n], source[index, offset : offset + n])

    def _place(self, row: int) -> tuple[int, int, int]:
        """(layer, k or v, head) of a row, within the window."""
        _, pair, heads = self._shape
        layer, rest = divmod(row, pair * heads)
        return layer, rest // heads, rest % heads
