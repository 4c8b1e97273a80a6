"""One rank's engine: load a model once, then run steps.

Owns the weights and the KV pool. Keeps nothing about requests: a ``StepPlan`` says everything a step needs.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from distserve.core.types import ModelSpec, StepPlan, Token
from distserve.engine.config import EngineConfig
from distserve.engine.forward import Forward
from distserve.engine.memory import sized
from distserve.engine.native import choose_forward
from distserve.engine.pool import KvPool
from distserve.engine.sampler import Draw, choose_tokens
from distserve.engine.stopping import StopSign
from distserve.engine.triton_forward import draw_of, ops_of
from distserve.models.catalog import RANDOM_PREFIX, resolve_model
from distserve.models.config import ModelConfig, read_config
from distserve.models.errors import ModelError
from distserve.models.registry import BUILDERS, Model
from distserve.models.shard import WHOLE, Shard
from distserve.models.weights import Progress, RandomWeights, SafetensorWeights, weight_identity
from distserve.observe.startup import Mark, unmarked


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step chose: (request id, token) for each item that samples, in item order."""

    tokens: tuple[tuple[str, Token], ...]
    forward_s: float  # the whole step, sampling included


class Engine:
    """A loaded model over its KV pool. One thread calls ``run``; ``pool.tensor`` is shared with the mover."""

    def __init__(
        self,
        spec: ModelSpec,
        forward: Forward,
        pool: KvPool,
        weight_bytes: int,
        sign: StopSign | None = None,
        draw: Draw | None = None,
    ) -> None:
        self.spec = spec
        self.pool = pool
        self.weight_bytes = weight_bytes  # of all tensors, in the model's dtype
        self._forward = forward
        self._sign = sign if sign is not None else StopSign()
        self._draw = draw

    @classmethod
    def load(cls, config: EngineConfig, progress: Progress | None = None, mark: Mark = unmarked) -> Engine:
        """Load ``config.model``. Raises ModelError with a sentence; ``progress`` is called after each tensor."""
        if config.threads:
            torch.set_num_threads(config.threads)
        if (device := torch.device(config.device)).index is not None and device.type == "cuda":
            torch.cuda.set_device(device)  # of this thread, which also runs the steps: kernels start on it
        directory = resolve_model(config.model)
        shape = read_config(directory)
        length = max_model_len(shape, config.max_model_len)
        with torch.inference_mode():
            model, weight_bytes = build_model(directory, shape, config, length, progress)
        mark("weights")
        config = sized(config, shape, model, length, weight_bytes)
        device, dtype = torch.device(config.device), config.kv_torch_dtype
        pool = KvPool(config.blocks, shape.layers, shape.kv_heads, config.block_size, shape.head_dim, dtype, device)
        mark("pool")
        sign = StopSign()
        forward = choose_forward(config, model, shape, pool, length, sign)
        mark("kernels")
        draw = draw_of(config, shape.vocab_size)
        return cls(spec_of(directory, shape, config, length), forward, pool, weight_bytes, sign, draw)

    def run(self, plan: StepPlan) -> StepOutput:
        """Compute every item's tokens, write their KV, and choose the next token of the items that sample.

        Raises StepGivenUp, between two layers, once ``give_up`` was called with the plan's number.
        """
        began = time.perf_counter()
        if not plan.items:
            return StepOutput((), 0.0)
        with torch.inference_mode():
            logits = self._forward(plan)
            sampling = [item for item in plan.items if item.sample]
            tokens = choose_tokens(logits, sampling, self._draw) if logits is not None else []
        named = tuple((item.request_id, token) for item, token in zip(sampling, tokens, strict=True))
        return StepOutput(named, time.perf_counter() - began)

    def give_up(self, number: int) -> None:
        """Let the step of this number end early if it runs, now or later. From any thread; does not wait."""
        self._sign.set(number)


def max_model_len(shape: ModelConfig, wanted: int) -> int:
    """The longest sequence to serve. Raises ModelError when more is wanted than the model supports."""
    if wanted > shape.max_positions:
        why = f" (its attention window is {shape.sliding_window})" if shape.sliding_window else ""
        raise ModelError(
            f"max_model_len {wanted} is longer than the {shape.max_positions} tokens the model supports{why}; lower it"
        )
    return wanted or shape.max_positions


def build_model(
    directory: Path,
    shape: ModelConfig,
    config: EngineConfig,
    length: int,
    progress: Progress | None,
    shard: Shard = WHOLE,
) -> tuple[Model, int]:
    """The model, or this rank's share of it, and the bytes of its weights."""
    device = torch.device(config.device)
    builder, ops = BUILDERS[shape.architecture], ops_of(config)
    if config.model.startswith(RANDOM_PREFIX):
        random = RandomWeights(config.torch_dtype, device, progress)
        return builder(shape, random, ops, length, shard), random.taken_bytes
    with SafetensorWeights(directory, config.torch_dtype, device, progress) as weights:
        return builder(shape, weights, ops, length, shard), weights.taken_bytes


def spec_of(directory: Path, shape: ModelConfig, config: EngineConfig, length: int) -> ModelSpec:
    """What the cluster is told of the model: of the whole of it, however it is cut."""
    return ModelSpec(
        name=config.name or config.model,
        fingerprint=_fingerprint(directory, shape, config),
        vocab_size=shape.vocab_size,
        max_model_len=length,
        eos_token_ids=shape.eos_token_ids,
        layers=shape.layers,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        kv_dtype=config.kv_name,
        block_size=config.block_size,
        pool_blocks=config.blocks,
    )


def _fingerprint(directory: Path, shape: ModelConfig, config: EngineConfig) -> str:
    """Digest of architecture, weights and dtype: equal for two loads of one model, wherever its files lie."""
    weights = "random" if config.model.startswith(RANDOM_PREFIX) else weight_identity(directory)
    text = f"{shape!r}|{weights}|{config.dtype}"
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
