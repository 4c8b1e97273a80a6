"""A native step of one lane among several: what a sum over the lanes raises is what the step raises."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distserve.core.types import StepItem, StepPlan
from distserve.engine.config import EngineConfig
from distserve.engine.native import make_decoder
from distserve.engine.native_stage import NativeStage
from distserve.engine.pool import KvPool
from distserve.engine.runner import build_model
from distserve.kv.shard import KvCut, Parallel
from distserve.models.catalog import default_cache
from distserve.models.config import read_config
from distserve.models.shard import Shard
from distserve_kernels.cores import Threads
from distserve_kernels.native import library
from distserve_kernels.native.decoder import LaneSums
from tests.engine.driver import GREEDY
from tests.tiny_models import make_tiny

SUMS = 1 + 2 * 3  # of a step: the embedding, and two in each of 3 layers


class Alone:
    """Lanes of which only this one is there: it counts, and fails when it is told to."""

    def __init__(self) -> None:
        self.sums = 0
        self.fail_at = -1

    def sum_(self, x: Tensor) -> Tensor:
        if self.sums == self.fail_at:
            raise ConnectionError(f"sum {self.sums} was lost")
        self.sums += 1
        return x

    def gather(self, x: Tensor) -> Tensor:
        return torch.cat((x, x), 1)


@pytest.fixture(scope="module")
def built() -> ctypes.CDLL:
    try:
        return library.load(default_cache() / "native")
    except library.NativeUnavailable as why:
        pytest.skip(f"native kernels cannot be built: {why}")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("qwen3", tmp_path_factory.mktemp("tiny"))


def stage_of(built: ctypes.CDLL, directory: Path, layout: Parallel, rank: int, lanes: Alone | None, threads: int):
    shape, config = read_config(directory), EngineConfig(model=str(directory))
    shard = Shard(layout, rank, lanes)
    own = KvCut(layout, shape.layers, shape.kv_heads).part(rank)
    pool = KvPool(8, len(own.layers), len(own.heads), 16, shape.head_dim, torch.float32, torch.device("cpu"))
    with torch.inference_mode():
        model, _ = build_model(directory, shape, config, shape.max_positions, None, shard)
    sums = LaneSums(lanes.sum_) if lanes is not None else None
    decoder = make_decoder(built, model, shape, pool.tensor, shape.max_positions, Threads(threads), None, shard, sums)
    return NativeStage(decoder, pool.tensor, shard, shape)


def prompt(tokens: int) -> StepPlan:
    return StepPlan(1, (StepItem("a", 0, tuple(range(3, 3 + tokens)), tuple(range(8)), True, 0, GREEDY),))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("tokens", [1, 50])
def test_what_a_sum_raises_ends_the_step(built, directory, threads, tokens) -> None:
    """At the embedding, in the middle and at the last one; no sum follows. The next step is not the worse for it."""
    lanes = Alone()
    stage = stage_of(built, directory, Parallel(2, 1), 0, lanes, threads)
    wanted = stage(prompt(tokens), None)
    assert wanted is not None and lanes.sums == SUMS
    for at in (0, 1, 4, SUMS - 1):
        lanes.sums, lanes.fail_at = 0, at
        with pytest.raises(ConnectionError, match=f"sum {at} was lost"):
            stage(prompt(tokens), None)
        assert lanes.sums == at
    lanes.sums, lanes.fail_at = 0, -1
    again = stage(prompt(tokens), None)
    assert again is not None and torch.equal(again, wanted)


def test_stages_take_and_leave_streams_of_the_steps_own_size(built, directory) -> None:
    first, last = (stage_of(built, directory, Parallel(1, 2), rank, None, 1) for rank in (0, 1))
    stream = first(prompt(9), None)
    assert stream is not None and stream.shape == (9, 64)
    logits = last(prompt(9), stream)
    assert logits is not None and logits.shape == (1, 384)
    with pytest.raises(ValueError, match="a residual stream of"):
        last(prompt(8), stream)
    with pytest.raises(IndexError):
        last(prompt(9), None)  # it has no embedding
