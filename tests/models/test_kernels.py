"""Every operation against its plain formula, on awkward shapes and in every dtype it runs in."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from distserve_kernels.linear import Linear
from distserve_kernels.ops import REFERENCE, ops_for
from distserve_kernels.paged import DecodeGroup, block_rows, layer_views, token_rows
from distserve_kernels.rotary import rotary_table

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}
DTYPES = sorted(TOLERANCE, key=str)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int, scale: float) -> torch.Tensor:
    """Naive causal attention in float64. q: [tokens, heads, dim]; k, v: [kv_heads, start + tokens, dim]."""
    group = q.shape[1] // k.shape[0]
    k, v = (x.double().repeat_interleave(group, 0) for x in (k, v))
    scores = torch.einsum("thd,hsd->hts", q.double(), k) * scale
    visible = torch.arange(k.shape[1]) <= start + torch.arange(q.shape[0]).unsqueeze(1)
    return torch.einsum("hts,hsd->thd", scores.masked_fill(~visible, float("-inf")).softmax(-1), v)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "start"), [(2, 0), (17, 0), (123, 40), (128, 1), (300, 0), (129, 260)])
def test_prefill_attention(tokens, start, dtype):
    heads, kv_heads, dim = 6, 2, 24
    q = random(tokens, heads + 2 * kv_heads, dim, dtype=dtype)[:, :heads]  # a strided view, as in the models
    k, v = (random(kv_heads, start + tokens, dim, dtype=dtype, seed=s) for s in (1, 2))
    found = REFERENCE.prefill_attention(q, k, v, start, dim**-0.5)
    assert (found.double() - attention(q, k, v, start, dim**-0.5)).abs().max() < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [(1,), (17, 3), (123, 16, 15, 1, 50)])
@pytest.mark.parametrize("layer", [0, 2])
def test_paged_decode_attention_and_kv_write(lengths, layer, dtype):
    """KV written through token rows is found again through block rows, in scattered blocks and in the right layer."""
    layers, kv_heads, heads, dim, size = 3, 2, 4, 16, 8
    need = [-(-n // size) for n in lengths]
    order = torch.randperm(sum(need) + 5, generator=torch.Generator().manual_seed(3))
    tables = [order[sum(need[:i]) : sum(need[: i + 1])] for i in range(len(lengths))]
    views = layer_views(torch.zeros(len(order), layers, 2, kv_heads, size, dim, dtype=dtype))
    written = [random(n, 2 * kv_heads, dim, dtype=dtype, seed=n) for n in lengths]
    for table, kv in zip(tables, written, strict=True):
        positions = torch.arange(len(kv))
        rows = token_rows(table[positions // size], positions % size, layers, kv_heads, size)
        REFERENCE.kv_write(views[layer], rows, kv)
    longest = max(need)
    padded = torch.stack([torch.cat((t, t[-1:].expand(longest - len(t)))) for t in tables])
    gather = block_rows(padded, layers, kv_heads).transpose(1, 2).flatten()
    hidden = torch.arange(longest * size) >= torch.tensor(lengths).unsqueeze(1)
    mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
    group = DecodeGroup(0, len(lengths), gather, mask.repeat_interleave(kv_heads, 0).unsqueeze(1))
    q = random(len(lengths), heads, dim, dtype=dtype, seed=9)
    found = REFERENCE.decode_attention(q, views[layer], (group,), 0.25)
    for i, kv in enumerate(written):
        k, v = kv[:, :kv_heads].transpose(0, 1), kv[:, kv_heads:].transpose(0, 1)
        expected = attention(q[i : i + 1], k, v, len(kv) - 1, 0.25)
        assert (found[i : i + 1].double() - expected).abs().max() < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary(dtype):
    tokens, heads, dim = 13, 3, 8
    frequencies = 1.0 / 10000 ** (torch.arange(0, dim, 2) / dim)
    cos, sin = rotary_table(frequencies, tokens, dtype)
    wide = random(tokens, heads + 1, dim, dtype=dtype)
    untouched = wide[:, heads:].clone()
    angles = torch.outer(torch.arange(tokens).float(), frequencies).repeat(1, 2)
    x = wide[:, :heads].clone()
    expected, _ = apply_rotary_pos_emb(
        x.transpose(0, 1)[None], x.transpose(0, 1)[None], angles.cos().to(dtype)[None], angles.sin().to(dtype)[None]
    )
    REFERENCE.rotary_(wide[:, :heads], cos, sin)
    assert (wide[:, :heads] - expected[0].transpose(0, 1)).abs().max() < TOLERANCE[dtype]
    assert torch.equal(wide[:, heads:], untouched)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_and_gate(dtype):
    x, residual, weight = (
        random(5, 17, dtype=dtype),
        random(5, 17, dtype=dtype, seed=1),
        random(17, dtype=dtype, seed=2),
    )

    def rms(t: torch.Tensor) -> torch.Tensor:
        t = t.double()
        return t / (t.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()

    assert (REFERENCE.rms_norm(x, weight, 1e-5).double() - rms(x)).abs().max() < TOLERANCE[dtype]
    normed, total = REFERENCE.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, residual + x)
    assert (normed.double() - rms(total)).abs().max() < TOLERANCE[dtype]
    gate, up = random(5, 9, dtype=dtype, seed=3), random(5, 9, dtype=dtype, seed=4)
    expected = gate.double() * gate.double().sigmoid() * up.double()
    assert (REFERENCE.silu_mul(torch.cat((gate, up), 1)).double() - expected).abs().max() < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [1, 7, 65])
def test_linear(tokens, bias, dtype):
    x, weight = random(tokens, 33, dtype=dtype) / 6, random(50, 33, dtype=dtype, seed=1)
    offset = random(50, dtype=dtype, seed=2) if bias else None
    found = Linear(weight, offset)(x)
    expected = x.double() @ weight.double().T + (0 if offset is None else offset.double())
    assert found.dtype == dtype
    assert (found.double() - expected).abs().max() < TOLERANCE[dtype]


def test_linear_does_not_lower_precision():
    """oneDNN may be told to compute float32 in bfloat16: path equality would be lost without a word."""
    x, weight = random(9, 512), random(64, 512, seed=1)
    assert (Linear(weight)(x).double() - x.double() @ weight.double().T).abs().max() < 1e-4


def test_every_device_has_operations():
    assert ops_for(torch.device("cpu")) is ops_for(torch.device("meta")) is REFERENCE
