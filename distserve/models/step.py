"""The input of one forward pass: flat tensors, no padding, prompt chunks before single tokens.

rows of the token matrix:  [ chunk a ......... | chunk b .. | d e f g | h i ]
                             prefill, one sequence each       decode groups
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from distserve_kernels.paged import DecodeGroup, PrefillChunk


@dataclass(frozen=True, slots=True)
class StepInput:
    """Everything a forward pass reads besides weights and KV."""

    token_ids: Tensor  # [tokens] int64
    positions: Tensor  # [tokens] int64
    write_rows: Tensor  # [tokens * 2 * kv_heads] int64: where each token's K and V go
    sample_rows: Tensor | None  # [sampled] int64: the rows whose logits are wanted; None when no item samples
    prefill: tuple[PrefillChunk, ...]
    prefill_tokens: int  # rows before the first decode row
    decode: tuple[DecodeGroup, ...]
