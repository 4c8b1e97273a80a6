"""A decoder's weights in the native layout, and its forward pass as one native call.

Owns the packed weights, the native threads and the logits it returns. Knows neither requests nor sampling; what a model
is made of it is told in ``LayerWeights`` and ``Ends``, in plain tensors on the CPU, all of one dtype. May be a rank's
share of a model: some of its layers, or one lane's part of each.
"""

from __future__ import annotations

import ctypes
import weakref
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from distserve_kernels.cores import Threads
from distserve_kernels.memory import advise_large_pages
from distserve_kernels.native import abi
from distserve_kernels.native.lanes import SharedLanes

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
    """Sizes, of what is computed here; ``max_length``: positions that the tables of ``Ends`` cover.

    ``vocab`` is the whole model's. ``first_token``: of the rows of the vocabulary that are here. ``embeds``: whether it
    begins with tokens; if not, with what a stage before left.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    max_length: int
    gated: bool
    eps: float
    dtype: torch.dtype
    first_token: int = 0
    embeds: bool = True


@dataclass(frozen=True, slots=True)
class Ends:
    """What stands before and behind the layers; what belongs to another stage is None.

    ``embedding`` None beside a head: tied, the head's rows.
    """

    head: Tensor | None = None  # [vocab here, hidden]
    embedding: Tensor | None = None  # [vocab here, hidden]
    positions: Tensor | None = None  # [max_length, hidden], learned
    cos: Tensor | None = None  # [max_length, 1, head_dim], rotary
    sin: Tensor | None = None
    final_norm: Norm | None = None


class GivenUp(Exception):
    """A call ended early, as asked: the KV of its tokens is not to be read."""


class LaneSums:
    """Sums over the lanes of a stage, for a decoder that is one of them. Made once; serves one call at a time."""

    context: int | None = None

    def __init__(self, sum_: Callable[[Tensor], object]) -> None:
        """``sum_`` replaces what a tensor holds by its sum over all lanes; it may raise."""
        self._sum = sum_
        self._call = abi.SUM(self._called)
        self._rows = torch.empty(0)
        self._now = self._rows
        self._failure: BaseException | None = None

    @property
    def address(self) -> int | None:
        """Of a function as ``Model.sum``; it is called with ``context``."""
        return ctypes.cast(self._call, ctypes.c_void_p).value

    def begin(self, elements: int, dtype: torch.dtype) -> int:
        """The address of room for so many elements, which is what is summed until the next time."""
        if len(self._rows) < elements or self._rows.dtype != dtype:
            self._rows = torch.zeros(2 * elements, dtype=dtype)
        self._now, self._failure = self._rows[:elements], None
        return self._rows.data_ptr()

    def failure(self) -> BaseException:
        """Why the last sum could not be had."""
        return self._failure or RuntimeError("a sum over the lanes failed")

    def _called(self, context: int, sums: int, elements: int) -> int:
        """What raises here would be lost in the native call: it is kept, and raised when that has returned."""
        try:
            self._sum(self._now)
        except BaseException as failure:
            self._failure = failure
            return -1
        return 0


class SharedSums(LaneSums):
    """As ``LaneSums``, without leaving native code."""

    def __init__(self, lanes: SharedLanes, dtype: torch.dtype) -> None:
        super().__init__(lanes.sum_)
        self._lanes = lanes
        self._address, self.context = lanes.native_sum(dtype)

    @property
    def address(self) -> int | None:
        return self._address

    def failure(self) -> BaseException:
        return self._lanes.late()


class Decoder:
    """Weights are packed while ``layers`` is walked, so that the caller can let go of each layer in turn."""

    def __init__(
        self,
        library: ctypes.CDLL,
        shape: DecoderShape,
        layers: Iterable[LayerWeights],
        ends: Ends,
        threads: Threads,
        lanes: LaneSums | None = None,
    ) -> None:
        """``lanes``: where every layer is cut over several of them."""
        self._library, self._shape, self._lanes = library, shape, lanes
        self._held: list[Tensor] = []
        self.weight_bytes = 0
        records = [self._layer(layer) for layer in layers]
        model = self._model(shape, (abi.Layer * len(records))(*records), ends)
        cores = threads.core_numbers()
        handle = library.ds_create(ctypes.byref(model), threads.count, cores and cores.buffer_info()[0])
        if not handle:
            raise MemoryError("not enough memory or threads for the native kernels")
        self._handle = ctypes.c_void_p(handle)
        weakref.finalize(self, library.ds_destroy, self._handle)
        self._logits = torch.empty((0, 0 if ends.head is None else len(ends.head)))
        self._padded = int(library.ds_packed_outputs(shape.hidden, 0))
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
        before: Tensor | None = None,
        after: Tensor | None = None,
    ) -> Tensor:
        """Compute ``tokens``, write their KV into ``pool``, return logits [samples, vocab here] float32.

        pool: [blocks, layers, 2, kv_heads, block_size, head_dim], contiguous. segments: of each sequence its first row,
        tokens, position of the first of them, first entry in ``tables`` and entries there; samples: the rows whose
        logits are wanted. All int64. The next call overwrites the logits.

        before, after: [tokens, hidden], contiguous. What enters the first layer, where a stage before left it; what
        leaves the last one, where a stage follows.

        ``given_up``: the address of an int64 that any thread may write; the call ends early once it is ``number``.
        Raises IndexError when a token, row or block is out of range, GivenUp when it ended early, and what a sum over
        the lanes raised.
        """
        count, rows, width = len(samples), len(tokens), self._logits.shape[1]
        if count > len(self._logits):
            self._logits = torch.empty((max(count, 2 * len(self._logits)), width))
        memory = abi.Pool(pool.data_ptr(), pool.shape[4], pool.shape[0])
        step = abi.Step(
            rows, len(segments) // 5, count,
            tokens.buffer_info()[0], segments.buffer_info()[0], tables.buffer_info()[0], samples.buffer_info()[0],
            self._logits.data_ptr(), self._stream(before, rows), self._stream(after, rows),
            self._lanes and self._lanes.begin(rows * self._padded, self._shape.dtype), given_up, number,
        )  # fmt: skip
        match self._run(self._handle, ctypes.byref(step), ctypes.byref(memory)):
            case 0:
                return self._logits[:count]
            case abi.OUT_OF_RANGE:
                raise IndexError("a token, row or block of the step is out of range")
            case abi.GIVEN_UP:
                raise GivenUp(f"step {number} was given up")
            case abi.SUM_FAILED if self._lanes is not None:
                raise self._lanes.failure()
            case _:
                raise MemoryError("not enough memory for the activations of this step")

    def _stream(self, rows: Tensor | None, count: int) -> int | None:
        """The address of a residual stream of so many tokens."""
        if rows is None:
            return None
        if rows.shape != (count, self._shape.hidden) or rows.dtype != self._shape.dtype or not rows.is_contiguous():
            raise ValueError(f"a residual stream of {tuple(rows.shape)} {rows.dtype} for {count} tokens")
        return rows.data_ptr()

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
        norm, rows = ends.final_norm, ends.head if ends.embedding is None else ends.embedding
        return abi.Model(
            dtype=DTYPES[shape.dtype],
            layers=len(layers),
            hidden=shape.hidden,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            intermediate=shape.intermediate,
            vocab=shape.vocab,
            first_token=shape.first_token,
            max_length=shape.max_length,
            gated=shape.gated,
            eps=shape.eps,
            scale=shape.head_dim**-0.5,
            embedding=self._hold(ends.embedding),
            embedded=len(rows) if shape.embeds and rows is not None else 0,
            positions=self._hold(ends.positions),
            cos=self._hold(ends.cos),
            sin=self._hold(ends.sin),
            final_norm=self._hold(norm.weight if norm else None),
            final_norm_bias=self._hold(norm.bias if norm else None),
            head=abi.Linear() if ends.head is None else self._affine(Affine(ends.head)),
            layer=layers,
            sum=None if self._lanes is None else self._lanes.address,
            context=None if self._lanes is None else self._lanes.context,
        )

    def _affine(self, affine: Affine, pair: bool = False) -> abi.Linear:
        """Pack a matrix. ``pair``: it is two, whose outputs alternate in groups of 16."""
        weight = affine.weight.contiguous()
        halves = weight.chunk(2) if pair else (weight,)
        outputs, inputs = halves[0].shape
        rows = int(self._library.ds_packed_outputs(outputs, pair))
        packed = torch.empty(rows * (inputs + inputs % 2), dtype=self._shape.dtype)
        advise_large_pages(packed)
        second = halves[1].data_ptr() if pair else None
        kind = DTYPES[self._shape.dtype]
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
