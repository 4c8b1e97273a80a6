"""Rotary position embedding (arXiv 2104.09864), half-split layout: (x₁, x₂) → (x₁c − x₂s, x₂c + x₁s).

x: [tokens, heads, dim]   cos, sin: [tokens, 1, dim]; sin carries the sign, −s in its first half, s in its second, so
that the rotation is ``x · cos + roll(x, dim/2) · sin``: three operations, no copies of halves.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate ``x`` by each token's angles, in place; x may be a strided view of a wider tensor."""
    torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin, out=x)


def rotary_table(inverse_frequencies: Tensor, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and signed sin, [length, 1, dim], of positions 0 .. length; angles are computed in float32."""
    angles = torch.outer(torch.arange(length, dtype=torch.float32), inverse_frequencies.float())
    cos, sin = angles.cos(), angles.sin()
    return (
        torch.cat((cos, cos), -1).to(dtype).unsqueeze(1),
        torch.cat((-sin, sin), -1).to(dtype).unsqueeze(1),
    )
