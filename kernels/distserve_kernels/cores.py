"""Which processor cores threads keep to. Where the system cannot say, nothing is pinned."""

from __future__ import annotations

import contextlib
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Threads:
    """A team of native threads: how many, and a core of its own for each, the caller's first; without any, as it comes.

    Where a neighbour's work takes a core for a moment, the scheduler would else put two of a team on one core, where
    every meeting costs a switch, and leave them there for a while.
    """

    count: int
    cores: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.count} threads" + (f" on cores {', '.join(map(str, self.cores))}" if self.core_numbers() else "")

    def core_numbers(self) -> array[int] | None:
        """As native code takes them; None unless there are as many as threads."""
        return array("q", self.cores) if len(self.cores) == self.count else None


def usable_cores() -> tuple[int, ...]:
    """The cores this process may run on, in order."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def share_cores(cores: Sequence[int], needs: Sequence[int]) -> list[tuple[int, ...]]:
    """Cores of its own for everyone who needs so many; none for all when they do not suffice, or one thread is alone.

    The scheduler may wake a thread on the core of whoever woke it, where the two take turns though another core idles:
    two instances that hand KV over then move it at half the speed.
    """
    if sum(needs) < 2 or sum(needs) > len(cores):
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


@contextlib.contextmanager
def as_process() -> Iterator[None]:
    """What the calling thread starts meanwhile may run where the process's first thread may, not on its cores alone."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    own = os.sched_getaffinity(0)
    keep_to(os.sched_getaffinity(os.getpid()))
    try:
        yield
    finally:
        keep_to(own)
