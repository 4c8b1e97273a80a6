"""What one rank's engine is asked to be. Checked against the model when it is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from distserve.engine.room import PoolLimits
from distserve.models.errors import ModelError

KERNELS = ("auto", "native", "torch", "triton")
CUDA_GRAPHS = ("auto", "off")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KV_DTYPES = {**DTYPES, "fp8_e4m3": torch.float8_e4m3fn}


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """``pool_blocks`` wins over ``measured``, and that over ``kv_tokens``; ``max_model_len`` 0: the model's own;
    ``threads`` 0: torch's choice.

    ``kernels``: "native" is C++ compiled for this CPU at first use, "triton" is for GPUs, each of them or an error;
    "auto" takes what the device has, and torch where that fails.
    """

    model: str
    dtype: str = "float32"
    block_size: int = 16
    kv_tokens: int = 16384
    pool_blocks: int = 0
    measured: bool = False  # the pool is what fits within ``limits``
    limits: PoolLimits = field(default_factory=PoolLimits)
    kv_dtype: str = "auto"  # of the pool; auto: ``dtype``
    max_model_len: int = 0
    threads: int = 0
    cores: tuple[int, ...] = ()  # one for each thread of native kernels; else they run anywhere
    device: str = "cpu"
    kernels: str = "auto"  # "auto" | "native" | "torch" | "triton"
    cuda_graphs: str = "auto"  # "auto": on a GPU, with Triton kernels | "off"
    steps_in_flight: int = 1  # submitted and not yet waited for, at most
    name: str = ""  # the name served; the model's own when empty

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ModelError(f'dtype "{self.dtype}" is unknown; choose one of {", ".join(DTYPES)}')
        if self.kv_dtype != "auto" and self.kv_dtype not in KV_DTYPES:
            raise ModelError(f'KV dtype "{self.kv_dtype}" is unknown; choose one of auto, {", ".join(KV_DTYPES)}')
        if self.kernels not in KERNELS:
            raise ModelError(f'kernels "{self.kernels}" are unknown; choose one of {", ".join(KERNELS)}')
        if self.cuda_graphs not in CUDA_GRAPHS:
            raise ModelError(f'cuda_graphs "{self.cuda_graphs}" is unknown; choose one of {", ".join(CUDA_GRAPHS)}')
        if self.steps_in_flight < 1:
            raise ModelError(f"steps_in_flight must be at least 1, not {self.steps_in_flight}")
        if self.block_size < 1:
            raise ModelError(f"block_size must be at least 1, not {self.block_size}")
        if self.blocks < 1 and not self.measured:
            raise ModelError("the KV pool would hold no block; raise kv_tokens or pool_blocks")

    @property
    def blocks(self) -> int:
        """Of the pool; where it is ``measured``, only once ``pool_blocks`` has been decided."""
        return self.pool_blocks or -(-self.kv_tokens // self.block_size)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def kv_name(self) -> str:
        """The dtype of the pool, as the user and the cluster say it."""
        return self.dtype if self.kv_dtype == "auto" else self.kv_dtype

    @property
    def kv_torch_dtype(self) -> torch.dtype:
        return KV_DTYPES[self.kv_name]
