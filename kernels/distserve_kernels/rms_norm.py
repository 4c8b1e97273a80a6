"""RMS normalization (arXiv 1910.07467): y = x / sqrt(mean(x²) + eps) · weight, over the last dimension.

x, y: [..., width]   weight: [width]   computed in float32, returned in x's dtype.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The normalized ``x``."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``residual + x`` normalized, and the sum itself: (normalized, new residual)."""
    residual = residual + x
    return F.rms_norm(residual, (x.shape[-1],), weight, eps), residual
