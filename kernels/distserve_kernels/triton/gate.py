"""Gated activation (SwiGLU): y = silu(gate) · up.

x: [tokens, 2 * width], gate before up   y: [tokens, width]   Reference: ``distserve_kernels.silu_mul``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from distserve_kernels.triton.tuning import tuned

_CONFIGS = [triton.Config({"BLOCK": block}, num_warps=warps) for block, warps in ((1024, 4), (2048, 8), (512, 4))]


@tuned(_CONFIGS, ["width"])
@triton.jit
def _silu_mul(x_ptr, y_ptr, x_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * x_stride + width + columns, mask=inside, other=0.0).to(tl.float32)
    kind = y_ptr.dtype.element_ty
    # Rounded between the two, as two torch operations round.
    activated = (gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32)
    tl.store(y_ptr + row * width + columns, (activated * up).to(kind), mask=inside)


def silu_mul(x: Tensor) -> Tensor:
    """The gated activation of the packed ``x``, whose rows are contiguous."""
    tokens, width = x.shape[0], x.shape[1] // 2
    y = torch.empty(tokens, width, dtype=x.dtype, device=x.device)
    if tokens:
        _silu_mul[lambda meta: (tokens, triton.cdiv(width, meta["BLOCK"]))](x, y, x.stride(0), width)
    return y
