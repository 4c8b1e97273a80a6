"""Paged attention in Triton against its torch reference: scattered blocks, grouped heads, unequal lengths, prefixes."""

from __future__ import annotations

import pytest
import torch

from distserve_kernels import paged_reference as reference
from tests.kernels.interpreted import DEVICE, modules, random

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}
DTYPES = sorted(TOLERANCE, key=str)
LAYERS, LAYER = 2, 1


def paged(
    lengths: list[int], kv_heads: int, size: int, dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """A pool of noise, one layer of it, and tables of scattered blocks; what no table names is not a number."""
    need = [-(-n // size) for n in lengths]
    order = torch.randperm(sum(need) + 3, generator=torch.Generator().manual_seed(5))
    pool = random(len(order), LAYERS, 2, kv_heads, size, dim, dtype=dtype)
    tables = torch.full((len(lengths), max(need) + 1), 1 << 20, dtype=torch.int32)
    for i, count in enumerate(need):
        tables[i, :count] = order[sum(need[:i]) : sum(need[: i + 1])]
    for unused in order[sum(need) :]:
        pool[unused] = float("nan")
    return pool[:, LAYER], tables.to(DEVICE)


def near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    assert (found.double() - wanted.double()).abs().max() <= TOLERANCE[wanted.dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("chunks", "heads", "kv_heads", "size", "dim"),
    [
        ([(5, 0)], 2, 2, 4, 16),
        ([(1, 0), (17, 3), (40, 0), (2, 33)], 6, 2, 16, 24),
        ([(33, 7), (16, 16), (3, 64)], 4, 1, 5, 64),
        ([(70, 0)], 3, 3, 16, 80),
    ],
)
def test_prefill(
    chunks: list[tuple[int, int]], heads: int, kv_heads: int, size: int, dim: int, dtype: torch.dtype
) -> None:
    kv, tables = paged([start + length for length, start in chunks], kv_heads, size, dim, dtype)
    firsts = torch.tensor([0, *torch.tensor([n for n, _ in chunks]).cumsum(0).tolist()], dtype=torch.int32)
    starts = torch.tensor([start for _, start in chunks], dtype=torch.int32, device=DEVICE)
    tokens = int(firsts[-1])
    q = random(tokens, heads + 2 * kv_heads, dim, dtype=dtype, seed=9)[:, :heads]  # strided, as in the models
    asked = (q, kv, tables, firsts.to(DEVICE), starts, dim**-0.5, max(n for n, _ in chunks))
    near(modules["prefill"].paged_prefill_attention(*asked), reference.paged_prefill_attention(*asked))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("lengths", "heads", "kv_heads", "size", "dim"),
    [
        ([1], 2, 2, 4, 16),
        ([17, 0, 3, 64], 6, 2, 16, 24),
        ([130, 31, 1], 9, 3, 16, 64),
        ([600, 513], 4, 1, 5, 80),  # long enough for several splits
    ],
)
def test_decode(lengths: list[int], heads: int, kv_heads: int, size: int, dim: int, dtype: torch.dtype) -> None:
    kv, tables = paged(lengths, kv_heads, size, dim, dtype)
    q = random(len(lengths), heads + 2 * kv_heads, dim, dtype=dtype, seed=9)[:, :heads]
    counts = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    asked = (q, kv, tables, counts, dim**-0.5, max(lengths))
    near(modules["decode"].paged_decode_attention(*asked), reference.paged_decode_attention(*asked))


def test_more_splits_than_tokens_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """``longest`` may be far above every length, as it is in a CUDA graph."""
    kv, tables = paged([40, 3], 2, 16, 16, torch.float32)
    q = random(2, 4, 16, seed=9)
    counts = torch.tensor([40, 3], dtype=torch.int32, device=DEVICE)
    monkeypatch.setattr(modules["decode"], "LEAST_SPLIT_TOKENS", 16)
    monkeypatch.setattr(modules["decode"], "PROGRAMS_A_PROCESSOR", 100)
    assert modules["decode"].split_count(4, 4096, DEVICE) > 8
    near(
        modules["decode"].paged_decode_attention(q, kv, tables, counts, 0.25, 4096),
        reference.paged_decode_attention(q, kv, tables, counts, 0.25, 40),
    )


def test_the_number_of_splits_is_one_of_few() -> None:
    """Each is a case of the tuner."""
    split_count = modules["decode"].split_count
    found = {split_count(n, length, torch.device("cpu")) for n in range(1, 300) for length in (1, 700, 5000, 131072)}
    assert found <= {1, 2, 4, 8, 16, 32, 64}


def test_neighbours_in_a_launch_change_nothing() -> None:
    """Isolation: bit for bit the same answer alone and in company, at equal splits."""
    kv, tables = paged([50, 7, 33], 2, 16, 32, torch.float32)
    q = random(3, 4, 32, seed=9)
    counts = torch.tensor([50, 7, 33], dtype=torch.int32, device=DEVICE)
    decode = modules["decode"].paged_decode_attention
    together = decode(q, kv, tables, counts, 0.2, 50)
    for i in range(3):
        alone = decode(q[i : i + 1], kv, tables[i : i + 1], counts[i : i + 1], 0.2, 50)
        assert torch.equal(alone[0], together[i])


# ── with a GPU ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(32, 8, 128), (9, 3, 64), (16, 16, 80)])
def test_large_shapes(heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    lengths = [4096, 1, 2049, 8191]
    kv, tables = paged(lengths, kv_heads, 16, dim, dtype)
    counts = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    q = random(4, heads, dim, dtype=dtype, seed=9)
    asked = (q, kv, tables, counts, dim**-0.5, max(lengths))
    near(modules["decode"].paged_decode_attention(*asked), reference.paged_decode_attention(*asked))
    chunks = [512, 1, 1000, 33]
    firsts = torch.tensor([0, *torch.tensor(chunks).cumsum(0).tolist()], dtype=torch.int32, device=DEVICE)
    starts = counts - torch.tensor(chunks, dtype=torch.int32, device=DEVICE)
    q = random(sum(chunks), heads, dim, dtype=dtype, seed=10)
    asked = (q, kv, tables, firsts, starts, dim**-0.5, max(chunks))
    near(modules["prefill"].paged_prefill_attention(*asked), reference.paged_prefill_attention(*asked))
