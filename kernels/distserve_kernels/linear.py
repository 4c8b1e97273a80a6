"""A linear map with its weight packed for the device it runs on: y = x·Wᵀ + b.

x: [tokens, in]   W: [out, in]   b: [out]   y: [tokens, out]

On CPU, oneDNN reads a weight it has laid out itself at memory speed: at one row it is about twice as fast as torch's
``linear`` in bfloat16 and three times in float32, at 512 rows equal in bfloat16 and twice as fast in float32. A CPU
without float16 arithmetic multiplies float16 weights as float32: exact, faster, twice the memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_PACKED_DTYPES = (torch.float32, torch.bfloat16)


class Linear:
    """A weight, packed once, and its bias. The plain weight is not kept."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self._widened = weight.device.type == "cpu" and weight.dtype == torch.float16
        if self._widened:
            weight = weight.float()
            bias = None if bias is None else bias.float()
        self._bias = bias
        self._packed = can_pack(weight)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 1) if self._packed else weight

    def __call__(self, x: Tensor) -> Tensor:
        """x: [tokens, in] in the weight's dtype, contiguous → [tokens, out]."""
        if self._widened:
            x = x.float()
        if self._packed:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        else:
            y = F.linear(x, self._weight, self._bias)
        return y.to(self.dtype) if self._widened else y

    def plain(self) -> tuple[Tensor, Tensor | None]:
        """The weight [out, in] and the bias as they were given."""
        weight = self._weight.to_dense() if self._packed else self._weight
        return weight.to(self.dtype), None if self._bias is None else self._bias.to(self.dtype)

    def give_up(self) -> tuple[Tensor, Tensor | None]:
        """``plain``, for another to keep: this object is of no use afterwards."""
        weight, bias = self.plain()
        self._weight, self._bias = weight.new_empty(0), None
        return weight, bias


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN packs weights of this device and dtype in this build of torch."""
    if weight.device.type != "cpu" or weight.dtype not in _PACKED_DTYPES or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype != torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
