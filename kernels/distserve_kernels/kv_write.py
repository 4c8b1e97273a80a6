"""Write new keys and values into the paged pool: token_rows[rows] = (K, V).

kv: [tokens, 2 * kv_heads, head_dim], the K heads before the V heads   rows: [tokens * 2 * kv_heads] (``token_rows``)
"""

from __future__ import annotations

from torch import Tensor

from distserve_kernels.paged import LayerKv
from distserve_kernels.stored import put_rows


def kv_write(layer: LayerKv, rows: Tensor, kv: Tensor) -> None:
    """Scatter ``kv`` into ``layer``'s rows, in place and in their dtype. No two tokens of a step share a row."""
    put_rows(layer.token_rows, rows, kv.reshape(-1, layer.head_dim))
