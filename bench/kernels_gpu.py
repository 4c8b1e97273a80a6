"""How fast each Triton kernel is on this GPU, as a share of what the GPU does at best.

    PYTHONPATH=.:kernels python bench/kernels_gpu.py            # prints a table, writes bench/results/kernels_gpu.json

One command for a machine with an NVIDIA GPU (prepared for Triton 3.6, torch 2.11, Python 3.12). The ceilings are
measured first: a large copy for what moves bytes, a large bfloat16 matrix product for what computes. Attention over
prompts is compared with torch's best ``scaled_dot_product_attention`` as well. ``--quick``: one shape of each.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from distserve_kernels import paged_reference
from distserve_kernels.rotary import rotary_table

DTYPE = torch.bfloat16
HEADS, KV_HEADS, DIM, SIZE, HIDDEN, WIDE, LAYERS = 32, 8, 128, 16, 4096, 14336, 32  # an 8B Llama
RESULT = Path(__file__).resolve().parent / "results" / "kernels_gpu.json"


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel at one shape. ``work``: the bytes it must move, or the multiply-adds it must make, times two."""

    name: str
    shape: str
    unit: str  # "B/s" or "FLOP/s"
    work: float
    run: Callable[[], Any]
    other: Callable[[], float] | None = None  # seconds of the best alternative


@dataclass(frozen=True, slots=True)
class Row:
    """What was measured."""

    name: str
    shape: str
    seconds: float
    achieved: float
    unit: str
    share: float  # of the ceiling
    against_other: float | None  # how many times as fast as the alternative


def seconds(run: Callable[[], Any]) -> float:
    """Median time of one call, by CUDA events, caches flushed between calls."""
    import triton.testing  # this file can be read where there is none

    return float(triton.testing.do_bench(run, warmup=100, rep=400, return_mode="median")) / 1e3


