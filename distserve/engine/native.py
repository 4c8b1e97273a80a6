"""The whole step as one native call, where this machine and this model allow it; Triton on a GPU; torch elsewhere.

Owns the choice and the log line that says what was chosen. Takes over a loaded model's weights: they are held once.
"""

from __future__ import annotations

import ctypes
import logging
from array import array
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from distserve.core.types import StepPlan
from distserve.engine.config import EngineConfig
from distserve.engine.forward import Forward, TorchForward
from distserve.engine.pool import KvPool
from distserve.engine.stopping import StepGivenUp, StopSign
from distserve.engine.triton_forward import triton_forward
from distserve.models.catalog import default_cache
from distserve.models.config import ModelConfig
from distserve.models.errors import ModelError
from distserve.models.llama import Llama
from distserve.models.opt import Opt
from distserve.models.registry import Model
from distserve_kernels.linear import Linear
from distserve_kernels.native.decoder import (
    DTYPES,
    MOST_HEAD_DIM,
    Affine,
    Decoder,
    DecoderShape,
    Ends,
    GivenUp,
    LayerWeights,
    Norm,
)
from distserve_kernels.native.library import NativeUnavailable, available, load

log = logging.getLogger(__name__)


AMX_ROWS = 48
"""Where the CPU has matrix tiles (AMX), which oneDNN uses and we do not, longer steps go to torch."""


class NativeForward:
    """Runs plans on a ``Decoder`` over a pool. Returns what the torch path returns: logits of the items that sample."""

    def __init__(self, decoder: Decoder, pool: Tensor, sign: StopSign | None = None) -> None:
        self._decoder, self._pool = decoder, pool
        self._sign = sign if sign is not None else StopSign()

    def __call__(self, plan: StepPlan) -> Tensor | None:
        """Logits [sampled, vocab] float32 in item order, valid until the next call; None when no item samples.

        Raises StepGivenUp.
        """
        tokens, segments, tables, samples = array("q"), array("q"), array("q"), array("q")
        for item in plan.items:
            segments.extend((len(tokens), len(item.token_ids), item.start, len(tables), len(item.blocks)))
            tokens.extend(item.token_ids)
            tables.extend(item.blocks)
            if item.sample:
                samples.append(len(tokens) - 1)
        try:
            logits = self._decoder.run(self._pool, tokens, segments, tables, samples, plan.number, self._sign.address)
        except GivenUp as given_up:
            raise StepGivenUp(str(given_up)) from given_up
        return logits if samples else None


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
    threads = config.threads or torch.get_num_threads()
    most_rows = AMX_ROWS if torch.cpu._is_amx_tile_supported() and config.dtype == "bfloat16" else None
    try:
        if config.kv_torch_dtype != config.torch_dtype:
            raise NativeUnavailable(f"native ones keep KV in the model's {config.dtype}, not in {config.kv_name}")
        native = take_over(model, shape, pool.tensor, length, threads, default_cache() / "native", most_rows, sign)
    except NativeUnavailable as why:
        if config.kernels == "native":
            raise ModelError(f"native kernels were asked for, but {why}; say --kernels auto to do without") from why
        log.info("torch kernels: %s", why)
        return in_torch
    if most_rows is not None:
        return BothForward(native, in_torch, most_rows)
    if config.threads:
        torch.set_num_threads(1)  # only sampling is left to torch: its threads would spin on the cores that ours need
    return native


