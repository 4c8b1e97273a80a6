"""Copies between some layers and heads of a paged KV pool and contiguous staging memory, in bytes.

The same face as ``kv_copy.PagedBytes``, for a rectangle [layers, heads] of the pool: what two ranks have in common
whose instances are cut differently. Staging is laid out like a pool of only that rectangle:

staging: [blocks, window layers, 2 (K, V), window heads, block_size, head_dim], whole blocks one after another; or some
         rows (one layer, k or v, head) of one block.

One strided copy a run of blocks; the innermost run is at least one row, block_size tokens of a head. Knows no tickets,
no ranks and no checksums.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distserve_kernels.kv_copy import Bytes, byte_view, runs, shared_spans


class PagedWindow:
    """``layers`` and ``heads`` of a contiguous pool [num_blocks, layers, 2, kv_heads, block_size, head_dim]."""

    def __init__(self, pool: Tensor, layers: range, heads: range) -> None:
        blocks, all_layers, pair, all_heads, block_size, head_dim = pool.shape
        if not (0 <= layers.start < layers.stop <= all_layers and 0 <= heads.start < heads.stop <= all_heads):
            raise ValueError(f"layers {layers} and heads {heads} are not in a pool of {all_layers} and {all_heads}")
        self.num_blocks = blocks
        self.block_size = block_size
        self.rows = len(layers) * pair * len(heads)
        self.token_bytes = head_dim * pool.element_size()  # in one row
        self.row_bytes = block_size * self.token_bytes
        self.block_bytes = self.rows * self.row_bytes
        self.on_host = pool.device.type == "cpu"
        self._shape = (len(layers), pair, len(heads))
        whole = byte_view(pool, blocks, all_layers, pair, all_heads, self.row_bytes)
        self._rows = whole[:, layers.start : layers.stop, :, heads.start : heads.stop]
        tokens = byte_view(pool, blocks, all_layers, pair, all_heads, block_size, self.token_bytes)
        self._tokens = tokens[:, layers.start : layers.stop, :, heads.start : heads.stop]
        self._device = pool.device

    def staging(self, memory: Tensor) -> Bytes:
        """Staging memory (a flat uint8 tensor) in the form that gather and scatter take."""
        return memory.numpy() if self.on_host else memory

    def gather(self, blocks: Sequence[int], out: Bytes, rows: tuple[int, int] | None = None) -> int:
        """Copy whole blocks, in this order, to the front of ``out``; or of one block the ``rows`` [low, high).

        Returns the bytes written.
        """
        if rows is not None:
            (block,) = blocks
            for at, row in enumerate(range(*rows)):
                out[at * self.row_bytes : (at + 1) * self.row_bytes] = self._rows[block][self._place(row)]
            return (rows[1] - rows[0]) * self.row_bytes
        nbytes = len(blocks) * self.block_bytes
        staged = out[:nbytes].reshape(len(blocks), *self._shape, self.row_bytes)
        at = 0
        for first, count in runs(blocks):
            staged[at : at + count] = self._rows[first : first + count]
            at += count
        return nbytes

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

        Arguments as of ``PagedBytes.scatter``.
        """
        if rows is not None:
            self._scatter_rows(table, staged, staged_block_size, first_token, (start, end), rows)
        else:
            self._scatter_blocks(table, staged, staged_block_size, first_token, (start, end))
        if not self.on_host:
            torch.cuda.current_stream(self._device).synchronize()  # the caller gives staging back now

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
                self._tokens[first : first + adjacent] = source[at : at + adjacent]
                at += adjacent
            return
        for at, stop in shared_spans(*span, size, self.block_size):
            block, offset = divmod(at - first_token, size)
            target, shift = divmod(at, self.block_size)
            n = stop - at
            self._tokens[table[target], ..., shift : shift + n, :] = source[block, ..., offset : offset + n, :]

    def _scatter_rows(
        self,
        table: Sequence[int],
        staged: Bytes,
        size: int,
        first_token: int,
        span: tuple[int, int],
        rows: tuple[int, int],
    ) -> None:
        count = rows[1] - rows[0]
        source = staged[: count * size * self.token_bytes].reshape(count, size, self.token_bytes)
        for at, stop in shared_spans(*span, size, self.block_size):
            offset = at - first_token
            target, shift = divmod(at, self.block_size)
            n = stop - at
            for index, row in enumerate(range(*rows)):
                here = self._tokens[table[target]][self._place(row)]
                here[shift : shift + n] = source[index, offset : offset + n]

    def _place(self, row: int) -> tuple[int, int, int]:
        """(layer, k or v, head) of a row, within the window."""
        _, pair, heads = self._shape
        layer, rest = divmod(row, pair * heads)
        return layer, rest // heads, rest % heads
