"""How fast each Triton kernel is on this GPU, as a share of what the GPU does at best; then an 8B model end to end, and
KV between two processes.

    PYTHONPATH=.:kernels python bench/kernels_gpu.py

One command for a machine with an NVIDIA GPU (``gpu.py`` runs the tests as well); not run yet (prepared for Triton 3.6,
torch 2.11, Python 3.12). It prints tables and writes bench/results/kernels_gpu.json, engine_gpu.json and ipc_gpu.json.
The ceilings are measured first: a large copy for what moves bytes, a large bfloat16 matrix product for what computes.
Attention over prompts is compared with torch's best ``scaled_dot_product_attention``. Goals are printed beside what
they are for. ``--only kernels``, ``engine`` or ``ipc``: one part.

``--dry`` runs every line on tiny shapes in Triton's interpreter, on a CPU, and writes nothing: its times mean nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import engine_gpu
import ipc_gpu
import torch
import torch.nn.functional as F
from gpu_common import DRY, LLAMA_8B, Shapes, about_device, ceilings, seconds, write
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from distserve_kernels import paged_reference
from distserve_kernels.rotary import rotary_table

PARTS = ("kernels", "engine", "ipc")
RUN = "PYTHONPATH=.:kernels TRITON_INTERPRET=1 python bench/kernels_gpu.py --dry"


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel at one shape. ``work``: the bytes it must move, or the multiply-adds it must make, times two."""

    name: str
    shape: str
    unit: str  # "B/s" or "FLOP/s"
    work: float
    run: Callable[[], Any]
    goal: float | None = None  # share of the ceiling, or of the alternative's speed where there is one
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
    goal: float | None
    met: bool | None


def cases(shapes: Shapes) -> Iterator[Case]:
    """Every kernel at the shapes of the model."""
    from distserve_kernels.triton import decode, gate, kv_move, norm, prefill, rotary, sampling

    for n in shapes.rows:
        goal = 0.85 if n == max(shapes.rows) else None  # few rows fill no GPU
        yield _norm(norm, shapes, n, goal)
        yield _gate(gate, shapes, n, goal)
        yield _rotary(rotary, shapes, n, goal)
    for sequences, length in shapes.decode:
        yield _decode(decode, shapes, sequences, length, 0.8 if (sequences, length) == shapes.decode[0] else None)
    for tokens, start in shapes.prefill:
        yield _prefill(prefill, shapes, tokens, start)
    for checksum in (False, True):
        yield from _moves(kv_move, shapes, checksum)
    for sequences in shapes.sampled:
        yield _sample(sampling, shapes, sequences)


def noise(shapes: Shapes, *shape: int) -> Tensor:
    return torch.randn(*shape, device=shapes.device, dtype=shapes.dtype)


def _norm(norm: Any, s: Shapes, n: int, goal: float | None) -> Case:
    x, residual, weight = noise(s, n, s.hidden), noise(s, n, s.hidden), noise(s, s.hidden)
    moved = 4 * x.nbytes
    return Case(
        "add + RMSNorm", f"{n}×{s.hidden}", "B/s", moved, lambda: norm.add_rms_norm(x, residual, weight, 1e-5), goal
    )


def _gate(gate: Any, s: Shapes, n: int, goal: float | None) -> Case:
    x = noise(s, n, 2 * s.wide)
    return Case("SiLU · gate", f"{n}×{s.wide}", "B/s", 1.5 * x.nbytes, lambda: gate.silu_mul(x), goal)