def ceilings() -> dict[str, float]:
    """What the device copies and multiplies, at best, per second."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / seconds(lambda: target.copy_(source))
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=DTYPE) for _ in range(2))
    return {"B/s": copied, "FLOP/s": 2 * 8192**3 / seconds(lambda: a @ b)}


def cases(quick: bool) -> Iterator[Case]:
    """Every kernel at the shapes of an 8B model."""
    from distserve_kernels.triton import decode, gate, kv_move, norm, prefill, rotary, sampling

    rows = [8192] if quick else [32, 2048, 8192]
    for n in rows:
        yield _norm(norm, n)
        yield _gate(gate, n)
        yield _rotary(rotary, n)
    for sequences, length in [(32, 4096)] if quick else [(32, 4096), (1, 4096), (1, 65536), (256, 1024)]:
        yield _decode(decode, sequences, length)
    for tokens, start in [(4096, 0)] if quick else [(4096, 0), (8192, 0), (16384, 0), (2048, 6144)]:
        yield _prefill(prefill, tokens, start)
    for checksum in (False, True):
        yield from _moves(kv_move, checksum)
    for sequences in [64] if quick else [1, 64, 256]:
        yield _sample(sampling, sequences)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=DTYPE)


def _norm(norm: Any, n: int) -> Case:
    x, residual, weight = noise(n, HIDDEN), noise(n, HIDDEN), noise(HIDDEN)
    return Case(
        "add + RMSNorm", f"{n}×{HIDDEN}", "B/s", 4 * x.nbytes, lambda: norm.add_rms_norm(x, residual, weight, 1e-5)
    )


def _gate(gate: Any, n: int) -> Case:
    x = noise(n, 2 * WIDE)
    return Case("SiLU · gate", f"{n}×{WIDE}", "B/s", 1.5 * x.nbytes, lambda: gate.silu_mul(x))


def _rotary(rotary: Any, n: int) -> Case:
    qkv = noise(n, HEADS + 2 * KV_HEADS, DIM)
    frequencies = 1.0 / 500000 ** (torch.arange(0, DIM, 2) / DIM)
    cos, sin = (t.squeeze(1).cuda() for t in rotary_table(frequencies, n, DTYPE))
    positions = torch.arange(n, device="cuda")
    kv = noise(n // SIZE + 1, 2, 2, KV_HEADS, SIZE, DIM)[:, 1]
    slots = torch.randperm(n // SIZE * SIZE, device="cuda")[:n]
    return Case(
        "rotary + KV write", f"{n} tokens, {HEADS}/{KV_HEADS} heads", "B/s", 2 * qkv.nbytes,
        lambda: rotary.rotary_kv_write(qkv, cos, sin, positions, kv, slots),
    )  # fmt: skip


def _paged(sequences: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One layer of a pool of two layers, and tables of blocks in no order."""
    need = -(-length // SIZE)
    kv = noise(sequences * need, 2, 2, KV_HEADS, SIZE, DIM)[:, 1]
    return kv, torch.randperm(sequences * need, device="cuda").view(sequences, need).int()


def _decode(decode: Any, sequences: int, length: int) -> Case:
    kv, tables = _paged(sequences, length)
    q = noise(sequences, HEADS, DIM)
    lengths = torch.full((sequences,), length, dtype=torch.int32, device="cuda")
    moved = 2 * sequences * length * KV_HEADS * DIM * kv.element_size() + 2 * q.nbytes
    return Case(
        "decode attention", f"{sequences}×{length}", "B/s", moved,
        lambda: decode.paged_decode_attention(q, kv, tables, lengths, DIM**-0.5, length),
    )  # fmt: skip


def _prefill(prefill: Any, tokens: int, start: int) -> Case:
    kv, tables = _paged(1, start + tokens)
    q = noise(tokens, HEADS, DIM)
    firsts = torch.tensor([0, tokens], dtype=torch.int32, device="cuda")
    starts = torch.tensor([start], dtype=torch.int32, device="cuda")
    pairs = tokens * start + tokens * (tokens + 1) / 2
    return Case(
        "prefill attention", f"{tokens} after {start}", "FLOP/s", 4 * pairs * HEADS * DIM,
        lambda: prefill.paged_prefill_attention(q, kv, tables, firsts, starts, DIM**-0.5, tokens),
        other=None if start else lambda: best_sdpa(tokens),
    )  # fmt: skip


def best_sdpa(tokens: int) -> float:
    """Seconds of torch's fastest causal attention at this length, KV contiguous and heads grouped."""
    q, k, v = (noise(1, heads, tokens, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    times = []
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        try:
            with sdpa_kernel(backend):
                times.append(seconds(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)))
        except RuntimeError as error:
            print(f"  {backend.name} does not run here: {str(error).splitlines()[0]}")
    return min(times)


def _moves(kv_move: Any, checksum: bool) -> Iterator[Case]:
    pool = noise(1024, LAYERS, 2, KV_HEADS, SIZE, DIM)
    blocks = torch.randperm(1024, device="cuda")[:256].int()
    said = " + checksum" if checksum else ""
    for heads in (range(KV_HEADS), range(2, 4)):
        staging = noise(256, LAYERS, 2, len(heads), SIZE, DIM)
        shape = f"4096 tokens, {len(heads)} of {KV_HEADS} heads"
        asked = (pool, blocks, range(LAYERS), heads, staging, checksum)
        yield Case("KV gather" + said, shape, "B/s", 2 * staging.nbytes, lambda a=asked: kv_move.kv_gather(*a))  # type: ignore[misc]
        yield Case("KV scatter" + said, shape, "B/s", 2 * staging.nbytes, lambda a=asked: kv_move.kv_scatter(*a))  # type: ignore[misc]


def _sample(sampling: Any, sequences: int) -> Case:
    scores = torch.randn(sequences, 128_256, device="cuda") * 4
    heat, top_p, min_p, points = (
        torch.full((sequences,), x, device="cuda", dtype=torch.float64) for x in (0.8, 0.95, 0.0, 0.3)
    )
    top_k = torch.full((sequences,), 50, device="cuda", dtype=torch.int32)
    asked = (scores, heat, top_k, top_p, min_p, points)
    return Case(
        "sampling, top-k 50, top-p 0.95", f"{sequences}×128256", "B/s", scores.nbytes, lambda: sampling.sample(*asked),
        other=lambda: seconds(lambda: paged_reference.sample(*asked)),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one shape of each kernel")
    parser.add_argument("--json", type=Path, default=RESULT, help="where the result goes")
    parsed = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("kernels_gpu: there is no CUDA device here; run it on a machine with an NVIDIA GPU")
    tops = ceilings()
    copies, multiplies = tops["B/s"] / 1e12, tops["FLOP/s"] / 1e12
    print(f"{torch.cuda.get_device_name()}: copies {copies:.2f} TB/s, multiplies {multiplies:.0f} TFLOP/s")
    rows = [measured(case, tops) for case in cases(parsed.quick)]
    write(parsed.json, tops, rows)


def measured(case: Case, tops: dict[str, float]) -> Row:
    """Run one case and print its line."""
    took = seconds(case.run)
    achieved = case.work / took
    ratio = case.other() / took if case.other else None
    row = Row(case.name, case.shape, took, achieved, case.unit, achieved / tops[case.unit], ratio)
    beside = f"   {ratio:.2f}× the alternative" if ratio else ""
    print(
        f"{case.name:32} {case.shape:26} {took * 1e6:10.1f} µs {achieved / 1e12:8.2f} T{case.unit:6} "
        f"{row.share:6.1%}{beside}",
        flush=True,
    )
    return row


def write(path: Path, tops: dict[str, float], rows: list[Row]) -> None:
    import triton

    document = {
        "kind": "measured",
        "when": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "hardware": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda},
        "dtype": str(DTYPE),
        "ceilings": tops,
        "rows": [asdict(row) for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
