"""The Triton kernels as these tests run them: compiled where there is a GPU, in Triton's interpreter where there is
none (tests/conftest.py asks for it before anything imports Triton). ``DEVICE`` is where tensors live; ``modules`` are
the kernel modules by name.
"""

from __future__ import annotations

import importlib

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install 'distserve[dev]' has it on Linux")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAMES = ("norm", "gate", "rotary", "prefill", "decode", "kv_move", "sampling")
modules = {name: importlib.import_module(f"distserve_kernels.triton.{name}") for name in NAMES}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Normal numbers, the same on every machine."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)
