"""The face of the kernels: the operations a model needs, chosen once for a device.

The torch reference serves every device; on a GPU with Triton, kernels of the same signatures take the place of some.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distserve_kernels.backend import triton_serves
from distserve_kernels.decode_attention import decode_attention
from distserve_kernels.kv_write import kv_write
from distserve_kernels.paged import DecodeGroup, LayerKv
from distserve_kernels.paged_ops import PAGED_REFERENCE, PagedOps, triton_paged_ops
from distserve_kernels.prefill_attention import prefill_attention
from distserve_kernels.rms_norm import add_rms_norm, rms_norm
from distserve_kernels.rotary import rotary_
from distserve_kernels.silu_mul import silu_mul


@dataclass(frozen=True, slots=True)
class Ops:
    """One implementation of every operation; shapes and meaning stand in each operation's own file."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    rotary_: Callable[[Tensor, Tensor, Tensor], None]
    silu_mul: Callable[[Tensor], Tensor]
    kv_write: Callable[[LayerKv, Tensor, Tensor], None]
    prefill_attention: Callable[[Tensor, Tensor, Tensor, int, float], Tensor]
    decode_attention: Callable[[Tensor, LayerKv, tuple[DecodeGroup, ...], float], Tensor]
    paged: PagedOps  # for steps that come with block tables


REFERENCE = Ops(
    rms_norm, add_rms_norm, rotary_, silu_mul, kv_write, prefill_attention, decode_attention, PAGED_REFERENCE
)


def ops_for(device: torch.device, asked: str = "auto") -> Ops:
    """The operations to use on ``device``; ``asked`` and errors as in ``backend.triton_serves``."""
    return _with_triton(REFERENCE) if triton_serves(device, asked) else REFERENCE


def _with_triton(plain: Ops) -> Ops:
    from distserve_kernels.triton import gate, norm  # needs Triton

    return replace(
        plain,
        rms_norm=norm.rms_norm,
        add_rms_norm=norm.add_rms_norm,
        silu_mul=gate.silu_mul,
        paged=triton_paged_ops(),
    )
