"""The input of one forward pass: flat tensors, no padding, prompt chunks before single tokens.

rows of the token matrix:  [ chunk a ......... | chunk b .. | d e f g | h i ]
                             prefill, one sequence each       one token each

Where the sequences' KV is comes in one of two forms, and the models' attention takes either: rows to gather, for
torch's matrix products (``GatheredKv``); block tables and slots, for paged kernels (``PagedKv``).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from distserve_kernels.paged import DecodeGroup, PrefillChunk


@dataclass(frozen=True, slots=True)
class GatheredKv:
    """Row numbers in the views of ``LayerKv``. Single tokens go in groups of similar length."""

    write_rows: Tensor  # [tokens * 2 * kv_heads] int64: where each token's K and V go
    prefill: tuple[PrefillChunk, ...]
    prefill_tokens: int  # rows before the first decode row
    decode: tuple[DecodeGroup, ...]


@dataclass(frozen=True, slots=True)
class PagedChunks:
    """All chunks of a step; arguments of ``paged_prefill_attention``."""

    tables: Tensor  # [chunks, blocks] int32; what lies behind a sequence's last block is not read
    firsts: Tensor  # [chunks + 1] int32: the rows of each
    starts: Tensor  # [chunks] int32: positions before each
    longest: int  # the most rows of one


@dataclass(frozen=True, slots=True)
class PagedSingles:
    """All sequences that compute one token; arguments of ``paged_decode_attention``."""

    tables: Tensor  # [sequences, blocks] int32
    lengths: Tensor  # [sequences] int32, the new token included; 0: a row of padding
    longest: int  # at least every length


@dataclass(frozen=True, slots=True)
class PagedKv:
    """Slots to write and block tables to read."""

    slots: Tensor  # [tokens] int64: block * block_size + offset; negative: not written
    prefill: PagedChunks | None
    prefill_tokens: int  # rows before the first decode row
    decode: PagedSingles | None


@dataclass(frozen=True, slots=True)
class StepInput:
    """Everything a forward pass reads besides weights and KV."""

    token_ids: Tensor  # [tokens] int64
    positions: Tensor  # [tokens] int64
    sample_rows: Tensor | None  # [sampled] int64: the rows whose logits are wanted; None when no item samples
    kv: GatheredKv | PagedKv
