"""The whole step as one native call, where this machine and this model allow it; Triton on a GPU; torch elsewhere.

Owns the choice and the log line that says what was chosen. Takes over a loaded model's weights: they are held once.
"""

from __future__ import annotations

import ctypes
import logging
from array import array
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distserve.core.types import StepPlan
from distserve.engine.config import EngineConfig
from distserve.engine.forward import Forward, TorchForward
from distserve.engine.native_weights import decoder_shape, ends_of, layers_of, native_model
from distserve.engine.pool import KvPool
from distserve.engine.stopping import StepGivenUp, StopSign
from distserve.engine.triton_forward import triton_forward
from distserve.models.catalog import default_cache
from distserve.models.config import ModelConfig
from distserve.models.errors import ModelError
from distserve.models.registry import Model
from distserve.models.shard import WHOLE, Shard
from distserve_kernels.cores import Threads
from distserve_kernels.native.decoder import Decoder, GivenUp, LaneSums
from distserve_kernels.native.library import NativeUnavailable, available, load

log = logging.getLogger(__name__)


AMX_ROWS = 48
"""Where the CPU has matrix tiles (AMX), which oneDNN uses and we do not, longer steps go to torch."""


@dataclass(frozen=True, slots=True)
class StepArrays:
    """A plan as the decoder reads it, see ``Decoder.run``."""

    tokens: array[int]
    segments: array[int]
    tables: array[int]
    samples: array[int]

    @classmethod
    def of(cls, plan: StepPlan) -> StepArrays:
        tokens, segments, tables, samples = array("q"), array("q"), array("q"), array("q")
        for item in plan.items:
            segments.extend((len(tokens), len(item.token_ids), item.start, len(tables), len(item.blocks)))
            tokens.extend(item.token_ids)
            tables.extend(item.blocks)
            if item.sample:
                samples.append(len(tokens) - 1)
        return cls(tokens, segments, tables, samples)


class NativeForward:
    """Runs plans on a ``Decoder`` over a pool. Returns what the torch path returns: logits of the items that sample."""

    def __init__(self, decoder: Decoder, pool: Tensor, sign: StopSign | None = None) -> None:
        self._decoder, self._pool = decoder, pool
        self._sign = sign if sign is not None else StopSign()

    def __call__(self, plan: StepPlan) -> Tensor | None:
        """Logits [sampled, vocab] float32 in item order, valid until the next call; None when no item samples.

        Raises StepGivenUp.
        """
        step = StepArrays.of(plan)
        try:
            logits = self._decoder.run(
                self._pool, step.tokens, step.segments, step.tables, step.samples, plan.number, self._sign.address
            )
        except GivenUp as given_up:
            raise StepGivenUp(str(given_up)) from given_up
        return logits if step.samples else None


class BothForward:
    """Short steps native, longer ones in torch."""

    def __init__(self, native: Forward, torch: Forward, most_rows: int) -> None:
        self._native, self._torch, self._most_rows = native, torch, most_rows

    def __call__(self, plan: StepPlan) -> Tensor | None:
        return (self._native if plan.tokens <= self._most_rows else self._torch)(plan)


def native_copies(kernels: str) -> ctypes.CDLL | None:
    """The library with which a data plane copies and sums up at once; None without a compiler, or with "torch"."""
    return available(default_cache() / "native", log.info) if kernels != "torch" else None


def choose_forward(
    config: EngineConfig, model: Model, shape: ModelConfig, pool: KvPool, length: int, sign: StopSign
) -> Forward:
    """The forward pass of a loaded model; what was chosen, and why, is said in the log. ``sign`` gives up its steps.

    Raises ModelError when only native, or only Triton, kernels would do and there are none.
    """
    in_torch = TorchForward(model, pool, sign, dtype=config.torch_dtype)
    if config.kernels == "torch":
        log.info("torch kernels, as asked")
        return in_torch
    if (in_triton := triton_forward(config, model, pool, length, in_torch, sign)) is not None:
        return in_triton
    most_rows = most_native_rows(config)
    try:
        check_kv_dtype_native(config)
        threads = native_threads(config)
        native = take_over(model, shape, pool.tensor, length, threads, default_cache() / "native", most_rows, sign)
    except NativeUnavailable as why:
        no_native(config, str(why))
        return in_torch
    if most_rows is not None:
        return BothForward(native, in_torch, most_rows)
    leave_cores_to_native(config)
    return native


def native_threads(config: EngineConfig) -> Threads:
    """Threads of a native step."""
    return Threads(config.threads or torch.get_num_threads(), config.cores)


def most_native_rows(config: EngineConfig) -> int | None:
    """Longer steps than this are torch's, for it is faster at them; None: native ones serve all."""
    return AMX_ROWS if torch.cpu._is_amx_tile_supported() and config.dtype == "bfloat16" else None


def check_kv_dtype_native(config: EngineConfig) -> None:
    """Raise NativeUnavailable where KV is not kept in the model's dtype."""
    if config.kv_torch_dtype != config.torch_dtype:
        raise NativeUnavailable(f"native ones keep KV in the model's {config.dtype}, not in {config.kv_name}")


def no_native(config: EngineConfig, why: str) -> None:
    """Say that torch computes, and why. Raises ModelError where that was not wanted."""
    if config.kernels == "native":
        raise ModelError(f"native kernels were asked for, but {why}; say --kernels auto to do without")
    log.info("torch kernels: %s", why)


def leave_cores_to_native(config: EngineConfig) -> None:
    """Only sampling is left to torch: its threads would spin on the cores that ours need."""
    if config.threads:
        torch.set_num_threads(1)


def take_over(
    model: Model,
    shape: ModelConfig,
    pool: Tensor,
    length: int,
    threads: Threads,
    cache: Path,
    most_rows: int | None = None,
    sign: StopSign | None = None,
) -> NativeForward:
    """A native forward pass with ``model``'s weights, which the model loses.

    With ``most_rows`` it is for steps of up to so many tokens, and the model keeps its weights for longer ones. Raises
    NativeUnavailable before anything is taken.
    """
    native_model(model, shape, pool)
    library = load(cache, log.info)
    return NativeForward(make_decoder(library, model, shape, pool, length, threads, most_rows), pool, sign)


def make_decoder(
    library: ctypes.CDLL,
    model: Model,
    shape: ModelConfig,
    pool: Tensor,
    length: int,
    threads: Threads,
    most_rows: int | None,
    shard: Shard = WHOLE,
    sums: LaneSums | None = None,
) -> Decoder:
    """A decoder with the weights of ``model``, which is ``shard``'s part of ``shape``; see ``take_over``. Says so."""
    held, keep = native_model(model, shape, pool), most_rows is not None
    with torch.inference_mode():
        sizes = decoder_shape(held, shape, shard, length, pool.dtype)
        decoder = Decoder(library, sizes, layers_of(held, keep), ends_of(held, shape, shard, keep), threads, sums)
    processor = library.ds_describe().decode()
    if keep:
        extra = decoder.weight_bytes / 1e6
        log.info(
            "native kernels (%s), %s, for steps of up to %d tokens; torch for longer ones, which is why the "
            "weights are held twice (%.0f MB more)", processor, threads, most_rows, extra,
        )  # fmt: skip
    else:
        log.info("native kernels (%s), %s", processor, threads)
    return decoder
