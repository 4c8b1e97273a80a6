"""The face of the fused and paged kernels, chosen once for a device: what a GPU's forward pass and mover are made of.

Part of ``ops``, where models find them: these take block tables and slots instead of gathered rows, in fixed shapes
and without reading anything back, so that a step can be captured as a CUDA graph. Meaning: ``paged_reference``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from distserve_kernels import paged_reference
from distserve_kernels.backend import triton_serves


@dataclass(frozen=True, slots=True)
class PagedOps:
    """One implementation of every operation; shapes and meaning stand in ``paged_reference``."""

    rotary_kv_write: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None]
    kv_write: Callable[[Tensor, Tensor, Tensor], None]
    prefill_attention: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float, int], Tensor]
    decode_attention: Callable[[Tensor, Tensor, Tensor, Tensor, float, int], Tensor]
    kv_gather: Callable[[Tensor, Tensor, range, range, Tensor, bool], Tensor]
    kv_scatter: Callable[[Tensor, Tensor, range, range, Tensor, bool], Tensor]
    staging_checksum: Callable[[Tensor], Tensor]
    sample: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


PAGED_REFERENCE = PagedOps(
    paged_reference.rotary_kv_write,
    paged_reference.paged_kv_write,
    paged_reference.paged_prefill_attention,
    paged_reference.paged_decode_attention,
    paged_reference.kv_gather,
    paged_reference.kv_scatter,
    paged_reference.staging_checksum,
    paged_reference.sample,
)


def paged_ops_for(device: torch.device, asked: str = "auto") -> PagedOps:
    """The operations to use on ``device``; ``asked`` and errors as in ``backend.triton_serves``."""
    return triton_paged_ops() if triton_serves(device, asked) else PAGED_REFERENCE


def triton_paged_ops() -> PagedOps:
    """Those in Triton, which must be there."""
    from distserve_kernels.triton import decode, kv_move, prefill, rotary, sampling  # needs Triton

    return PagedOps(
        rotary.rotary_kv_write,
        rotary.paged_kv_write,
        prefill.paged_prefill_attention,
        decode.paged_decode_attention,
        kv_move.kv_gather,
        kv_move.kv_scatter,
        kv_move.staging_checksum,
        sampling.sample,
    )
