"""Named tensors for a model: from safetensors, one or sharded, or random ones for benchmarks.

Tensors are taken in the order a model is built and dropped once packed, so memory holds one copy of the weights plus
one layer. Knows names, shapes and dtypes; not what they mean.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distserve.models.errors import WeightsError
from distserve.models.files import BadJson, read_object

Progress = Callable[[int, int, str], None]
"""progress(done_bytes, total_bytes, what): called after each tensor. Bytes as stored; total 0: unknown."""

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SAMPLE_BYTES, _SAMPLES = 1 << 16, 16


@dataclass(frozen=True, slots=True)
class Cut:
    """A slice of a tensor: rows (dim 0) or columns (dim 1) ``span``."""

    dim: int
    span: range


class Weights(Protocol):
    """Where a model takes its tensors from."""

    def has(self, name: str) -> bool:
        """Whether a tensor of this name exists."""
        ...

    def take(self, name: str, shape: tuple[int, ...], cut: Cut | None = None) -> Tensor:
        """The named tensor in the model's dtype and place. Raises WeightsError if missing or of another shape.

        With a ``cut`` only that slice of it; ``shape`` is the whole tensor's all the same.
        """
        ...


class SafetensorWeights:
    """The tensors of a Hugging Face directory. Files are opened when first needed, mapped, closed by ``with``."""

    def __init__(self, directory: Path, dtype: torch.dtype, device: torch.device, progress: Progress | None) -> None:
        self._dtype, self._device, self._progress = dtype, device, progress
        self._file_of = _locate(directory)
        self._total = sum(path.stat().st_size for path in set(self._file_of.values()))
        self._done = 0
        self.taken_bytes = 0
        self._open: dict[Path, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def has(self, name: str) -> bool:
        return name in self._file_of

    def take(self, name: str, shape: tuple[int, ...], cut: Cut | None = None) -> Tensor:
        path = self._file_of.get(name)
        if path is None:
            raise WeightsError(f'tensor "{name}" is in no safetensors file of the model; download the model again')
        try:
            tensor, found = self._read(path, name, cut)
        except SafetensorError as error:
            raise WeightsError(f'tensor "{name}" cannot be read from {path}: {error}') from error
        if found != shape:
            raise WeightsError(f'tensor "{name}" in {path} is {list(found)}, but config.json asks for {list(shape)}')
        if not tensor.is_floating_point():
            raise WeightsError(f'tensor "{name}" in {path} is {tensor.dtype}; quantized weights are not supported')
        self._done += tensor.nbytes
        if self._progress is not None:
            self._progress(self._done, self._total, path.name)
        self.taken_bytes += tensor.numel() * self._dtype.itemsize
        return tensor.to(device=self._device, dtype=self._dtype, copy=True)

    def _read(self, path: Path, name: str, cut: Cut | None) -> tuple[Tensor, tuple[int, ...]]:
        """The tensor, or the slice of it, and the shape of the whole. Nothing outside of the slice is read."""
        if cut is None:
            whole: Tensor = self._file(path).get_tensor(name)
            return whole, tuple(whole.shape)
        stored = self._file(path).get_slice(name)
        shape = tuple(stored.get_shape())
        low, high = cut.span.start, cut.span.stop
        if cut.dim >= len(shape) or high > shape[cut.dim]:
            raise WeightsError(f'tensor "{name}" in {path} is {list(shape)}, which holds no part {low} to {high}')
        return (stored[low:high] if cut.dim == 0 else stored[:, low:high]), shape

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = self._stack.enter_context(_open(path))
        return self._open[path]


class RandomWeights:
    """Seeded weights for benchmarks: normal matrices, unit norms, zero biases. A name always gives the same tensor."""

    def __init__(self, dtype: torch.dtype, device: torch.device, progress: Progress | None, seed: int = 0) -> None:
        self._dtype, self._device, self._progress, self._seed = dtype, device, progress, seed
        self.taken_bytes = 0

    def has(self, name: str) -> bool:
        return True

    def take(self, name: str, shape: tuple[int, ...], cut: Cut | None = None) -> Tensor:
        if name.endswith(".bias"):
            tensor = torch.zeros(shape, dtype=self._dtype)
        elif len(shape) == 1:
            tensor = torch.ones(shape, dtype=self._dtype)
        else:
            digest = hashlib.blake2b(f"{self._seed}/{name}".encode(), digest_size=7).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
            tensor = torch.empty(shape, dtype=self._dtype).normal_(0.0, 0.02, generator=generator)
        if cut is not None:
            tensor = tensor.narrow(cut.dim, cut.span.start, len(cut.span)).clone()
        self.taken_bytes += tensor.nbytes
        if self._progress is not None:
            self._progress(self.taken_bytes, 0, "random weights")
        return tensor.to(self._device)


def weight_identity(directory: Path) -> str:
    """A digest of the weight files: names, sizes, headers and samples spread over each; the same wherever they lie."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(set(_locate(directory).values())):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size};".encode())
        with path.open("rb") as file:
            for i in range(_SAMPLES):
                file.seek(i * max(0, size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _locate(directory: Path) -> dict[str, Path]:
    """Tensor name → file. Raises WeightsError when files are missing or damaged."""
    index = directory / _INDEX
    if index.is_file():
        return _locate_sharded(directory, index)
    single = directory / _SINGLE
    if not single.is_file():
        raise WeightsError(
            f"{directory} holds neither {_SINGLE} nor {_INDEX}; convert the weights to safetensors (other formats are "
            "not read) or download them again"
        )
    with _open(single) as file:
        return {str(name): single for name in file.keys()}  # noqa: SIM118 (it is not a mapping)


def _locate_sharded(directory: Path, index: Path) -> dict[str, Path]:
    try:
        names = read_object(index)["weight_map"]
    except (BadJson, KeyError) as error:
        raise WeightsError(f"{index} is damaged ({error}); download the model again") from error
    if not isinstance(names, dict) or not all(_is_file_name(file) for file in names.values()):
        why = "its weight_map does not name files beside it"
        raise WeightsError(f"{index} is damaged ({why}); download the model again")
    missing = sorted({file for file in names.values() if not (directory / file).is_file()})
    if missing:
        raise WeightsError(f"{directory} lacks {', '.join(missing)}, named by {index.name}; download the model again")
    return {name: directory / file for name, file in names.items()}


def _is_file_name(name: Any) -> bool:
    """Whether it is the name of a file in the directory itself: an index must not lead anywhere else."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is damaged or cut short ({error}); download the model again") from error
