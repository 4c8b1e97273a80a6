"""The structures of ``model.h`` and the functions of ``engine.cpp``, ``copy.cpp``, ``lanes.cpp`` and ``sample.cpp``,
as ctypes sees them.

ctypes releases the interpreter's lock for the whole of each call.
"""

from __future__ import annotations

import ctypes
from ctypes import CFUNCTYPE, POINTER, Structure, c_char_p, c_double, c_int64, c_uint64, c_void_p
from typing import Any

FLOAT32, BFLOAT16 = 0, 1
"""Values of ``Model.dtype`` and of ``ds_pack``'s first argument."""

OUT_OF_RANGE, NO_MEMORY, GIVEN_UP, SUM_FAILED = -1, -2, -3, -4
"""What ``ds_run`` returns when it is not 0, see ``forward.h``."""

COPY_UNIT = 1024
"""Bytes: what ``ds_gather`` and ``ds_scatter`` copy of a pool is made of so many."""

SHORTEST_SUM = 241
"""Bytes: fewer they do not sum up."""


SUM = CFUNCTYPE(c_int64, c_void_p, c_void_p, c_int64)
"""``Model.sum`` in Python: it is called with the interpreter's lock, and may not raise."""


class Linear(Structure):
    _fields_ = [("packed", c_void_p), ("bias", c_void_p), ("inputs", c_int64), ("outputs", c_int64)]


class Layer(Structure):
    _fields_ = [
        ("qkv", Linear),
        ("out", Linear),
        ("up", Linear),
        ("down", Linear),
        ("norm1", c_void_p),
        ("norm1_bias", c_void_p),
        ("norm2", c_void_p),
        ("norm2_bias", c_void_p),
        ("qk_norm", c_void_p),
    ]


class Model(Structure):
    _fields_ = [
        ("dtype", c_int64),
        ("layers", c_int64),
        ("hidden", c_int64),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("head_dim", c_int64),
        ("intermediate", c_int64),
        ("vocab", c_int64),
        ("first_token", c_int64),
        ("max_length", c_int64),
        ("gated", c_int64),
        ("eps", c_double),
        ("scale", c_double),
        ("embedding", c_void_p),
        ("embedded", c_int64),
        ("positions", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("final_norm", c_void_p),
        ("final_norm_bias", c_void_p),
        ("head", Linear),
        ("layer", POINTER(Layer)),
        ("sum", c_void_p),
        ("context", c_void_p),
    ]


class Pool(Structure):
    _fields_ = [("memory", c_void_p), ("block_size", c_int64), ("blocks", c_int64)]


class Segment(Structure):
    _fields_ = [
        ("first", c_int64),
        ("length", c_int64),
        ("start", c_int64),
        ("table", c_int64),
        ("blocks", c_int64),
    ]


class Step(Structure):
    _fields_ = [
        ("rows", c_int64),
        ("segments", c_int64),
        ("samples", c_int64),
        ("tokens", c_void_p),
        ("segment", c_void_p),
        ("tables", c_void_p),
        ("sample_rows", c_void_p),
        ("logits", c_void_p),
        ("before", c_void_p),
        ("after", c_void_p),
        ("sums", c_void_p),
        ("given_up", c_void_p),
        ("number", c_int64),
    ]


_MIRRORED = (Model, Layer, Step, Segment, Pool)
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "ds_describe": (c_char_p, []),
    "ds_sizes": (None, [POINTER(c_int64)]),
    "ds_packed_outputs": (c_int64, [c_int64, c_int64]),
    "ds_pack": (None, [c_int64, c_void_p, c_void_p, c_int64, c_int64, c_void_p]),
    "ds_create": (c_void_p, [POINTER(Model), c_int64, c_void_p]),
    "ds_destroy": (None, [c_void_p]),
    "ds_gather": (c_uint64, [c_void_p, c_void_p, c_int64, c_void_p, c_uint64]),
    "ds_scatter": (c_uint64, [c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_uint64]),
    "ds_sampler_create": (c_void_p, [c_int64, c_int64, c_void_p]),
    "ds_sampler_destroy": (None, [c_void_p]),
    "ds_sampler_ask_size": (c_int64, []),
    "ds_sample": (c_int64, [c_void_p, c_void_p]),
    "ds_run": (c_int64, [c_void_p, POINTER(Step), POINTER(Pool)]),
    "ds_lanes_bytes": (c_int64, [c_int64, c_int64]),
    "ds_lanes_open": (c_void_p, [c_void_p, c_int64, c_int64, c_int64, c_double, c_int64]),
    "ds_lanes_close": (None, [c_void_p]),
    "ds_lanes_sum_float32": (c_int64, [c_void_p, c_void_p, c_int64]),
    "ds_lanes_sum_bfloat16": (c_int64, [c_void_p, c_void_p, c_int64]),
    "ds_lanes_gather": (c_int64, [c_void_p, c_void_p, c_void_p, c_int64, c_int64]),
}


def bind(path: str) -> ctypes.CDLL:
    """Open the library. Raises OSError when it cannot be loaded or is not the one that belongs to these structures."""
    library = ctypes.CDLL(path)
    for name, (result, arguments) in _FUNCTIONS.items():
        try:
            function = getattr(library, name)
        except AttributeError as error:
            raise OSError(f"{path} lacks {name}") from error
        function.restype, function.argtypes = result, arguments
    sizes = (c_int64 * len(_MIRRORED))()
    library.ds_sizes(sizes)
    if list(sizes) != [ctypes.sizeof(kind) for kind in _MIRRORED]:
        raise OSError(f"{path} was built for other structures")
    return library
