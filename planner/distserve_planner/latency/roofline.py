"""Kernels of a GPU known only by its datasheet: the roofline with the utilisations that measured GPUs reach.

Time = max(FLOPs / reached FLOP/s, bytes / reached bandwidth) + a launch floor. The reached shares are those of the
packaged H200, H100 and A100 tables in the large (``bench/planner_operators.py``); the floor governs small shapes.
"""

from __future__ import annotations

import numpy as np

from distserve_planner.hardware import Gpu
from distserve_planner.latency.base import OutOfRange
from distserve_planner.latency.tables import Curve, Surface

_FLOPS_SHARE = 0.72  # of the datasheet's dense rate, large products
_ATTENTION_SHARE = 0.55  # of the same, causal attention over long prompts
_HBM_SHARE = 0.78
_GEMM_FLOOR_S = 3e-6
_ATTENTION_FLOOR_S = 10e-6
_REDUCE_FLOOR_S = 8e-6
_LINK_SHARE = 0.7
_TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768]
_BATCHES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048]
_LENGTHS = [1, 16, 64, 256, 1024, 4096, 16384, 65536, 131072]


class RooflineKernels:
    """``Kernels`` from a datasheet alone."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    @property
    def name(self) -> str:
        return f"roofline of {self.gpu.name}"

    @property
    def residual(self) -> float:
        """A judgement, from predicting the measured GPUs by their datasheets (bench/planner_operators.py)."""
        return 0.25

    @property
    def token_sizes(self) -> list[float]:
        return [float(t) for t in _TOKENS]

    def gemm(self, n: int, k: int, dtype: str = "bf16") -> Curve:
        m = np.array(_TOKENS, dtype=np.float64)
        size = 1 if dtype == "fp8" else 2
        moved = size * (m * k + k * n) + 2 * m * n
        rate = _FLOPS_SHARE * self.gpu.rate[dtype]
        seconds = np.maximum(2 * m * n * k / rate, moved / (_HBM_SHARE * self.gpu.hbm_bytes_s)) + _GEMM_FLOOR_S
        return Curve(self.token_sizes, seconds.tolist())

    def prefill(self, heads: int, kv_heads: int, head_dim: int) -> Surface:
        batch, length = _grid()
        flops = 2 * batch * heads * head_dim * length**2
        moved = 4 * batch * length * head_dim * (heads + kv_heads)
        return self._attention(flops, moved, power=2.0)

    def decode(self, heads: int, kv_heads: int, head_dim: int) -> Surface:
        batch, length = _grid()
        flops = 4 * batch * heads * head_dim * length
        moved = 4 * batch * head_dim * (length * kv_heads + heads)
        return self._attention(flops, moved, power=1.0)

    def _attention(self, flops: np.ndarray, moved: np.ndarray, power: float) -> Surface:
        bound = np.maximum(flops / (_ATTENTION_SHARE * self.gpu.flops), moved / (_HBM_SHARE * self.gpu.hbm_bytes_s))
        return Surface(_BATCHES, _LENGTHS, bound + _ATTENTION_FLOOR_S, power)

    def all_reduce(self, gpus: int) -> Curve:
        """Ring all-reduce over NVLink, or PCIe where there is none: 2 (g - 1) / g of the buffer passes each link."""
        link = _LINK_SHARE * (self.gpu.nvlink_bytes_s or self.gpu.pcie_bytes_s)
        sizes = [float(1 << power) for power in range(10, 30)]
        return Curve(sizes, [_REDUCE_FLOOR_S + 2 * (gpus - 1) / gpus * size / link for size in sizes])

    def experts(self, hidden: int, inter: int, active: int, count: int, tp: int) -> Curve:
        """Each expert that some token chose is read once; tokens spread evenly."""
        if min(hidden, inter, active, count) < 1:
            raise OutOfRange("a mixture needs experts", "at least one")
        weights = 3 * hidden * inter / tp
        seconds = []
        for tokens in _TOKENS:
            touched = count * (1 - (1 - active / count) ** tokens)
            compute = 2 * tokens * active * weights / (_FLOPS_SHARE * 0.7 * self.gpu.flops)
            seconds.append(
                max(compute, 2 * touched * weights / (_HBM_SHARE * self.gpu.hbm_bytes_s)) + 6 * _GEMM_FLOOR_S
            )
        return Curve(self.token_sizes, seconds)


def _grid() -> tuple[np.ndarray, np.ndarray]:
    batch, length = np.meshgrid(np.array(_BATCHES, float), np.array(_LENGTHS, float), indexing="ij")
    return batch, length
