"""RMS normalization with the residual add: r = residual + x, y = r / sqrt(mean(r²) + eps) · weight.

x, residual, y: [..., width]   weight: [width]   one program a row; the row stays in registers between its two uses, so
memory sees each element once each way. Reference: ``distserve_kernels.rms_norm``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rms_norm(
    x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, x_stride, width, eps,
    ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    wide = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        # Rounded to the tensors' own dtype before it is normalized, as the reference does.
        before = tl.load(residual_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        total = (wide + before).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * width + columns, total, mask=inside)
        wide = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / width + eps)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * width + columns, (wide * scale * weight).to(y_ptr.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The normalized ``x``; its last dimension must be contiguous."""
    rows = x.reshape(-1, x.shape[-1])
    y = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    _launch(rows, rows, weight, y, y, eps, add=False)
    return y.view(x.shape)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``residual + x`` normalized, and the sum itself: (normalized, new residual)."""
    rows, before = x.reshape(-1, x.shape[-1]), residual.reshape(-1, x.shape[-1]).contiguous()
    y, total = torch.empty_like(before), torch.empty_like(before)
    _launch(rows, before, weight, y, total, eps, add=True)
    return y.view(x.shape), total.view(x.shape)


def _launch(rows: Tensor, residual: Tensor, weight: Tensor, y: Tensor, total: Tensor, eps: float, add: bool) -> None:
    count, width = rows.shape
    if count == 0:
        return
    block = triton.next_power_of_2(width)
    warps = min(16, max(1, block // 512))
    _rms_norm[(count,)](
        rows, residual, weight, y, total, rows.stride(0), width, eps, ADD=add, BLOCK=block, num_warps=warps
    )
