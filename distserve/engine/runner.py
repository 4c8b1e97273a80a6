"""One rank's engine: load a model once, then run steps.

Owns the weights and the KV pool. Keeps nothing about requests: a ``StepPlan`` says everything a step needs.
"""

from __future__ import annotations

import functools
import hashlib
import time
from pathlib import Path

import torch

from distserve.core.types import ModelSpec, StepPlan
from distserve.engine.config import EngineConfig
from distserve.engine.device_steps import device_steps
from distserve.engine.forward import Forward
from distserve.engine.memory import sized
from distserve.engine.native import choose_forward
from distserve.engine.native_sampler import chooser_of
from distserve.engine.pool import KvPool
from distserve.engine.sampler import Choose, Draw, choose_tokens
from distserve.engine.stepping import Ahead, InTurn, Stepping
from distserve.engine.stepping import StepOutput as StepOutput
from distserve.engine.stopping import StopSign
from distserve.engine.triton_forward import draw_of, ops_of
from distserve.models.catalog import RANDOM_PREFIX, resolve_model
from distserve.models.config import ModelConfig, read_config
from distserve.models.errors import ModelError
from distserve.models.registry import BUILDERS, Model
from distserve.models.shard import WHOLE, Shard
from distserve.models.weights import Progress, RandomWeights, SafetensorWeights, weight_identity
from distserve.observe.startup import Mark, unmarked


class Pass:
    """One step from its plan to its tokens: forward, then sample. Called by one thread."""

    __slots__ = ("choose", "forward")

    def __init__(self, forward: Forward, choose: Choose) -> None:
        self.forward = forward
        self.choose = choose

    def __call__(self, plan: StepPlan) -> StepOutput:
        """Compute every item's tokens, write their KV, and choose the next token of the items that sample."""
        began = time.perf_counter()
        if not plan.items:
            return StepOutput((), 0.0)
        with torch.inference_mode():
            logits = self.forward(plan)
            sampling = [item for item in plan.items if item.sample]
            tokens = self.choose(logits, sampling) if logits is not None else []
        named = tuple((item.request_id, token) for item, token in zip(sampling, tokens, strict=True))
        return StepOutput(named, time.perf_counter() - began)


class Engine:
    """A loaded model over its KV pool. One thread submits and waits; ``pool.tensor`` is shared with the mover.

    Several steps may be outstanding (``depth``): they are computed in the order in which they were submitted. A step
    whose items follow (``StepItem.follows``) reads, for each request, the token that the last step before it which
    sampled for this request has chosen. If a step is given up or fails, all that are outstanding behind it raise
    StepGivenUp in their turn, never computed.
    """

    def __init__(
        self,
        spec: ModelSpec,
        forward: Forward,
        pool: KvPool,
        weight_bytes: int,
        sign: StopSign | None = None,
        draw: Draw | None = None,
        depth: int = 1,
        choose: Choose | None = None,
    ) -> None:
        """With a ``depth`` above 1 steps are launched ahead on a GPU, and elsewhere computed by a thread of the
        engine's own, until it is closed.
        """
        self.spec = spec
        self.pool = pool
        self.weight_bytes = weight_bytes  # of all tensors, in the model's dtype
        self._pass = Pass(forward, choose or functools.partial(choose_tokens, draw=draw))
        self._sign = sign if sign is not None else StopSign()
        launched = device_steps(forward, draw, self._pass.choose, pool.tensor.device, depth)
        self._stepping: Stepping = launched or (InTurn(self._pass) if depth == 1 else Ahead(self._pass, depth))

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
        choose = chooser_of(config, shape.vocab_size, draw)
        spec = spec_of(directory, shape, config, length)
        return cls(spec, forward, pool, weight_bytes, sign, draw, config.steps_in_flight, choose)

    @property
    def forward(self) -> Forward:
        """What computes its steps."""
        return self._pass.forward

    @property
    def depth(self) -> int:
        """How many steps may be submitted and not yet waited for."""
        return self._stepping.depth

    def submit(self, plan: StepPlan) -> None:
        """Have a step computed, once those before it are; does not wait for its result."""
        self._stepping.submit(plan)

    def wait(self) -> StepOutput:
        """The output of the oldest outstanding step, whose KV is written then.

        Raises the step's error; StepGivenUp, between two layers, once ``give_up`` was called with its number, or when
        a step before it did not end.
        """
        return self._stepping.wait()

    def run(self, plan: StepPlan) -> StepOutput:
        """``submit`` and ``wait``, for whoever runs one step at a time."""
        self._stepping.submit(plan)
        return self._stepping.wait()

    def close(self) -> None:
        """End the engine's thread, if it has one. Idempotent."""
        self._stepping.close()

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
