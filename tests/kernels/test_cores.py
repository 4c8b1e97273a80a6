"""Which cores instances and their threads keep to."""

from __future__ import annotations

import os
import threading

import pytest

from distserve_kernels.cores import as_process, keep_to, share_cores, usable_cores


@pytest.mark.parametrize(
    ("cores", "needs", "given"),
    [
        ((0, 1), (1, 1), [(0,), (1,)]),
        ((2, 5, 6, 9), (2, 1), [(2, 5), (6,)]),
        ((0, 1), (2, 2), [(), ()]),
        ((0, 1, 2), (1, 3), [(), ()]),
        ((0, 1), (2,), [(0, 1)]),
        ((0, 1), (1,), [()]),
        ((0, 1), (), []),
    ],
)
def test_cores_are_shared_out_or_left_alone(
    cores: tuple[int, ...], needs: tuple[int, ...], given: list[tuple[int, ...]]
) -> None:
    assert share_cores(cores, needs) == given


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system cannot pin threads")
def test_only_the_calling_thread_and_its_children_are_pinned() -> None:
    before = usable_cores()
    seen: list[tuple[int, ...]] = []
    seen_outside: list[tuple[int, ...]] = []

    def pinned() -> None:
        keep_to(before[:1])
        seen.append(usable_cores())
        child = threading.Thread(target=lambda: seen.append(usable_cores()))
        child.start()
        child.join()
        with as_process():
            freed = threading.Thread(target=lambda: seen_outside.append(usable_cores()))
            freed.start()
        freed.join()
        keep_to(())
        keep_to((max(before) + 4096,))  # there is no such core
        seen.append(usable_cores())

    thread = threading.Thread(target=pinned)
    thread.start()
    thread.join()
    assert seen == [before[:1]] * 3  # pinned, its child, and after two wishes that change nothing
    assert seen_outside == [before]  # started as if by the process
    assert usable_cores() == before
