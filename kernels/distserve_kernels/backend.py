"""Which implementation of the kernels serves a device: Triton's on a GPU where Triton is installed, else torch's.

Says so once in the log. Knows no kernel.
"""

from __future__ import annotations

import functools
import importlib.util
import logging

import torch

log = logging.getLogger(__name__)


def triton_serves(device: torch.device) -> bool:
    """Whether the Triton kernels are to be used for tensors of ``device``."""
    return device.type == "cuda" and _triton_is_here(device.type)


@functools.cache
def _triton_is_here(kind: str) -> bool:
    here = importlib.util.find_spec("triton") is not None
    if here:
        log.info("kernels on %s: Triton", kind)
    else:
        log.warning("kernels on %s: torch, for Triton is not installed; pip install triton makes them faster", kind)
    return here
