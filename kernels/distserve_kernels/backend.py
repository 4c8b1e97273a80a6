"""Which implementation of the kernels serves a device: Triton's on a GPU where Triton is installed, else torch's.

Says so once in the log. Knows no kernel.
"""

from __future__ import annotations

import functools
import importlib.util
import logging

import torch

log = logging.getLogger(__name__)


class TritonUnavailable(RuntimeError):
    """Triton was asked for and cannot serve; the text says why, and fits after "but"."""


def triton_serves(device: torch.device, asked: str = "auto") -> bool:
    """Whether the Triton kernels are to be used for tensors of ``device``.

    ``asked``: "triton" means these or an error (TritonUnavailable), on a CPU too where Triton's interpreter is on;
    "auto" means these on a GPU, if they can; anything else means others.
    """
    if asked == "triton":
        return _must_serve(device)
    return asked == "auto" and device.type == "cuda" and _triton_is_here(device.type)


def _must_serve(device: torch.device) -> bool:
    if importlib.util.find_spec("triton") is None:
        raise TritonUnavailable("Triton is not installed (pip install triton)")
    if device.type != "cuda" and not _interpreted():
        raise TritonUnavailable(f"they run on a GPU, not on {device.type} (TRITON_INTERPRET=1 interprets them, slowly)")
    return True


def _interpreted() -> bool:
    from distserve_kernels.triton.tuning import interpreted  # needs Triton

    return interpreted()


@functools.cache
def _triton_is_here(kind: str) -> bool:
    here = importlib.util.find_spec("triton") is not None
    if here:
        log.info("kernels on %s: Triton", kind)
    else:
        log.warning("kernels on %s: torch, for Triton is not installed; pip install triton makes them faster", kind)
    return here
