"""A loaded model, or a rank's share of one, as the native decoder wants it: plain tensors out of the model's modules.

Knows each family's modules by name; computes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from distserve.models.config import ModelConfig
from distserve.models.llama import Llama
from distserve.models.opt import Opt
from distserve.models.registry import Model
from distserve.models.shard import Reduced, Shard, VocabHead
from distserve_kernels.linear import Linear
from distserve_kernels.native.decoder import (
    DTYPES,
    MOST_HEAD_DIM,
    Affine,
    DecoderShape,
    Ends,
    LayerWeights,
    Norm,
)
from distserve_kernels.native.library import NativeUnavailable

NativeModel = Llama | Opt


def native_model(model: Model, shape: ModelConfig, pool: Tensor) -> NativeModel:
    """``model``, as one that has a native form. Raises NativeUnavailable for what can be known before compiling."""
    if pool.device.type != "cpu":
        raise NativeUnavailable(f"native ones run on the CPU, not on {pool.device}")
    if pool.dtype not in DTYPES:
        raise NativeUnavailable(f"native ones compute in float32 and bfloat16, not in {str(pool.dtype)[6:]}")
    if shape.head_dim % 2 or shape.head_dim > MOST_HEAD_DIM:
        raise NativeUnavailable(f"native ones do not support a head dimension of {shape.head_dim}")
    if not isinstance(model, Llama | Opt):
        raise NativeUnavailable(f"{type(model).__name__} has no native form")
    return model


def decoder_shape(
    model: NativeModel, shape: ModelConfig, shard: Shard, length: int, dtype: torch.dtype
) -> DecoderShape:
    """Sizes of ``shard``'s part; ``shape`` is the whole model's."""
    own = shard.local(shape)
    return DecoderShape(
        hidden=own.hidden,
        heads=own.heads,
        kv_heads=own.kv_heads,
        head_dim=own.head_dim,
        intermediate=own.intermediate,
        vocab=own.vocab_size,
        max_length=length,
        gated=isinstance(model, Llama),
        eps=own.norm_eps,
        dtype=dtype,
        first_token=shard.lane * len(model.embedding) if shard.first else 0,
        embeds=shard.first,
    )


def layers_of(model: NativeModel, keep: bool) -> Iterator[LayerWeights]:
    """The layers; each loses its weights as it is passed, unless it is to ``keep`` them."""
    return _llama_layers(model, keep) if isinstance(model, Llama) else _opt_layers(model, keep)


def ends_of(model: NativeModel, shape: ModelConfig, shard: Shard, keep: bool) -> Ends:
    """What stands before and behind the layers at this rank."""
    one = shape.tied and shard.first and shard.last
    head = _affine(model.head, keep).weight if shard.last else None
    embedding = model.embedding if shard.first and not one else None
    if isinstance(model, Llama):
        return Ends(head, embedding, cos=model.cos, sin=model.sin, final_norm=Norm(model.norm) if shard.last else None)
    norm = model.norm if shard.last else None
    return Ends(
        head,
        embedding,
        positions=model.positions if shard.first else None,
        final_norm=None if norm is None else Norm(norm.weight, norm.bias),
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


def _affine(linear: object, keep: bool) -> Affine:
    """The plain weight and bias of a linear map, which loses them unless it is to ``keep`` them."""
    if isinstance(linear, Reduced | VocabHead):
        linear = linear.linear
    if not isinstance(linear, Linear):
        raise TypeError(f"{type(linear).__name__} is no linear map")
    return Affine(*linear.plain()) if keep else Affine(*linear.give_up())
