"""One GPU's kernels: seconds of a matrix product, of attention, of a collective, for any shape.

Measured tables where the GPU has them, else a roofline with stated utilisations (``latency.roofline``). Knows shapes
on one rank; composing them into a model's step is ``latency.operators``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from distserve_planner.hardware import Gpu
from distserve_planner.latency.base import OutOfRange
from distserve_planner.latency.tables import Curve, Floats, Ints, LocalFit, Surface, Table, packaged

GEMM_FLOOR_S = 3e-6
ATTENTION_FLOOR_S = 8e-6
HEAD_DIM = 128  # of every measured attention row


class Kernels(Protocol):
    """What composing a step needs of a GPU. ``residual`` is the relative standard error of one operator."""

    @property
    def name(self) -> str: ...
    @property
    def residual(self) -> float: ...
    @property
    def token_sizes(self) -> list[float]:
        """Where a curve over the tokens of a step needs its knots."""
        ...

    def gemm(self, n: int, k: int, dtype: str) -> Curve:
        """Y[m, n] = X[m, k] W[k, n] over m."""
        ...

    def prefill(self, heads: int, kv_heads: int, head_dim: int) -> Surface:
        """Causal attention of ``batch`` prompts of ``length`` tokens, one layer."""
        ...

    def decode(self, heads: int, kv_heads: int, head_dim: int) -> Surface:
        """One new token for each of ``batch`` sequences over ``length`` tokens of KV, one layer."""
        ...

    def all_reduce(self, gpus: int) -> Curve:
        """Over the bytes of one rank's buffer, inside an NVLink domain."""
        ...

    def experts(self, hidden: int, inter: int, active: int, count: int, tp: int) -> Curve:
        """The fused mixture-of-experts FFN of one layer over tokens."""
        ...


