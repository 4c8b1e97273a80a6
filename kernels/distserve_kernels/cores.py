"""Which processor cores threads keep to. Where the system cannot say, nothing is pinned."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence


def usable_cores() -> tuple[int, ...]:
    """The cores this process may run on, in order."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def share_cores(cores: Sequence[int], needs: Sequence[int]) -> list[tuple[int, ...]]:
    """Cores of its own for everyone who needs so many; none for all when they do not suffice, or one is alone.

    The scheduler may wake a thread on the core of whoever woke it, where the two take turns though another core idles:
    two instances that hand KV over then move it at half the speed.
    """
    if len(needs) < 2 or sum(needs) > len(cores):
        return [() for _ in needs]
    given, at = [], 0
    for need in needs:
        given.append(tuple(cores[at : at + need]))
        at += need
    return given


def keep_to(cores: Iterable[int]) -> None:
    """The calling thread, and those it starts from now on, stay on ``cores``; anywhere when there are none.

    A wish: where none of them can be used (any more), nothing changes.
    """
    if (wanted := set(cores)) and hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, wanted)
