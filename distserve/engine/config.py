"""What one rank's engine is asked to be. Checked against the model when it is loaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from distserve.models.errors import ModelError

KERNELS = ("auto", "native", "torch")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """``pool_blocks`` wins over ``kv_tokens``; ``max_model_len`` 0: the model's own; ``threads`` 0: torch's choice.

    ``kernels``: "native" is C++ compiled for this CPU at first use, or an error; "auto" takes torch where that fails.
    """

    model: str
    dtype: str = "float32"
    block_size: int = 16
    kv_tokens: int = 16384
    pool_blocks: int = 0
    max_model_len: int = 0
    threads: int = 0
    device: str = "cpu"
    kernels: str = "auto"  # "auto" | "native" | "torch"
    name: str = ""  # the name served; the model's own when empty

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ModelError(f'dtype "{self.dtype}" is unknown; choose one of {", ".join(DTYPES)}')
        if self.kernels not in KERNELS:
            raise ModelError(f'kernels "{self.kernels}" are unknown; choose one of {", ".join(KERNELS)}')
        if self.block_size < 1:
            raise ModelError(f"block_size must be at least 1, not {self.block_size}")
        if self.blocks < 1:
            raise ModelError("the KV pool would hold no block; raise kv_tokens or pool_blocks")

    @property
    def blocks(self) -> int:
        return self.pool_blocks or -(-self.kv_tokens // self.block_size)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]