class MeasuredKernels:
    """Kernels of a GPU with packaged tables (H200, H100, A100). ``tables`` may be replaced, e.g. to hold rows back."""

    def __init__(self, gpu: Gpu, tables: Mapping[str, Table] | None = None) -> None:
        if tables is None and not gpu.tables:
            raise ValueError(f"{gpu.name} has no measured tables")
        self.gpu = gpu
        self._tables = packaged(gpu.tables) if tables is None else tables
        self._fits: dict[str, _Fitted] = {}

    @property
    def name(self) -> str:
        return f"measured tables of {self.gpu.tables or self.gpu.name}"

    @property
    def residual(self) -> float:
        """Of one operator, from leaving out a fifth of the rows (bench/planner_operators.py): P90 9 %, on A100 14 %."""
        return 0.09 if self.gpu.tables == "a100" else 0.06

    @property
    def token_sizes(self) -> list[float]:
        return np.unique(self._table("gemm_bf16", "matrix products").shape[:, 0]).astype(float).tolist()

    def _table(self, name: str, what: str) -> Table:
        if name not in self._tables:
            known = ", ".join(sorted(self._tables))
            raise OutOfRange(f"{self.gpu.name} has no measurements of {what}", known)
        return self._tables[name]

    # ── matrix products ──────────────────────────────────────────────────────────────────────────────────────────────

    def gemm(self, n: int, k: int, dtype: str = "bf16") -> Curve:
        table = self._table(f"gemm_{dtype}", f"{dtype} matrix products")
        tokens = np.unique(table.shape[:, 0])
        asked = np.stack([tokens, np.full_like(tokens, n), np.full_like(tokens, k)], axis=1)
        seconds = self.gemm_seconds(asked, dtype)
        return Curve(tokens.tolist(), seconds.tolist())

    def gemm_seconds(self, shapes: Ints, dtype: str = "bf16") -> Floats:
        """Seconds of products ``shapes`` [rows, (m, n, k)]: as measured, or fitted from the nearest shapes."""
        table = self._table(f"gemm_{dtype}", f"{dtype} matrix products")
        fitted = self._fitted(f"gemm_{dtype}", table, self._gemm_bound(table.shape, dtype), (4.0, 1.0, 1.0))
        return fitted.seconds(shapes, self._gemm_bound(shapes, dtype))

    def _gemm_bound(self, shapes: Ints, dtype: str) -> Floats:
        m, n, k = shapes.T.astype(np.float64)
        size = 1 if dtype == "fp8" else 2
        moved = size * (m * k + k * n) + 2 * m * n
        return np.maximum(2 * m * n * k / self.gpu.rate[dtype], moved / self.gpu.hbm_bytes_s) + GEMM_FLOOR_S

    # ── attention ────────────────────────────────────────────────────────────────────────────────────────────────────

    def prefill(self, heads: int, kv_heads: int, head_dim: int = HEAD_DIM) -> Surface:
        return self._surface("prefill", heads, kv_heads, head_dim, power=2.0)

    def decode(self, heads: int, kv_heads: int, head_dim: int = HEAD_DIM) -> Surface:
        return self._surface("decode", heads, kv_heads, head_dim, power=1.0)

    def _surface(self, kind: str, heads: int, kv_heads: int, head_dim: int, power: float) -> Surface:
        table = self._table(kind, f"{kind} attention")
        batches, lengths = np.unique(table.shape[:, 0]), np.unique(table.shape[:, 1])
        grid = np.stack(np.meshgrid(batches, lengths, indexing="ij"), axis=-1).reshape(-1, 2)
        rest = np.full((len(grid), 2), (heads, kv_heads))
        seconds = self.attention_seconds(kind, np.concatenate([grid, rest], axis=1))
        if head_dim != HEAD_DIM:  # bytes and FLOPs go with the head size; the launch floor does not
            seconds = ATTENTION_FLOOR_S + np.maximum(seconds - ATTENTION_FLOOR_S, 0) * head_dim / HEAD_DIM
        return Surface(batches.tolist(), lengths.tolist(), seconds.reshape(len(batches), len(lengths)), power)

    def attention_seconds(self, kind: str, shapes: Ints) -> Floats:
        """Seconds of attention ``shapes`` [rows, (batch, length, heads, kv heads)]."""
        table = self._table(kind, f"{kind} attention")
        fitted = self._fitted(kind, table, self._attention_bound(kind, table.shape), (1.0, 1.2, 0.8, 0.7))
        return fitted.seconds(shapes, self._attention_bound(kind, shapes))

    def _attention_bound(self, kind: str, shapes: Ints) -> Floats:
        batch, length, heads, kv_heads = shapes.T.astype(np.float64)
        if kind == "prefill":
            flops = 2 * batch * heads * HEAD_DIM * length**2
            moved = 4 * batch * length * HEAD_DIM * (heads + kv_heads)
        else:
            flops = 4 * batch * heads * HEAD_DIM * length
            moved = 4 * batch * HEAD_DIM * (length * kv_heads + heads)
        return flops / self.gpu.flops + moved / self.gpu.hbm_bytes_s + ATTENTION_FLOOR_S

    # ── collectives and mixtures ─────────────────────────────────────────────────────────────────────────────────────

    def all_reduce(self, gpus: int) -> Curve:
        """The faster of the engine's own kernel and NCCL at each size. Raises OutOfRange for other group sizes."""
        curves = [
            self._collective(name, gpus)
            for name in ("all_reduce_vllm_graph", "all_reduce_nccl")
            if name in self._tables
        ]
        if not curves:
            raise OutOfRange(f"{self.gpu.name} has no measurements of all-reduce", ", ".join(sorted(self._tables)))
        sizes = sorted({size for table in curves for size in table})
        joined = [Curve(list(c), list(c.values())) for c in curves]
        return Curve(sizes, [min(c(size) for c in joined if size <= c.greatest) for size in sizes])

    def _collective(self, name: str, gpus: int) -> dict[float, float]:
        table = self._tables[name]
        groups = sorted(set(table.shape[:, 0].tolist()))
        if gpus not in groups:
            raise OutOfRange(f"no all-reduce measurements over {gpus} GPUs of {self.gpu.name}", f"{groups} GPUs")
        mine = table.where(table.shape[:, 0] == gpus)
        order = np.argsort(mine.shape[:, 1])
        return dict(zip(mine.shape[order, 1].tolist(), mine.seconds[order].tolist(), strict=True))

    def experts(self, hidden: int, inter: int, active: int, count: int, tp: int) -> Curve:
        name = "moe_power_law_1.2"  # skewed experts: what real traffic does
        table = self._table(name, "mixture-of-experts layers")
        wanted = np.array([hidden, inter, active, count, tp, 1])
        mine = table.where((table.shape[:, 1:] == wanted).all(axis=1))
        if not len(mine.seconds):
            known = sorted({tuple(row[:4]) for row in table.shape[:, 1:].tolist()})
            raise OutOfRange(
                f"no measurements of experts hidden={hidden} inter={inter} {active} of {count} at tp={tp}",
                f"(hidden, inter, active, experts) in {known}, tp 1, 2, 4, 8",
            )
        order = np.argsort(mine.shape[:, 0])
        return Curve(mine.shape[order, 0].tolist(), mine.seconds[order].tolist())

    def _fitted(self, name: str, table: Table, bound: Floats, scale: Sequence[float]) -> _Fitted:
        if name not in self._fits:
            self._fits[name] = _Fitted(table, bound, scale)
        return self._fits[name]


class _Fitted:
    """A table with the fit through it, made once."""

    def __init__(self, table: Table, bound: Floats, scale: Sequence[float]) -> None:
        self._fit = LocalFit(np.log(table.shape), np.log(table.seconds / bound), scale)
        self._known = {tuple(row): s for row, s in zip(table.shape.tolist(), table.seconds.tolist(), strict=True)}

    def seconds(self, shapes: Ints, bound: Floats) -> Floats:
        """The fitted seconds of ``shapes``, the table's own where it has the shape."""
        fitted = np.exp(self._fit.at(np.log(shapes))) * bound
        return np.array(
            [self._known.get(tuple(row), s) for row, s in zip(shapes.tolist(), fitted.tolist(), strict=True)]
        )


@functools.cache
def kernels_of(gpu: Gpu) -> MeasuredKernels:
    """The packaged tables' kernels, shared by all who ask: their fits are made once."""
    return MeasuredKernels(gpu)
