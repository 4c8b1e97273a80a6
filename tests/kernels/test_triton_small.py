"""Norm, gate, rotary with the KV write, and KV moves in Triton against their torch references, on awkward shapes."""

from __future__ import annotations

import pytest
import torch

from distserve_kernels import paged_reference as reference
from distserve_kernels.rms_norm import add_rms_norm, rms_norm
from distserve_kernels.rotary import rotary_table
from distserve_kernels.silu_mul import silu_mul
from tests.kernels.interpreted import DEVICE, modules, random

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}  # of 1 + the value: two roundings
DTYPES = sorted(TOLERANCE, key=str)


def near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    assert ((found.double() - wanted.double()).abs() / (1 + wanted.double().abs())).max() <= TOLERANCE[wanted.dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (3, 123), (17, 576), (2, 4096)])
def test_norms(rows: int, width: int, dtype: torch.dtype) -> None:
    x, residual = (random(rows, width, dtype=dtype, seed=s) for s in (0, 1))
    weight = random(width, dtype=dtype, seed=2)
    near(modules["norm"].rms_norm(x, weight, 1e-5), rms_norm(x, weight, 1e-5))
    found, total = modules["norm"].add_rms_norm(x, residual, weight, 1e-5)
    wanted, summed = add_rms_norm(x, residual, weight, 1e-5)
    near(found, wanted)
    near(total, summed)
    if DEVICE.type == "cuda" or dtype is not torch.bfloat16:  # the interpreter cuts where bfloat16 should round
        assert torch.equal(total, summed), "the residual stream must not depend on the backend"


def test_norm_of_a_view_and_of_nothing() -> None:
    wide = random(5, 3, 64)
    weight = random(64, seed=1)
    near(modules["norm"].rms_norm(wide[:, 1], weight, 1e-6), rms_norm(wide[:, 1], weight, 1e-6))
    near(modules["norm"].rms_norm(wide, weight, 1e-6), rms_norm(wide, weight, 1e-6))
    assert modules["norm"].rms_norm(wide[:0], weight, 1e-6).shape == (0, 3, 64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 8), (3, 123), (5, 1536), (2, 3000), (0, 16)])
def test_gate(rows: int, width: int, dtype: torch.dtype) -> None:
    x = random(rows, 2 * width, dtype=dtype) * 3
    found = modules["gate"].silu_mul(x)
    assert found.shape == (rows, width)
    if rows:
        near(found, silu_mul(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kv_heads", "dim"), [(2, 16), (3, 80), (1, 7)])
def test_the_write_alone(kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    """K and V as they are, of a strided view; a negative slot is written nowhere."""
    new = random(5, 4 + 2 * kv_heads, dim, dtype=dtype)[:, 4:]
    pool = random(6, 2, 2, kv_heads, 4, dim, dtype=dtype, seed=1)
    slots = torch.tensor([23, -1, 0, 9, 10], device=DEVICE)
    wanted = pool.clone()
    reference.paged_kv_write(new, wanted[:, 1], slots)
    modules["rotary"].paged_kv_write(new, pool[:, 1], slots)
    assert torch.equal(pool, wanted)
    assert torch.equal(pool[5, 1, 1, :, 3], new[0, kv_heads:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 16), (9, 3, 64), (6, 1, 24), (3, 3, 80)])
def test_rotary_and_the_write(heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    tokens, size, layers, layer = 7, 4, 3, 1
    qkv = random(tokens, heads + 2 * kv_heads, dim, dtype=dtype)
    angles = rotary_table(1.0 / 10000 ** (torch.arange(0, dim, 2) / dim), 50, dtype)
    cos, sin = (table.squeeze(1).to(DEVICE) for table in angles)
    positions = torch.tensor([0, 1, 49, 7, 7, 30, 2], device=DEVICE)
    slots = torch.tensor([3, 19, -1, 8, 0, 11, 5], device=DEVICE)
    pools = [torch.zeros(5, layers, 2, kv_heads, size, dim, dtype=dtype, device=DEVICE) for _ in range(2)]
    both = [qkv.clone(), qkv.clone()]
    modules["rotary"].rotary_kv_write(both[0], cos, sin, positions, pools[0][:, layer], slots)
    reference.rotary_kv_write(both[1], cos, sin, positions, pools[1][:, layer], slots)
    near(both[0], both[1])
    near(pools[0], pools[1])
    assert torch.equal(both[0][:, heads:], qkv[:, heads:]), "K and V of the input stay as they are"
    assert not pools[0][:, [0, 2]].any(), "only this layer is written"


CASES = [
    (torch.float32, 3, 4, 4, 16, range(3), range(4)),
    (torch.bfloat16, 3, 4, 16, 64, range(1, 3), range(2, 4)),
    (torch.float16, 2, 6, 5, 12, range(2), range(1, 2)),
    (torch.bfloat16, 1, 1, 16, 24, range(1), range(1)),
]


@pytest.mark.parametrize(("dtype", "layers", "kv_heads", "size", "dim", "some", "heads"), CASES)
def test_kv_out_and_back(
    dtype: torch.dtype, layers: int, kv_heads: int, size: int, dim: int, some: range, heads: range
) -> None:
    """A rectangle of layers and heads out of scattered blocks, checksummed; and back into others."""
    pool = random(9, layers, 2, kv_heads, size, dim, dtype=dtype)
    out, back = (torch.tensor(ids, dtype=torch.int32, device=DEVICE) for ids in ([7, 0, 3], [2, 8, 5]))
    shape = (3, len(some), 2, len(heads), size, dim)
    staged, wanted = (torch.zeros(shape, dtype=dtype, device=DEVICE) for _ in range(2))
    found_sum = modules["kv_move"].kv_gather(pool, out, some, heads, staged, True)
    assert torch.equal(found_sum, reference.kv_gather(pool, out, some, heads, wanted, True))
    assert torch.equal(staged, wanted) and staged.any()
    targets = [pool.clone(), pool.clone()]
    assert torch.equal(modules["kv_move"].kv_scatter(targets[0], back, some, heads, staged, True), found_sum)
    reference.kv_scatter(targets[1], back, some, heads, staged, False)
    assert torch.equal(targets[0], targets[1]) and not torch.equal(targets[0], pool)
    assert modules["kv_move"].kv_gather(pool, out, some, heads, staged, False) == 0


def test_the_checksum_notices_every_flipped_bit_and_every_exchange() -> None:
    staged = random(2, 1, 2, 1, 2, 4)
    whole = reference.staging_checksum(staged)
    raw = staged.view(-1).view(torch.int32)
    for word in range(len(raw)):
        for bit in range(32):
            changed = raw.clone()
            changed[word] ^= (1 << bit) if bit < 31 else -(1 << 31)
            assert not torch.equal(reference.staging_checksum(changed), whole)
    exchanged = raw.clone()
    exchanged[[0, 1]] = raw[[1, 0]]
    assert not torch.equal(reference.staging_checksum(exchanged), whole)


def test_half_words_are_refused() -> None:
    pool = random(2, 1, 2, 1, 1, 3, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="32-bit words"):
        modules["kv_move"].kv_gather(pool, torch.tensor([0]), range(1), range(1), pool[:1].clone(), False)
