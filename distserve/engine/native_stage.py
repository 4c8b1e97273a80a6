"""A rank's part of a forward pass as one native call; ranks choose together, and lanes of a stage meet inside the call.

Owns the choice and the log line that says what was chosen.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from distserve.core.types import StepPlan
from distserve.engine.collectives import LaneGroup, PipeGroup
from distserve.engine.config import EngineConfig
from distserve.engine.native import (
    StepArrays,
    check_kv_dtype_native,
    leave_cores_to_native,
    make_decoder,
    most_native_rows,
    native_threads,
    no_native,
)
from distserve.engine.native_weights import native_model
from distserve.engine.pool import KvPool
from distserve.engine.shared_lanes import GroupedLanes, share_memory
from distserve.engine.stage import BothStages, Stage
from distserve.models.catalog import default_cache
from distserve.models.config import ModelConfig
from distserve.models.registry import Model
from distserve.models.shard import Lanes, Shard
from distserve_kernels.native.decoder import Decoder, LaneSums, SharedSums
from distserve_kernels.native.library import NativeUnavailable, load

log = logging.getLogger(__name__)
ANY_ROWS = 1 << 31
"""More than any step has."""


class NativeStage:
    """Runs parts of steps on a ``Decoder`` that is one rank's share of a model. See ``Stage``."""

    def __init__(self, decoder: Decoder, pool: Tensor, shard: Shard, shape: ModelConfig) -> None:
        """``shape``: of the whole model."""
        self._decoder, self._pool, self._shard = decoder, pool, shard
        self._hidden, self._vocab = shape.hidden, shape.vocab_size

    def begin(self) -> None:
        """Nothing is kept from step to step."""

    def __call__(self, part: StepPlan, before: Tensor | None) -> Tensor | None:
        step = StepArrays.of(part)
        run, last = self._decoder.run, self._shard.last
        after = None if last else torch.empty((part.tokens, self._hidden), dtype=self._pool.dtype)
        samples = step.samples if last else step.samples[:0]
        logits = run(self._pool, step.tokens, step.segments, step.tables, samples, before=before, after=after)
        if not last or not samples:
            return after
        lanes = self._shard.lanes
        return logits if lanes is None else lanes.gather(logits)[:, : self._vocab]


def choose_stage(
    config: EngineConfig,
    model: Model,
    shape: ModelConfig,
    shard: Shard,
    pool: KvPool,
    length: int,
    pipe: PipeGroup | None,
    in_torch: Stage,
) -> Stage:
    """What computes a rank's share, on a CPU; all ranks of an instance must call this, and get the same.

    What was chosen, and why, is said in the log. Raises ModelError when only native ones would do and there are none.
    """
    if config.kernels == "torch":
        log.info("torch kernels, as asked")
        return in_torch
    why, library, rows = "", None, most_native_rows(config) or ANY_ROWS
    try:
        check_kv_dtype_native(config)
        native_model(model, shape, pool.tensor)
        library = load(default_cache() / "native", log.info)
    except NativeUnavailable as found:
        why, rows = str(found), 0
    if (agreed := least_of_ranks(shard.lanes, pipe, rows)) == 0 or library is None:
        no_native(config, why or "another rank has no native ones")
        return in_torch
    sums = sums_of(shard.lanes, pool.tensor.dtype)
    most_rows = agreed if agreed < ANY_ROWS else None
    threads = native_threads(config)
    decoder = make_decoder(library, model, shape, pool.tensor, length, threads, most_rows, shard, sums)
    native = NativeStage(decoder, pool.tensor, shard, shape)
    if most_rows is not None:
        return BothStages(native, in_torch, most_rows)
    leave_cores_to_native(config)
    return native


def meeting_lanes(config: EngineConfig, shard: Shard, group: LaneGroup | None) -> Lanes | None:
    """How the lanes of a stage meet: through memory where they share a machine and have native kernels, else as
    ``group`` does. All lanes must call this.
    """
    if group is None or torch.device(config.device).type != "cpu" or config.kernels == "torch":
        return group
    try:
        library = load(default_cache() / "native", log.info)
    except NativeUnavailable:
        library = None  # ``choose_stage`` says so
    lanes = share_memory(group, shard.lane, shard.parallel.tp, library)
    log.info("lanes meet %s", "by messages" if lanes is group else "in shared memory")
    return lanes


def sums_of(lanes: Lanes | None, dtype: torch.dtype) -> LaneSums | None:
    """What a decoder is told of its lanes."""
    if lanes is None:
        return None
    return SharedSums(lanes.shared, dtype) if isinstance(lanes, GroupedLanes) else LaneSums(lanes.sum_)


def least_of_ranks(lanes: Lanes | None, pipe: PipeGroup | None, mine: int) -> int:
    """The least that any rank says. Lanes sum other elements, and stages hand over rows in another order, where native
    kernels compute than where torch does: all must do alike.
    """
    if lanes is not None:
        mine = int(lanes.gather(torch.tensor([[mine]])).min())
    return mine if pipe is None else int(pipe.gather(torch.tensor([mine])).min())
