"""Which CUDA stream a thread's work goes to, and waiting for that stream alone. On a CPU none of this does anything.

Steps run on the stream that is current in the step thread; every thread that copies has a stream of its own, so that a
copy waits for no step and no step for a copy. Nothing here waits for a whole device.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch


def own_stream(device: torch.device) -> AbstractContextManager[Any]:
    """For the length of a ``with``, what this thread gives to ``device`` goes to a stream of its own.

    It is a stream that the legacy default stream does not wait for (torch makes no others), nor it for that one: who
    must come after whom is the caller's concern.
    """
    if device.type != "cuda":
        return contextlib.nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device))


def settle(device: torch.device) -> None:
    """Wait until all that was given to this thread's stream of ``device`` is done. The GIL is free meanwhile."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
