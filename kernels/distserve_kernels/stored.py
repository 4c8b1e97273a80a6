"""KV kept in another dtype than it is computed in: cast on write and on read, for every device torch knows.

8-bit floats (e4m3, without scales: KV of the models served lies far within ±448) have no indexed copies in torch;
their bytes do.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` as it will be read back from a pool of ``dtype``, in its own dtype."""
    return x if x.dtype == dtype else cast(x, dtype).to(x.dtype)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in ``dtype``; what an 8-bit float cannot hold becomes the largest one, as no infinity exists there."""
    if x.dtype == dtype:
        return x
    if dtype.itemsize == 1:
        most = torch.finfo(dtype).max
        x = x.clamp(-most, most)
    return x.to(dtype)


def put_rows(table: Tensor, rows: Tensor, values: Tensor) -> None:
    """table[rows] = values, in the table's dtype; rows [n] int64, each once."""
    whole_bytes(table).index_copy_(0, rows, whole_bytes(cast(values, table.dtype)))


def take_rows(table: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """table[rows] in ``dtype``."""
    taken = whole_bytes(table).index_select(0, rows)
    return taken if table.dtype == dtype else taken.view(table.dtype).to(dtype)


def whole_bytes(table: Tensor) -> Tensor:
    """The same memory as numbers that can be copied and filled by index."""
    return table.view(torch.uint8) if table.dtype.itemsize == 1 else table
