"""Whether a GGUF file can be what it says: its header walked, every count and offset held against the file's size.

The library that reads GGUF trusts the header: a flipped count makes it build lists until memory is gone. So this comes
first, and reads nothing but the header. Layout: the GGUF specification of ggml, versions 2 and 3, little endian. Knows
no architecture.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from distserve.models.errors import WeightsError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMENSIONS = 4
MAX_KEY_BYTES = 1 << 16
_STRING, _ARRAY = 8, 9
_FIXED = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # value type → bytes
_LEAST_FIELD, _LEAST_TENSOR = 8 + 4 + 1, 8 + 4 + 4 + 8  # bytes that a field or a tensor's description takes at least


class _Unsound(ValueError):
    """What is wrong, to go after the file's name."""


def check_gguf(path: Path) -> None:
    """Raises WeightsError with a sentence that names the file when its header contradicts itself or the file's size."""
    try:
        with path.open("rb") as file:
            if path.stat().st_size < len(MAGIC) + 20:
                raise _Unsound("it is too short")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                _Header(data).check()
    except (_Unsound, OSError) as error:
        raise WeightsError(f"{path} is not a readable GGUF file ({error}); download it again") from error


class _Header:
    """A cursor over the file that never passes its end."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._size = data, len(data)
        self._at = 0
        self._alignment = 32

    def check(self) -> None:
        if self._take(4) != MAGIC:
            raise _Unsound("it does not begin with GGUF")
        if (version := self._number("<I")) not in VERSIONS:
            raise _Unsound(f"its version is {version}, not one of {', '.join(map(str, VERSIONS))}")
        tensors, fields = self._number("<Q"), self._number("<Q")
        if fields * _LEAST_FIELD + tensors * _LEAST_TENSOR > self._size - self._at:
            raise _Unsound(f"{fields} fields and {tensors} tensors do not fit into its {self._size} bytes")
        self._check_fields(fields)
        self._check_tensors(tensors)

    def _check_fields(self, count: int) -> None:
        keys: set[bytes] = set()
        for _ in range(count):
            key = self._text(MAX_KEY_BYTES)
            if key in keys:
                raise _Unsound(f"the field {_shown(key)} is there twice")
            keys.add(key)
            start, kind = self._at + 4, self._number("<I")
            self._skip_value(kind, key)
            if key == b"general.alignment":
                self._take_alignment(kind, start)
            if key.endswith(b".block_count") and kind == 4:
                self._check_blocks(start)

    def _skip_value(self, kind: int, key: bytes) -> None:
        if kind in _FIXED:
            self._skip(_FIXED[kind])
        elif kind == _STRING:
            self._skip(self._number("<Q"))
        elif kind == _ARRAY:
            self._skip_array(key)
        else:
            raise _Unsound(f"the field {_shown(key)} is of the unknown type {kind}")

    def _skip_array(self, key: bytes) -> None:
        kind, count = self._number("<I"), self._number("<Q")
        if kind in _FIXED:
            self._skip(_FIXED[kind] * count)
        elif kind == _STRING:
            if count * 8 > self._size - self._at:
                raise _Unsound(f"the {count} texts of {_shown(key)} do not fit into it")
            for _ in range(count):
                self._skip(self._number("<Q"))
        else:
            raise _Unsound(f"the list {_shown(key)} is of the unknown type {kind}")

    def _take_alignment(self, kind: int, start: int) -> None:
        (alignment,) = struct.unpack_from("<I", self._data, start) if kind == 4 else (0,)
        if not 1 <= alignment <= 1 << 16 or alignment & (alignment - 1):
            raise _Unsound("its alignment is no power of two")
        self._alignment = alignment

    def _check_blocks(self, start: int) -> None:
        """A model is built layer by layer before its tensors are looked for."""
        (layers,) = struct.unpack_from("<I", self._data, start)
        (tensors,) = struct.unpack_from("<Q", self._data, 8)
        if layers > tensors:
            raise _Unsound(f"it speaks of {layers} layers, but holds {tensors} tensors")

    def _check_tensors(self, count: int) -> None:
        names: set[bytes] = set()
        ends: list[tuple[bytes, int]] = []
        for _ in range(count):
            name = self._text(MAX_KEY_BYTES)
            if name in names:
                raise _Unsound(f"the tensor {_shown(name)} is there twice")
            names.add(name)
            ends.append((name, self._tensor_end(name)))
        data = -(-self._at // self._alignment) * self._alignment
        for name, end in ends:
            if data + end > self._size:
                raise _Unsound(f"the tensor {_shown(name)} would end at byte {data + end} of {self._size}")

    def _tensor_end(self, name: bytes) -> int:
        """Where the tensor's bytes end, counted from the beginning of all tensors' bytes."""
        dimensions = self._number("<I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise _Unsound(f"the tensor {_shown(name)} has {dimensions} dimensions")
        shape = [self._number("<Q") for _ in range(dimensions)]
        kind, offset = self._number("<I"), self._number("<Q")
        try:
            elements, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            raise _Unsound(f"the tensor {_shown(name)} is of the unknown type {kind}") from None
        total = 1
        for extent in shape:
            total *= extent
        if not all(shape) or shape[0] % elements or offset % self._alignment:
            raise _Unsound(f"the tensor {_shown(name)} has the shape {shape} at byte {offset}, which cannot be")
        return offset + total // elements * nbytes

    def _text(self, most: int) -> bytes:
        if (length := self._number("<Q")) > most:
            raise _Unsound(f"a name of {length} bytes")
        return self._take(length)

    def _number(self, form: str) -> int:
        (value,) = struct.unpack(form, self._take(struct.calcsize(form)))
        return int(value)

    def _take(self, count: int) -> bytes:
        start = self._at
        self._skip(count)
        return self._data[start : self._at]

    def _skip(self, count: int) -> None:
        if count > self._size - self._at:
            raise _Unsound(f"it ends at byte {self._size}, in the middle of its header")
        self._at += count


def _shown(name: bytes) -> str:
    return repr(name[:80].decode(errors="replace"))
