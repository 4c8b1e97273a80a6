"""A decoder's weights in the native layout, and its forward pass as one native call.

Owns the packed weights, the native threads and the logits it returns. Knows neither requests nor sampling; what a model
is made of it is told in ``DecoderWeights``, in plain tensors on the CPU, all of one dtype.
"""

from __future__ import annotations

import ctypes
import weakref
from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from distserve_kernels.memory import advise_large_pages
from distserve_kernels.native import abi

DTYPES = {torch.float32: abi.FLOAT32, torch.bfloat16: abi.BFLOAT16}
MOST_HEAD_DIM = 512


@dataclass(frozen=True, slots=True)
class Affine:
    """y = x·Wᵀ + b. weight: [outputs, inputs]   bias: [outputs] or None"""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Norm:
    """RMS norm, or LayerNorm when there is a bias. weight, bias: [hidden]"""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer. ``up`` of a gated network is gate over up, [2 * intermediate, hidden]."""

    qkv: Affine  # Q heads, K heads, V heads
    out: Affine
    up: Affine
    down: Affine
    norm1: Norm
    norm2: Norm
    qk_norm: Tensor | None = None  # [heads + kv_heads, head_dim]


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """Sizes; ``max_length``: positions that the tables of ``Ends`` cover."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    max_length: int
    gated: bool
    eps: float


@dataclass(frozen=True, slots=True)
class Ends:
    """What stands before and behind the layers. ``embedding`` None: tied, the head's rows."""

    head: Tensor  # [vocab, hidden]
    embedding: Tensor | None = None  # [vocab, hidden]
    positions: Tensor | None = None  # [max_length, hidden], learned
    cos: Tensor | None = None  # [max_length, 1, head_dim], rotary
    sin: Tensor | None = None
    final_norm: Norm | None = None


class GivenUp(Exception):
    """A call ended early, as asked: the KV of its tokens is not to be read."""


class Decoder:
    """Weights are packed while ``layers`` is walked, so that the caller can let go of each layer in turn."""

    def __init__(
        self, library: ctypes.CDLL, shape: DecoderShape, layers: Iterable[LayerWeights], ends: Ends, threads: int
    ) -> None:
        self._library, self._shape, self._dtype = library, shape, ends.head.dtype
        self._held: list[Tensor] = []
        self.weight_bytes = 0
        records = [self._layer(layer) for layer in layers]
        model = self._model(shape, (abi.Layer * len(records))(*records), ends)
        handle = library.ds_create(ctypes.byref(model), threads)
        if not handle:
            raise MemoryError("not enough memory or threads for the native kernels")
        self._handle = ctypes.c_void_p(handle)
        weakref.finalize(self, library.ds_destroy, self._handle)
        self._logits = torch.empty((0, shape.vocab))
        self._run = library.ds_run

    def run(
        self,
        pool: Tensor,
        tokens: array[int],
        segments: array[int],
        tables: array[int],
        samples: array[int],
        number: int = 0,
        given_up: int | None = None,
    ) -> Tensor:
        """Compute ``tokens``, write their KV into ``pool``, return logits [samples, vocab] float32.

        pool: [blocks, layers, 2, kv_heads, block_size, head_dim], contiguous. segments: of each sequence its first row,
        tokens, position of the first of them, first entry in ``tables`` and entries there; samples: the rows whose
        logits are wanted. All int64. The next call overwrites the logits.

        ``given_up``: the address of an int64 that any thread may write; the call ends early once it is ``number``.
        Raises IndexError when a token, row or block is out of range, GivenUp when it ended early.
        """
        count = len(samples)
        if count > len(self._logits):
            self._logits = torch.empty((max(count, 2 * len(self._logits)), self._shape.vocab))
        memory = abi.Pool(pool.data_ptr(), pool.shape[4], pool.shape[0])
        step = abi.Step(
            len(tokens), len(segments) // 5, count,
            tokens.buffer_info()[0], segments.buffer_info()[0], tables.buffer_info()[0], samples.buffer_info()[0],
            self._logits.data_ptr(), given_up, number,
        )  # fmt: skip
        code = self._run(self._handle, ctypes.byref(step), ctypes.byref(memory))
        if code == -1:
            raise IndexError("a token, row or block of the step is out of range")
        if code == -3:
            raise GivenUp(f"step {number} was given up")
        if code != 0:
            raise MemoryError("not enough memory for the activations of this step")
        return self._logits[:count]

    def _layer(self, layer: LayerWeights) -> abi.Layer:
        return abi.Layer(
            qkv=self._affine(layer.qkv),
            out=self._affine(layer.out),
            up=self._affine(layer.up, pair=self._shape.gated),
            down=self._affine(layer.down),
            norm1=self._hold(layer.norm1.weight),
            norm1_bias=self._hold(layer.norm1.bias),
            norm2=self._hold(layer.norm2.weight),
            norm2_bias=self._hold(layer.norm2.bias),
            qk_norm=self._hold(layer.qk_norm),
        )

    def _model(self, shape: DecoderShape, layers: ctypes.Array[abi.Layer], ends: Ends) -> abi.Model:
        norm = ends.final_norm
        return abi.Model(
            dtype=DTYPES[self._dtype],
            layers=len(layers),
            hidden=shape.hidden,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            intermediate=shape.intermediate,
            vocab=shape.vocab,
            max_length=shape.max_length,
            gated=shape.gated,
            eps=shape.eps,
            scale=shape.head_dim**-0.5,
            embedding=self._hold(ends.embedding),
            positions=self._hold(ends.positions),
            cos=self._hold(ends.cos),
            sin=self._hold(ends.sin),
            final_norm=self._hold(norm.weight if norm else None),
            final_norm_bias=self._hold(norm.bias if norm else None),
            head=self._affine(Affine(ends.head)),
            layer=layers,
        )

    def _affine(self, affine: Affine, pair: bool = False) -> abi.Linear:
        """Pack a matrix. ``pair``: it is two, whose outputs alternate in groups of 16."""
        weight = affine.weight.contiguous()
        halves = weight.chunk(2) if pair else (weight,)
        outputs, inputs = halves[0].shape
        rows = int(self._library.ds_packed_outputs(outputs, pair))
        packed = torch.empty(rows * (inputs + inputs % 2), dtype=self._dtype)
        advise_large_pages(packed)
        second = halves[1].data_ptr() if pair else None
        kind = DTYPES[self._dtype]
        self._library.ds_pack(kind, halves[0].data_ptr(), second, outputs, inputs, packed.data_ptr())
        return abi.Linear(self._hold(packed), self._bias(affine.bias, rows, pair), inputs, rows if pair else outputs)

    def _bias(self, bias: Tensor | None, rows: int, pair: bool) -> int | None:
        """The bias in the order of the packed outputs, float32, padded with 0."""
        if bias is None:
            return None
        if pair:
            half = torch.zeros((2, rows // 2))
            half[:, : len(bias) // 2] = bias.view(2, -1)
            return self._hold(half.view(2, -1, 16).transpose(0, 1).reshape(-1))
        padded = torch.zeros(rows)
        padded[: len(bias)] = bias
        return self._hold(padded)

    def _hold(self, tensor: Tensor | None) -> int | None:
        """The address of a tensor that now lives as long as this decoder."""
        if tensor is None:
            return None
        tensor = tensor.contiguous()
        self._held.append(tensor)
        self.weight_bytes += tensor.nbytes
        return tensor.data_ptr()
