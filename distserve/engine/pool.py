"""The paged KV pool of one rank: one tensor, all layers of a block together.

Owns the memory and its layout, not who holds which block (the ledger does). A block is one contiguous run of bytes,
so that handing it off, swapping it or migrating it is a plain copy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distserve_kernels.memory import advise_large_pages
from distserve_kernels.paged import LayerKv, layer_views
from distserve_kernels.stored import whole_bytes


class KvPool:
    """``tensor``: [blocks, layers, 2 (K, V), kv_heads, block_size, head_dim], zeroed, in the dtype of KV."""

    def __init__(
        self,
        blocks: int,
        layers: int,
        kv_heads: int,
        block_size: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.tensor = torch.empty((blocks, layers, 2, kv_heads, block_size, head_dim), dtype=dtype, device=device)
        advise_large_pages(self.tensor)
        self.tensor.zero_()
        self._fillable = whole_bytes(self.tensor)
        self.layers: tuple[LayerKv, ...] = layer_views(self.tensor)

    @property
    def blocks(self) -> int:
        return self.tensor.shape[0]

    @property
    def block_size(self) -> int:
        return self.tensor.shape[4]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, all layers, K and V."""
        return self.tensor[0].nbytes if self.blocks else 0

    def clear(self, blocks: Tensor) -> None:
        """Zero whole blocks [n] int64. A block just begun is cleared, lest its last owner's NaN reach a masked lane."""
        self._fillable.index_fill_(0, blocks, 0)

    def clear_tail(self, block: int, offset: int) -> None:
        """Zero one block from a token's place in it onward: what lies there is an earlier owner's."""
        self._fillable[block, :, :, :, offset:].zero_()
