"""Gated activation (SwiGLU, arXiv 2002.05202): y = silu(gate) · up.

x: [tokens, 2 * width], gate before up   y: [tokens, width]
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def silu_mul(x: Tensor) -> Tensor:
    """The gated activation of the packed ``x``."""
    gate, up = x.chunk(2, -1)
    return F.silu(gate).mul_(up)