def take_over(
    model: Model,
    shape: ModelConfig,
    pool: Tensor,
    length: int,
    threads: int,
    cache: Path,
    most_rows: int | None = None,
    sign: StopSign | None = None,
) -> NativeForward:
    """A native forward pass with ``model``'s weights, which the model loses.

    With ``most_rows`` it is for steps of up to so many tokens, and the model keeps its weights for longer ones. Raises
    NativeUnavailable before anything is taken.
    """
    _check(pool, shape)
    library = load(cache, log.info)
    keep = most_rows is not None
    with torch.inference_mode():
        if isinstance(model, Llama):
            layers, ends = _llama_layers(model, keep), _llama_ends(model, shape, keep)
        elif isinstance(model, Opt):
            layers, ends = _opt_layers(model, keep), _opt_ends(model, shape, keep)
        else:
            raise NativeUnavailable(f"{type(model).__name__} has no native form")
        decoder = Decoder(library, _sizes(shape, length, isinstance(model, Llama)), layers, ends, threads)
    processor = library.ds_describe().decode()
    if keep:
        extra = decoder.weight_bytes / 1e6
        log.info(
            "native kernels (%s), %d threads, for steps of up to %d tokens; torch for longer ones, which is why the "
            "weights are held twice (%.0f MB more)", processor, threads, most_rows, extra,
        )  # fmt: skip
    else:
        log.info("native kernels (%s), %d threads", processor, threads)
    return NativeForward(decoder, pool, sign)


def _check(pool: Tensor, shape: ModelConfig) -> None:
    """Raise NativeUnavailable for what can be known before the library is built."""
    if pool.device.type != "cpu":
        raise NativeUnavailable(f"native ones run on the CPU, not on {pool.device}")
    if pool.dtype not in DTYPES:
        raise NativeUnavailable(f"native ones compute in float32 and bfloat16, not in {str(pool.dtype)[6:]}")
    if shape.head_dim % 2 or shape.head_dim > MOST_HEAD_DIM:
        raise NativeUnavailable(f"native ones do not support a head dimension of {shape.head_dim}")


def _sizes(shape: ModelConfig, length: int, gated: bool) -> DecoderShape:
    return DecoderShape(
        hidden=shape.hidden,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate=shape.intermediate,
        vocab=shape.vocab_size,
        max_length=length,
        gated=gated,
        eps=shape.norm_eps,
    )


def _llama_layers(model: Llama, keep: bool) -> Iterator[LayerWeights]:
    for layer in model.layers:
        attention, mlp = layer.attention, layer.mlp
        yield LayerWeights(
            qkv=_affine(attention.qkv, keep),
            out=_affine(attention.out, keep),
            up=_affine(mlp.gate_up, keep),
            down=_affine(mlp.down, keep),
            norm1=Norm(layer.input_norm),
            norm2=Norm(layer.post_norm),
            qk_norm=attention.qk_norm,
        )


def _opt_layers(model: Opt, keep: bool) -> Iterator[LayerWeights]:
    for layer in model.layers:
        yield LayerWeights(
            qkv=_affine(layer.qkv, keep),
            out=_affine(layer.out, keep),
            up=_affine(layer.up, keep),
            down=_affine(layer.down, keep),
            norm1=Norm(layer.attention_norm.weight, layer.attention_norm.bias),
            norm2=Norm(layer.mlp_norm.weight, layer.mlp_norm.bias),
        )


def _llama_ends(model: Llama, shape: ModelConfig, keep: bool) -> Ends:
    return Ends(
        head=_affine(model.head, keep).weight,
        embedding=None if shape.tied else model.embedding,
        cos=model.cos,
        sin=model.sin,
        final_norm=Norm(model.norm),
    )


def _opt_ends(model: Opt, shape: ModelConfig, keep: bool) -> Ends:
    norm = model.norm
    return Ends(
        head=_affine(model.head, keep).weight,
        embedding=None if shape.tied else model.embedding,
        positions=model.positions,
        final_norm=None if norm is None else Norm(norm.weight, norm.bias),
    )


def _affine(linear: object, keep: bool) -> Affine:
    """The plain weight and bias of a linear map, which loses them unless it is to ``keep`` them."""
    if not isinstance(linear, Linear):
        raise NativeUnavailable("the model is cut over several ranks")
    return Affine(*linear.plain()) if keep else Affine(*linear.give_up())
