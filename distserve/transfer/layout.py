"""How KV is laid out at an end of a link, whether two ends fit, and how a stage is cut up. Arithmetic only.

A stage is cut into *slices*, each with its own checksum and so small that it stays in a core's cache between its copy
and its checksum. A *piece* is what goes through a staging slot at once, and wakes the other end: one or more slices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from distserve.kv.shard import KvPart

MAX_SLOT_BYTES = 64 << 20
"""A row that needs a larger staging slot is refused at the handshake."""

_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}


@dataclass(frozen=True, slots=True)
class Layout:
    """A pool's shape but for its number of blocks. Only ``block_size`` may differ between the ends of a link."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    block_size: int

    @classmethod
    def of(cls, pool: Tensor, block_size: int) -> Layout:
        """Of ``pool [num_blocks, layers, 2, kv_heads, block_size, head_dim]``; ValueError if it is no such thing."""
        if pool.dim() != 6 or pool.shape[2] != 2 or pool.shape[4] != block_size or not pool.is_contiguous():
            raise ValueError(
                "a KV pool is one contiguous tensor [num_blocks, layers, 2, kv_heads, block_size, head_dim] with "
                f"block_size {block_size}, not {tuple(pool.shape)}"
            )
        return cls(pool.shape[1], pool.shape[3], pool.shape[5], str(pool.dtype).removeprefix("torch."), block_size)

    @property
    def rows(self) -> int:
        """Rows of a block: one for each layer, k or v, and head."""
        return self.layers * 2 * self.kv_heads

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of a block; ValueError for a dtype that no pool has."""
        if self.dtype not in _ELEMENT_BYTES:
            raise ValueError(f"KV of dtype {self.dtype!r} cannot be moved; use one of {', '.join(_ELEMENT_BYTES)}")
        return self.block_size * self.head_dim * _ELEMENT_BYTES[self.dtype]

    @property
    def block_bytes(self) -> int:
        return self.rows * self.row_bytes

    def slot_bytes(self, piece_bytes: int) -> int:
        """The size of a staging slot for pieces of about ``piece_bytes``: whole blocks, or else whole rows of one."""
        unit = self.block_bytes if self.block_bytes <= piece_bytes else self.row_bytes
        return max(1, piece_bytes // unit) * unit

    def of_part(self, part: KvPart) -> Layout:
        """The layout of a pool that holds only this part of it."""
        return replace(self, layers=len(part.layers), kv_heads=len(part.heads))

    def mismatch(self, other: Layout) -> str:
        """The first field, other than block size, in which the two differ, as "layers 30 and 32"; empty if none."""
        for name in ("layers", "kv_heads", "head_dim", "dtype"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name} {mine} and {theirs}"
        return ""


@dataclass(frozen=True, slots=True)
class Slice:
    """Blocks ``[low, high)`` of the source's table, or some ``rows`` of one block.

    Of its tokens, ``[start, end)`` are to be written.
    """

    low: int
    high: int
    rows: tuple[int, int] | None  # None: all
    first_token: int  # position of its first token
    start: int
    end: int
    nbytes: int


def cut(layout: Layout, start: int, end: int, slice_bytes: int) -> Iterator[Slice]:
    """Cut tokens ``[start, end)`` into slices of at most ``slice_bytes``: whole source blocks, or rows of one block.

    Both ends call it with the same arguments; ``layout`` is the source's. Rows are dealt out evenly.
    """
    size, last = layout.block_size, -(-end // layout.block_size)
    blocks_a_slice = slice_bytes // layout.block_bytes
    parts = -(-layout.rows // (slice_bytes // layout.row_bytes))
    rows_a_slice = -(-layout.rows // parts)
    for low in range(start // size, last, max(1, blocks_a_slice)):
        high = min(low + max(1, blocks_a_slice), last)
        tokens = (low * size, max(start, low * size), min(end, high * size))
        if blocks_a_slice:
            yield Slice(low, high, None, *tokens, (high - low) * layout.block_bytes)
            continue
        for row in range(0, layout.rows, rows_a_slice):
            rows = (row, min(row + rows_a_slice, layout.rows))
            yield Slice(low, high, rows, *tokens, (rows[1] - row) * layout.row_bytes)


def pieces(slices: Iterable[Slice], slot_bytes: int) -> Iterator[list[Slice]]:
    """Group slices into pieces that fit a slot. The first is one slice, each later one at most twice the one before:
    the other end begins early, and then is woken seldom. So is the last: it ends soon after this one."""
    piece: list[Slice] = []
    nbytes, most = 0, 1
    for each in slices:
        if piece and (len(piece) == most or nbytes + each.nbytes > slot_bytes):
            yield piece
            piece, nbytes, most = [], 0, most * 2
        piece.append(each)
        nbytes += each.nbytes
    if len(piece) > 1:
        yield piece[:-1]
    if piece:
        yield piece[-1:]
