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
from distserve.engine.forward import clear_masked
from distserve.engine.inputs import KvLayout, build_step
from distserve.engine.microbatches import cut_step
from distserve.engine.paged_inputs import PagedInputs
from distserve.engine.pool import KvPool
from distserve.engine.runner import build_model, max_model_len, spec_of
from distserve.engine.sampler import Draw, choose_tokens
from distserve.engine.tails import OpenTails
from distserve.engine.triton_forward import draw_of, paged_inputs
from distserve.kv.shard import KvCut, Parallel
from distserve.models.catalog import resolve_model
from distserve.models.config import read_config
from distserve.models.registry import Model
from distserve.models.shard import Shard
from distserve.models.step import StepInput
from distserve.models.weights import Progress
from distserve.observe.startup import Mark, unmarked


class ShardEngine:
    """A rank's share of a loaded model over its own pool. One thread calls ``run``.

    ``spec`` is the whole model's; ``pool.tensor`` [blocks, own layers, 2, own KV heads, block_size, head_dim].
    """

    def __init__(
        self,
        spec: ModelSpec,
        shard: Shard,
        model: Model,
        pool: KvPool,
        pipe: PipeGroup | None,
        hidden: int,
        weight_bytes: int,
        dtype: torch.dtype,
        paged: PagedInputs | None = None,
        draw: Draw | None = None,
    ) -> None:
        """``paged``: what builds the inputs of steps over block tables; None: steps gather KV."""
        self.spec = spec
        self.pool = pool
        self.weight_bytes = weight_bytes  # of this rank's share, in the model's dtype
        self.cut = KvCut(shard.parallel, spec.layers, spec.kv_heads)
        self._shard = shard
        self._model = model
        self._pipe = pipe
        self._hidden = hidden
        tensor = pool.tensor
        self._layout = KvLayout(tensor.shape[1], tensor.shape[3], spec.block_size, dtype, tensor.device)
        self._tails = OpenTails(spec.block_size)
        self._paged, self._draw = paged, draw

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
        shard = Shard(parallel, rank, lanes)
        shard.check(whole)
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
        spec = spec_of(directory, whole, config, length)
        paged, draw = paged_inputs(config, pool, length), draw_of(config, whole.vocab_size)
        return cls(spec, shard, model, pool, pipe, whole.hidden, weight_bytes, config.torch_dtype, paged, draw)

    @property
    def samples(self) -> bool:
        """Whether this is the rank that chooses tokens."""
        return self._shard.last and self._shard.lane == 0

    def run(self, plan: StepPlan) -> list[Token]:
        """This rank's part of a step; at the sampling rank, a token for each item that samples, in item order.

        When the sampling rank returns, the step's KV is in the pools of all ranks. RuntimeError when another rank is
        gone or takes too long; this one is then of no more use.
        """
        tokens: list[Token] = []
        self._tails.turn()
        with torch.inference_mode():
            for part in cut_step(plan, self._shard.parallel.pp):
                tokens += self._pass(part)
            if self._pipe is not None:
                self._pipe.flush()
        return tokens

    def _pass(self, plan: StepPlan) -> Sequence[Token]:
        """One micro-batch through this rank's layers."""
        step = self._input(plan)
        before = None
        if self._pipe is not None and not self._shard.first:
            before = self._pipe.receive(self.pool.tensor.new_empty(plan.tokens, self._hidden, dtype=self._layout.dtype))
        made = self._model(step, self.pool.layers, before)
        if self._pipe is not None and not self._shard.last:
            assert made is not None
            self._pipe.send(made)
            return ()
        if made is None or not self.samples:
            return ()
        return choose_tokens(made, [item for item in plan.items if item.sample], self._draw)

    def _input(self, plan: StepPlan) -> StepInput:
        if self._paged is not None:
            return self._paged(plan)
        clear_masked(plan, self._layout, self.pool, self._tails)
        return build_step(plan, self._layout)
