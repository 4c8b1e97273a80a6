"""Measured operator times: the packaged tables, and interpolation between their shapes.

A time is looked at as a multiple of its *bound*: the roofline time of the same shape plus a launch floor. The multiple
varies slowly with the logarithms of the dimensions, so a local linear fit over the nearest measured shapes gives the
shapes between; a measured shape is returned as measured. Knows shapes and seconds, no model.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_NEIGHBOURS = 24
_AT_ONCE = 128  # points looked up together: bounds the memory of their distances
_RIDGE = 0.02  # keeps a slope that few neighbours determine near zero


@dataclass(frozen=True, slots=True)
class Table:
    """``shape``: [rows, dimensions] whole numbers; ``seconds``: [rows]."""

    shape: Ints
    seconds: Floats

    def where(self, keep: NDArray[np.bool_]) -> Table:
        """The rows of a boolean mask [rows]."""
        return Table(self.shape[keep], self.seconds[keep])


@functools.cache
def packaged(name: str) -> Mapping[str, Table]:
    """All tables of one GPU (``h200``, ``h100``, ``a100``). Sources and licences: data/README.md."""
    file = resources.files("distserve_planner").joinpath(f"data/profiles/{name}.npz")
    with file.open("rb") as stream, np.load(stream) as arrays:
        names = sorted({key.rpartition(".")[0] for key in arrays.files})
        return {
            n: Table(arrays[f"{n}.shape"].astype(np.int64), arrays[f"{n}.us"].astype(np.float64) * 1e-6) for n in names
        }


class LocalFit:
    """A smooth function of a few dimensions, known at scattered points: local linear regression, tricube weights.

    ``points``: [rows, dims], any units; ``scale`` stretches each dimension before distances are taken, so that points
    which differ in a stretched dimension count as far.
    """

    def __init__(self, points: Floats, values: Floats, scale: Sequence[float]) -> None:
        self._scale = np.asarray(scale, dtype=np.float64)
        self._points = points * self._scale
        self._values = values

    def at(self, points: Floats) -> Floats:
        """Values at ``points`` [n, dims] → [n]."""
        parts = np.array_split(points * self._scale, max(1, len(points) // _AT_ONCE))
        return np.concatenate([self._some(part) for part in parts])

    def _nearest(self, asked: Floats) -> tuple[Floats, Ints]:
        """Distance and index of the nearest known points, [n, k] each, nearest first."""
        squares = ((asked[:, None, :] - self._points[None, :, :]) ** 2).sum(axis=2)
        k = min(_NEIGHBOURS, len(self._values))
        index = np.argpartition(squares, k - 1, axis=1)[:, :k]
        near = np.take_along_axis(squares, index, axis=1)
        order = np.argsort(near, axis=1, kind="stable")
        return np.sqrt(np.take_along_axis(near, order, axis=1)), np.take_along_axis(index, order, axis=1)

    def _some(self, asked: Floats) -> Floats:
        """Values at scaled points [n, dims] → [n]: n local linear systems solved at once."""
        distance, index = self._nearest(asked)
        reach = distance[:, -1:] * 1.001 + 1e-9
        weight = (1 - (distance / reach) ** 3) ** 3 / (distance + 0.05)
        design = np.concatenate([np.ones((*index.shape, 1)), self._points[index] - asked[:, None]], axis=2)
        weighted = design * weight[..., None]
        normal = np.einsum("nki,nkj->nij", weighted, design)
        ridge = np.diag([0.0] + [_RIDGE] * asked.shape[1])
        normal += ridge * weight.sum(axis=1)[:, None, None]
        right = np.einsum("nki,nk->ni", weighted, self._values[index])
        solved: Floats = np.linalg.solve(normal, right[..., None])[:, 0, 0]
        nearby = self._values[index]
        return np.clip(solved, nearby.min(axis=1) - 0.1, nearby.max(axis=1) + 0.1)


class Curve:
    """Seconds over one size, straight between its knots in log-log. Plain Python: it is asked for every step."""

    __slots__ = ("_log_x", "_log_y", "greatest", "least")

    def __init__(self, sizes: Sequence[float], seconds: Sequence[float]) -> None:
        if len(sizes) != len(seconds) or not sizes:
            raise ValueError("a curve needs as many times as sizes, and at least one")
        self._log_x = [math.log(x) for x in sizes]
        self._log_y = [math.log(y) for y in seconds]
        self.least, self.greatest = sizes[0], sizes[-1]

    def __call__(self, size: float) -> float:
        """Below the first knot its time; above the last one the time grows in proportion."""
        xs, ys = self._log_x, self._log_y
        x = math.log(size)
        if x >= xs[-1]:
            return math.exp(ys[-1] + x - xs[-1])
        i = bisect_right(xs, x)
        if i == 0:
            return math.exp(ys[0])
        share = (x - xs[i - 1]) / (xs[i] - xs[i - 1])
        return math.exp(ys[i - 1] + share * (ys[i] - ys[i - 1]))


class Surface:
    """Seconds over batch and length, bilinear in logs on a full grid.

    Past an edge the time grows as the work does: in proportion to the batch, and to the length to ``power``.
    """

    __slots__ = ("_log_x", "_log_y", "_log_z", "_power", "greatest", "lengths")

    def __init__(self, batches: Sequence[int], lengths: Sequence[int], seconds: Floats, power: float) -> None:
        self._log_x = [math.log(b) for b in batches]
        self._log_y = [math.log(n) for n in lengths]
        self._log_z: list[list[float]] = np.log(seconds).tolist()
        self._power = power
        self.greatest = (batches[-1], lengths[-1])
        self.lengths = list(lengths)

    def __call__(self, batch: float, length: float) -> float:
        xs, ys, zs = self._log_x, self._log_y, self._log_z
        x, y = max(math.log(batch), xs[0]), max(math.log(length), ys[0])
        beyond = 0.0
        if x > xs[-1]:
            beyond, x = x - xs[-1], xs[-1]
        if y > ys[-1]:
            beyond, y = beyond + self._power * (y - ys[-1]), ys[-1]
        i = min(bisect_right(xs, x), len(xs) - 1) or 1
        j = min(bisect_right(ys, y), len(ys) - 1) or 1
        u = (x - xs[i - 1]) / (xs[i] - xs[i - 1])
        v = (y - ys[j - 1]) / (ys[j] - ys[j - 1])
        low, high = zs[i - 1], zs[i]
        return math.exp(
            beyond + (1 - u) * ((1 - v) * low[j - 1] + v * low[j]) + u * ((1 - v) * high[j - 1] + v * high[j])
        )
