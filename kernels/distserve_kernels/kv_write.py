"""Write new keys and values into the paged pool: token_rows[rows] = (K, V).

kv: [tokens, 2 * kv_heads, head_dim], the K heads before the V heads   rows: [tokens * 2 * kv_heads] (``token_rows``)
"""

from __future__ import annotations

from torch import Tensor

from distserve_kernels.paged import LayerKv


def kv_write(layer: LayerKv, rows: Tensor, kv: Tensor) -> None:
    """Scatter ``kv`` into ``layer``'s rows, in place. No two tokens of a step share a row."""
    layer.token_rows.index_copy_(0, rows, kv.reshape(-1, layer.head_dim))
