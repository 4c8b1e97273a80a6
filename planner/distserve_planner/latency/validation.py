"""How well the measured tables foretell shapes they do not hold: rows held back, predicted from the rest.

Two ways to hold back: *rows* (a random share of a table's rows) and *sites* (every row of the matrix and head shapes a
model uses, or of a random share of them: what a model nobody measured would see). Used by the bench, the tests and
``distserve profile``'s residuals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distserve_planner.hardware import Gpu
from distserve_planner.latency.kernels import MeasuredKernels
from distserve_planner.latency.operators import ENGINES, OperatorLatency
from distserve_planner.latency.tables import Floats, Table, packaged
from distserve_planner.models import ModelFacts

_SITE = {"gemm_bf16": slice(1, 3), "gemm_fp8": slice(1, 3), "prefill": slice(2, 4), "decode": slice(2, 4)}
OPERATORS = tuple(_SITE)
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Errors:
    """Relative errors |predicted / measured - 1| of ``count`` shapes."""

    count: int
    median: float
    p90: float
    worst: float

    @staticmethod
    def of(predicted: Floats, measured: Floats) -> Errors:
        e = np.abs(predicted / measured - 1)
        return Errors(len(e), float(np.median(e)), float(np.quantile(e, 0.9)), float(e.max()))


def random_rows(table: Table, share: float, seed: int) -> Mask:
    """True for a random ``share`` of the rows."""
    mask: Mask = np.random.default_rng(seed).random(len(table.seconds)) < share
    return mask


def random_sites(table: Table, name: str, share: float, seed: int) -> Mask:
    """True for all rows of a random ``share`` of the (n, k) or (heads, kv heads) pairs."""
    sites, index = np.unique(table.shape[:, _SITE[name]], axis=0, return_inverse=True)
    chosen: Mask = np.random.default_rng(seed).random(len(sites)) < share
    return chosen[index.reshape(-1)]


def operator_errors(gpu: Gpu, name: str, held: Mask) -> Errors:
    """The held-back rows of table ``name``, predicted from the others."""
    table = packaged(gpu.tables)[name]
    kernels = MeasuredKernels(gpu, {name: table.where(~held)})
    asked = table.where(held)
    if name.startswith("gemm"):
        predicted = kernels.gemm_seconds(asked.shape, name.removeprefix("gemm_"))
    else:
        predicted = kernels.attention_seconds(name, asked.shape)
    return Errors.of(predicted, asked.seconds)


def without(gpu: Gpu, held: Mapping[str, Mask]) -> MeasuredKernels:
    """The GPU's kernels, knowing nothing of the held-back rows."""
    tables = packaged(gpu.tables)
    return MeasuredKernels(gpu, {n: t.where(~held[n]) if n in held else t for n, t in tables.items()})


def own_sites(gpu: Gpu, model: ModelFacts, tp: int) -> dict[str, Mask]:
    """Every row of the matrix and head shapes that the model itself uses at ``tp``."""
    products = {(m.n, m.k) for m in model.matmuls(tp)} | {(model.vocab // tp, model.hidden)}
    heads = {(model.heads // tp, model.kv_heads_of(tp))}
    wanted = {"gemm_bf16": products, "prefill": heads, "decode": heads}
    tables = packaged(gpu.tables)
    return {
        name: np.array([tuple(row) in sites for row in tables[name].shape[:, _SITE[name]].tolist()])
        for name, sites in wanted.items()
    }


def step_errors(
    model: ModelFacts, gpu: Gpu, tp: int, held: Mapping[str, Mask], batches: Sequence[int], lengths: Sequence[int]
) -> tuple[Errors, Errors]:
    """(prefill, decode) step times composed without the held-back rows, against those composed with them."""
    full = OperatorLatency(model, gpu, tp, engine=ENGINES["none"])
    blind = OperatorLatency(model, gpu, tp, engine=ENGINES["none"], kernels=without(gpu, held))
    prefill, decode = [], []
    for batch in batches:
        for length in lengths:
            chunks = [(length, 0)] * batch
            if batch * length <= 32768:
                prefill.append((blind.step_s(chunks, 0, 0), full.step_s(chunks, 0, 0)))
            if batch * length <= max(full.kv_capacity_tokens, length):
                decode.append((blind.decode_s(batch, batch * length), full.decode_s(batch, batch * length)))
    return _errors(prefill), _errors(decode)


def _errors(pairs: list[tuple[float, float]]) -> Errors:
    both = np.array(pairs)
    return Errors.of(both[:, 0], both[:, 1])