def _rotary(rotary: Any, s: Shapes, n: int, goal: float | None) -> Case:
    qkv = noise(s, n, s.heads + 2 * s.kv_heads, s.dim)
    frequencies = 1.0 / 500000 ** (torch.arange(0, s.dim, 2) / s.dim)
    cos, sin = (t.squeeze(1).to(s.device) for t in rotary_table(frequencies, n, s.dtype))
    positions = torch.arange(n, device=s.device)
    kv = noise(s, n // s.size + 1, 2, 2, s.kv_heads, s.size, s.dim)[:, 1]
    slots = torch.randperm((n // s.size + 1) * s.size, device=s.device)[:n]
    return Case(
        "rotary + KV write", f"{n} tokens, {s.heads}/{s.kv_heads} heads", "B/s", 2 * qkv.nbytes,
        lambda: rotary.rotary_kv_write(qkv, cos, sin, positions, kv, slots), goal,
    )  # fmt: skip


def _paged(s: Shapes, sequences: int, length: int) -> tuple[Tensor, Tensor]:
    """One layer of a pool of two layers, and tables of blocks in no order."""
    need = -(-length // s.size)
    kv = noise(s, sequences * need, 2, 2, s.kv_heads, s.size, s.dim)[:, 1]
    return kv, torch.randperm(sequences * need, device=s.device).view(sequences, need).int()


def _decode(decode: Any, s: Shapes, sequences: int, length: int, goal: float | None) -> Case:
    kv, tables = _paged(s, sequences, length)
    q = noise(s, sequences, s.heads, s.dim)
    lengths = torch.full((sequences,), length, dtype=torch.int32, device=s.device)
    moved = 2 * sequences * length * s.kv_heads * s.dim * kv.element_size() + 2 * q.nbytes
    return Case(
        "decode attention", f"{sequences}×{length}", "B/s", moved,
        lambda: decode.paged_decode_attention(q, kv, tables, lengths, s.dim**-0.5, length), goal,
    )  # fmt: skip


def _prefill(prefill: Any, s: Shapes, tokens: int, start: int) -> Case:
    kv, tables = _paged(s, 1, start + tokens)
    q = noise(s, tokens, s.heads, s.dim)
    firsts = torch.tensor([0, tokens], dtype=torch.int32, device=s.device)
    starts = torch.tensor([start], dtype=torch.int32, device=s.device)
    pairs = tokens * start + tokens * (tokens + 1) / 2
    return Case(
        "prefill attention", f"{tokens} after {start}", "FLOP/s", 4 * pairs * s.heads * s.dim,
        lambda: prefill.paged_prefill_attention(q, kv, tables, firsts, starts, s.dim**-0.5, tokens),
        None if start else 0.8, None if start else lambda: best_sdpa(s, tokens),
    )  # fmt: skip


def best_sdpa(s: Shapes, tokens: int) -> float:
    """Seconds of torch's fastest causal attention at this length, KV contiguous and heads grouped."""
    q, k, v = (noise(s, 1, heads, tokens, s.dim) for heads in (s.heads, s.kv_heads, s.kv_heads))
    times = []
    on_gpu = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
    for backend in (SDPBackend.MATH,) if s.dry else on_gpu:
        try:
            with sdpa_kernel(backend):
                attend = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # noqa: E731
                times.append(seconds(attend, s))
        except RuntimeError as error:
            print(f"  {backend.name} does not run here: {str(error).splitlines()[0]}")
    return min(times)


def _moves(kv_move: Any, s: Shapes, checksum: bool) -> Iterator[Case]:
    count = s.moved_blocks
    pool = noise(s, 4 * count, s.layers, 2, s.kv_heads, s.size, s.dim)
    blocks = torch.randperm(4 * count, device=s.device)[:count].int()
    said = " + checksum" if checksum else ""
    for heads in (range(s.kv_heads), range(s.kv_heads // 4, s.kv_heads // 2)):
        staging = noise(s, count, s.layers, 2, len(heads), s.size, s.dim)
        shape = f"{count * s.size} tokens, {len(heads)} of {s.kv_heads} heads"
        goal = 0.8 if len(heads) == s.kv_heads and not checksum else None
        asked = (pool, blocks, range(s.layers), heads, staging, checksum)
        work = 2 * staging.nbytes
        for name, move in (("KV gather", kv_move.kv_gather), ("KV scatter", kv_move.kv_scatter)):
            yield Case(name + said, shape, "B/s", work, lambda run=move, a=asked: run(*a), goal)  # type: ignore[misc]


def _sample(sampling: Any, s: Shapes, sequences: int) -> Case:
    scores = torch.randn(sequences, s.vocab, device=s.device) * 4
    heat, top_p, min_p, points = (
        torch.full((sequences,), x, device=s.device, dtype=torch.float64) for x in (0.8, 0.95, 0.0, 0.3)
    )
    top_k = torch.full((sequences,), 50, device=s.device, dtype=torch.int32)
    asked = (scores, heat, top_k, top_p, min_p, points)
    return Case(
        "sampling, top-k 50, top-p 0.95", f"{sequences}×{s.vocab}", "B/s", scores.nbytes,
        lambda: sampling.sample(*asked), other=lambda: seconds(lambda: paged_reference.sample(*asked), s),
    )  # fmt: skip


def measured(case: Case, shapes: Shapes, tops: dict[str, float]) -> Row:
    """Run one case and print its line."""
    took = seconds(case.run, shapes)
    achieved = case.work / took
    share, ratio = achieved / tops[case.unit], case.other() / took if case.other else None
    reached = share if ratio is None else ratio
    met = None if case.goal is None or shapes.dry else reached >= case.goal
    row = Row(case.name, case.shape, took, achieved, case.unit, share, ratio, case.goal, met)
    beside = f"   {ratio:.2f}× the alternative" if ratio else ""
    goal = f"   goal {case.goal:.2f}{'' if met is None else ', met' if met else ', NOT met'}" if case.goal else ""
    print(
        f"{case.name:32} {case.shape:26} {took * 1e6:10.1f} µs {achieved / 1e12:8.2f} T{case.unit:6} "
        f"{row.share:6.1%}{beside}{goal}",
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, help="one part")
    parser.add_argument("--dry", action="store_true", help="tiny shapes, interpreted on a CPU; nothing is written")
    parsed = parser.parse_args()
    shapes = DRY if parsed.dry else LLAMA_8B
    if not parsed.dry and not torch.cuda.is_available():
        raise SystemExit(f"kernels_gpu: there is no CUDA device here; to see that it would run: {RUN}")
    about, tops = about_device(shapes), ceilings(shapes)
    copies, multiplies = tops["B/s"] / 1e12, tops["FLOP/s"] / 1e12
    print(f"{about['gpu']}: copies {copies:.2f} TB/s, multiplies {multiplies:.0f} TFLOP/s")
    measured_here = {"device": about, "dtype": str(shapes.dtype), "ceilings": tops}
    for part in PARTS if parsed.only is None else (parsed.only,):
        found = part_of(part, shapes, tops)
        if not parsed.dry:
            write(f"{part}_gpu", measured_here | found)


def part_of(part: str, shapes: Shapes, tops: dict[str, float]) -> dict[str, Any]:
    """Measure one part and print its lines."""
    match part:
        case "kernels":
            return {"rows": [asdict(measured(case, shapes, tops)) for case in cases(shapes)]}
        case "engine":
            return engine_gpu.measure(shapes, tops["B/s"])
        case _:
            return {"moves": ipc_gpu.measure(shapes, tops["B/s"])}


if __name__ == "__main__":
    main()
