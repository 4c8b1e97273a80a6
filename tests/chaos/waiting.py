"""Waiting with a limit that counts only time in which this process ran.

On a machine that is shared, or that pauses, a clock alone would blame the cluster for what the machine did.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")
SLICE_S = 0.5


async def within(seconds: float, work: Awaitable[T]) -> T:
    """The result of some work, or ``TimeoutError`` after so many seconds of our own; the work is cancelled then."""
    task = asyncio.ensure_future(work)
    left = seconds
    try:
        while not task.done():
            if left <= 0:
                raise TimeoutError
            slice_s = min(SLICE_S, left)
            await asyncio.wait([task], timeout=slice_s)
            left -= slice_s
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
