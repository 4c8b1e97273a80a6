"""Lanes that meet in shared memory: threads of this process stand for the ranks of a stage."""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from distserve.models.catalog import default_cache
from distserve_kernels.native import library
from distserve_kernels.native.lanes import SLOT_BYTES, SharedLanes, lanes_bytes

SIZES = (1, 31, 64, 1153, SLOT_BYTES // 4, SLOT_BYTES + 7)


@pytest.fixture(scope="module")
def built() -> ctypes.CDLL:
    try:
        return library.load(default_cache() / "native")
    except library.NativeUnavailable as why:
        pytest.skip(f"native kernels cannot be built: {why}")


def lanes_of(built: ctypes.CDLL, size: int, timeout_s: float = 30.0) -> list[SharedLanes]:
    memory = mmap.mmap(-1, lanes_bytes(built, size))
    return [SharedLanes(built, memory, lane, size, timeout_s) for lane in range(size)]


def together(lanes: list[SharedLanes], act: Callable[[int, SharedLanes], Any]) -> list[Any]:
    """What ``act`` makes at every lane, all at the same time."""
    with ThreadPoolExecutor(len(lanes)) as threads:
        return list(threads.map(act, range(len(lanes)), lanes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_sums_are_the_same_at_every_lane_and_in_the_order_of_the_lanes(built, size, dtype) -> None:
    """One slot and several, whole vectors and tails, each slot used again and again."""
    generator = torch.Generator().manual_seed(size)
    parts = [[torch.randn(n, generator=generator).to(dtype) for n in SIZES * 3] for _ in range(size)]
    found = together(lanes_of(built, size), lambda at, lane: [lane.sum_(part.clone()) for part in parts[at]])
    for which in range(len(parts[0])):
        wanted = parts[0][which].float()
        for lane in range(1, size):
            wanted = wanted + parts[lane][which].float()
        for lane in range(size):
            assert torch.equal(found[lane][which], wanted.to(dtype))


@pytest.mark.parametrize(("rows", "width"), [(1, 5), (7, 33), (3, SLOT_BYTES // 8 + 3), (40, 9001)])
def test_parts_are_put_side_by_side(built, rows, width) -> None:
    parts = [torch.randn(rows, width) for _ in range(3)]
    for found in together(lanes_of(built, 3), lambda at, lane: lane.gather(parts[at])):
        assert torch.equal(found, torch.cat(parts, 1))


def test_a_lane_that_does_not_come_is_told_of_and_waited_for_asleep(built) -> None:
    lane = lanes_of(built, 2, timeout_s=0.5)[0]
    before = time.process_time()
    with pytest.raises(RuntimeError, match="another rank of this stage did not come within"):
        lane.sum_(torch.ones(8))
    assert time.process_time() - before < 0.1


def test_more_lanes_than_there_is_room_for_meet_otherwise(built) -> None:
    assert lanes_bytes(built, 63) > 0
    assert lanes_bytes(built, 64) == 0
