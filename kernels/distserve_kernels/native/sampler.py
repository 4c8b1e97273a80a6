"""Tokens for all rows of a step in one native call (``sample.cpp``), on the CPU.

Owns the native threads and their scratch. Knows no request: what a row asks for comes packed, by ``pack_ask``.
"""

from __future__ import annotations

import ctypes
import struct
import weakref
from array import array
from ctypes import c_int64, c_void_p
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distserve_kernels.cores import Threads
from distserve_kernels.native.abi import BFLOAT16, FLOAT32

DTYPES = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}

_ASK = struct.Struct("=6dQ9q")

pack_ask = _ASK.pack
"""The bytes of one row. Floats: temperature, top_p, min_p, repetition, presence and frequency penalty. Whole numbers:
seed, output index, top_k, logprobs; where its ids begin in ``Asks.ids``, how many of them are banned, biased, of the
prompt, of the output (in this order there); where its biases begin in ``Asks.amounts``."""


@dataclass(frozen=True, slots=True)
class Asks:
    """What all rows ask for. ``rows`` holds a ``pack_ask`` each, or nothing when all are greedy and ask for no more."""

    rows: bytes = b""
    ids: array[int] = field(default_factory=lambda: array("q"))
    amounts: array[float] = field(default_factory=lambda: array("d"))
    most: int = 0  # of the most likely that one row asks for


@dataclass(frozen=True, slots=True)
class Chosen:
    """ids: [rows]   logprobs: [rows], of rows that asked   top_ids, top: [rows * most]; id -1: there are no more"""

    ids: array[int]
    logprobs: array[float]
    top_ids: array[int]
    top: array[float]


class _Rows(ctypes.Structure):
    _fields_ = [
        ("logits", c_void_p),
        ("dtype", c_int64),
        ("stride", c_int64),
        ("rows", c_int64),
        ("asks", ctypes.c_char_p),
        ("ids", c_void_p),
        ("id_count", c_int64),
        ("amounts", c_void_p),
        ("chosen", c_void_p),
        ("logprob", c_void_p),
        ("most", c_int64),
        ("top_ids", c_void_p),
        ("top", c_void_p),
    ]


class RowSampler:
    """For rows of ``vocab`` logits. One call at a time; between calls its ``threads`` sleep."""

    def __init__(self, library: ctypes.CDLL, vocab: int, threads: Threads) -> None:
        if library.ds_sampler_ask_size() != _ASK.size:
            raise OSError("the native sampler was built for other structures")
        self.vocab = vocab
        cores = threads.core_numbers()
        handle = library.ds_sampler_create(vocab, threads.count, cores and _at(cores))
        if not handle:
            raise MemoryError("not enough memory or threads for the native sampler")
        self._handle = c_void_p(handle)
        weakref.finalize(self, library.ds_sampler_destroy, self._handle)
        self._sample = library.ds_sample

    def choose(self, logits: Tensor, asks: Asks) -> Chosen:
        """logits: [rows, vocab] on the CPU, of any floating dtype, not changed; ``asks`` of as many rows.

        Raises IndexError when an id of ``asks`` is none of the vocabulary.
        """
        if logits.dtype not in DTYPES:
            logits = logits.float()
        if logits.stride(1) != 1:
            logits = logits.contiguous()
        count = len(logits)
        if logits.shape[1] != self.vocab or len(asks.rows) not in (0, count * _ASK.size):
            raise ValueError(f"{tuple(logits.shape)} logits are not {self.vocab} for each row that asks")
        chosen = Chosen(
            array("q", bytes(8 * count)),
            array("d", bytes(8 * count)),
            array("q", bytes(8 * count * asks.most)),
            array("d", bytes(8 * count * asks.most)),
        )
        rows = _Rows(
            logits.data_ptr(), DTYPES[logits.dtype], logits.stride(0), count, asks.rows or None,
            _at(asks.ids), len(asks.ids), _at(asks.amounts),
            _at(chosen.ids), _at(chosen.logprobs), asks.most, _at(chosen.top_ids), _at(chosen.top),
        )  # fmt: skip
        if self._sample(self._handle, ctypes.byref(rows)) != 0:
            raise IndexError(f"a banned, biased or penalised id is none of the {self.vocab} of the vocabulary")
        return chosen


def _at(numbers: array[int] | array[float]) -> int:
    """The address of the first number."""
    return numbers.buffer_info()[0]
