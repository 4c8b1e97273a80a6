"""One rank of an instance that is cut over several: its share of the model, its own KV pool, its part in every step.

All ranks run the same plans in the same order and keep the same block numbers; each pool holds its own layers and KV
heads of them. Knows no process and no socket: whoever drives it brings the plans and the process groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from distserve.core.types import ModelSpec, StepPlan, Token
from distserve.engine.collectives import LaneGroup, PipeGroup
from distserve.engine.config import EngineConfig
from distserve.engine.microbatches import cut_step
from distserve.engine.native_sampler import chooser_of
from distserve.engine.native_stage import choose_stage, meeting_lanes
from distserve.engine.pool import KvPool
from distserve.engine.runner import build_model, max_model_len, spec_of
from distserve.engine.sampler import Choose, choose_tokens
from distserve.engine.stage import Stage, TorchStage
from distserve.engine.triton_forward import draw_of, paged_inputs
from distserve.kv.shard import KvCut, Parallel
from distserve.models.catalog import resolve_model
from distserve.models.config import read_config
from distserve.models.shard import Lanes, Shard
from distserve.models.weights import Progress
from distserve.observe.startup import Mark, unmarked
from distserve_kernels.streams import settle


class ShardEngine:
    """A rank's share of a loaded model over its own pool. One thread calls ``run``.

    ``spec`` is the whole model's; ``stage`` computes this rank's part of a step.
    ``pool.tensor`` [blocks, own layers, 2, own KV heads, block_size, head_dim].
    """

    def __init__(
        self,
        spec: ModelSpec,
        shard: Shard,
        stage: Stage,
        pool: KvPool,
        pipe: PipeGroup | None,
        hidden: int,
        weight_bytes: int,
        dtype: torch.dtype,
        choose: Choose = choose_tokens,
    ) -> None:
        """``dtype``: of what stages hand each other, [tokens, ``hidden``]."""
        self.spec = spec
        self.pool = pool
        self.weight_bytes = weight_bytes  # of this rank's share, in the model's dtype
        self.cut = KvCut(shard.parallel, spec.layers, spec.kv_heads)
        self._shard = shard
        self.stage = stage
        self._pipe = pipe
        self._hidden, self._dtype = hidden, dtype
        self._choose = choose

    @classmethod
    def load(
        cls,
        config: EngineConfig,
        parallel: Parallel,
        rank: int,
        lanes: LaneGroup | None,
        pipe: PipeGroup | None,
        progress: Progress | None = None,
        mark: Mark = unmarked,
    ) -> ShardEngine:
        """Load this rank's share of ``config.model``, reading nothing else. Raises ModelError with a sentence.

        The size of the pool must have been decided: it is the same at all ranks.
        """
        if config.threads:
            torch.set_num_threads(config.threads)
        device = torch.device(config.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # of this thread, which also runs the steps: kernels start on it
        directory = resolve_model(config.model)
        whole = read_config(directory)
        shard = Shard(parallel, rank, None)
        shard.check(whole)
        shard = Shard(parallel, rank, meeting_lanes(config, shard, lanes))
        length = max_model_len(whole, config.max_model_len)
        with torch.inference_mode():
            model, weight_bytes = build_model(directory, whole, config, length, progress, shard)
        mark("weights")
        own = KvCut(parallel, whole.layers, whole.kv_heads).part(rank)
        pool = KvPool(
            config.blocks,
            len(own.layers),
            len(own.heads),
            config.block_size,
            whole.head_dim,
            config.kv_torch_dtype,
            device,
        )
        mark("pool")
        paged = paged_inputs(config, pool, length)
        stage: Stage = TorchStage(model, pool, config.torch_dtype, paged)
        if paged is None and device.type == "cpu":
            stage = choose_stage(config, model, whole, shard, pool, length, pipe, stage)
        mark("kernels")
        vocab = whole.vocab_size
        choose = chooser_of(config, vocab, draw_of(config, vocab)) if _samples(shard) else choose_tokens
        spec = spec_of(directory, whole, config, length)
        return cls(spec, shard, stage, pool, pipe, whole.hidden, weight_bytes, config.torch_dtype, choose)

    @property
    def lanes(self) -> Lanes | None:
        """How this rank meets the others of its stage; None where it is alone."""
        return self._shard.lanes

    @property
    def samples(self) -> bool:
        """Whether this is the rank that chooses tokens."""
        return _samples(self._shard)

    def run(self, plan: StepPlan) -> list[Token]:
        """This rank's part of a step; at the sampling rank, a token for each item that samples, in item order.

        When the sampling rank returns, the step's KV is in the pools of all ranks. RuntimeError when another rank is
        gone or takes too long; this one is then of no more use.
        """
        tokens: list[Token] = []
        self.stage.begin()
        if self._pipe is not None:
            self._pipe.flush()  # of the step before: at its own end this stage would wait for the next one
        with torch.inference_mode():
            for part in cut_step(plan, self._shard.parallel.pp):
                tokens += self._pass(part)
        settle(self.pool.tensor.device)  # KV that is told of is final for the mover, whose stream is another
        return tokens

    def _pass(self, plan: StepPlan) -> Sequence[Token]:
        """One micro-batch through this rank's layers."""
        before = None
        if self._pipe is not None and not self._shard.first:
            before = self._pipe.receive(self.pool.tensor.new_empty(plan.tokens, self._hidden, dtype=self._dtype))
        made = self.stage(plan, before)
        if self._pipe is not None and not self._shard.last:
            assert made is not None
            self._pipe.send(made)
            return ()
        if made is None or not self.samples:
            return ()
        return self._choose(made, [item for item in plan.items if item.sample])


def _samples(shard: Shard) -> bool:
    return shard.last and shard.lane == 0
