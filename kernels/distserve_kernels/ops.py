"""The face of the kernels: the operations a model needs, chosen once for a device.

The torch reference serves every device. A faster backend is one more row of ``_BACKENDS``, tested against it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from distserve_kernels.decode_attention import decode_attention
from distserve_kernels.kv_write import kv_write
from distserve_kernels.paged import DecodeGroup, LayerKv
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


REFERENCE = Ops(rms_norm, add_rms_norm, rotary_, silu_mul, kv_write, prefill_attention, decode_attention)
_BACKENDS: dict[str, Ops] = {"cpu": REFERENCE}


def ops_for(device: torch.device) -> Ops:
    """The operations to use on ``device``."""
    return _BACKENDS.get(device.type, REFERENCE)
