"""What the GPU measurements share: shapes of a real and of a dry run, the device's ceilings, how time is taken, and how
a result is written. It needs less installed than ``common``: a GPU machine may have no more.
"""

from __future__ import annotations

import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distserve.loadgen.machine import hardware, versions

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True, slots=True)
class Shapes:
    """A model's, and those of the cases. ``dry``: everything tiny, in Triton's interpreter, to see that it runs."""

    dry: bool
    device: str
    dtype: torch.dtype
    layers: int
    hidden: int
    wide: int
    heads: int
    kv_heads: int
    dim: int
    vocab: int
    size: int  # tokens in a block
    rows: tuple[int, ...]  # of norms, gate and rotary
    decode: tuple[tuple[int, int], ...]  # (sequences, context)
    prefill: tuple[tuple[int, int], ...]  # (tokens, cached positions before them)
    moved_blocks: int
    sampled: tuple[int, ...]
    steps: tuple[tuple[int, int], ...]  # (batch, context) of the engine's decode


LLAMA_8B = Shapes(
    dry=False, device="cuda", dtype=torch.bfloat16,
    layers=32, hidden=4096, wide=14336, heads=32, kv_heads=8, dim=128, vocab=128_256, size=16,
    rows=(32, 2048, 8192),
    decode=((32, 4096), (1, 4096), (1, 65536), (256, 1024)),
    prefill=((4096, 0), (8192, 0), (16384, 0), (2048, 6144)),
    moved_blocks=256,
    sampled=(1, 64, 256),
    steps=((1, 1024), (32, 1024), (32, 4096), (256, 1024)),
)  # fmt: skip
DRY = Shapes(
    dry=True, device="cpu", dtype=torch.float32,
    layers=2, hidden=32, wide=48, heads=4, kv_heads=2, dim=8, vocab=64, size=4,
    rows=(3,), decode=((2, 9),), prefill=((5, 0), (3, 4)), moved_blocks=2, sampled=(2,), steps=((1, 6), (3, 5)),
)  # fmt: skip


def seconds(run: Callable[[], Any], shapes: Shapes) -> float:
    """Median time of one call: by CUDA events, caches flushed between calls; dry: of one call, by the clock."""
    if shapes.dry:
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    import triton.testing  # this file can be read where there is none

    return float(triton.testing.do_bench(run, warmup=100, rep=400, return_mode="median")) / 1e3


def ceilings(shapes: Shapes) -> dict[str, float]:
    """What the device copies (bytes read and written) and multiplies, at best, per second."""
    nbytes, side = (1 << 12, 16) if shapes.dry else (1 << 30, 8192)
    source = torch.empty(nbytes, dtype=torch.uint8, device=shapes.device)
    target = torch.empty_like(source)
    copied = 2 * nbytes / seconds(lambda: target.copy_(source), shapes)
    a, b = (torch.randn(side, side, device=shapes.device, dtype=shapes.dtype) for _ in range(2))
    return {"B/s": copied, "FLOP/s": 2 * side**3 / seconds(lambda: a @ b, shapes)}


def about_device(shapes: Shapes) -> dict[str, Any]:
    """The device and the versions that decide its speed, for a result."""
    import triton

    name = "none: a dry run in Triton's interpreter" if shapes.dry else torch.cuda.get_device_name()
    found: dict[str, Any] = {"gpu": name, "triton": triton.__version__, "cuda": torch.version.cuda}
    if not shapes.dry:
        found["driver_memory_gib"] = round(torch.cuda.mem_get_info()[1] / 2**30, 1)
    return found


def write(name: str, body: dict[str, Any]) -> None:
    """One result document, as ``common.write`` makes them: what ran, when, on what; then the body."""
    commit = ""
    with suppress(OSError):
        asked = ["git", "-C", str(RESULTS), "describe", "--always", "--dirty", "--abbrev=12"]
        commit = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=False).stdout.strip()
    document = {
        "kind": "measured",
        "command": shlex.join(["python", f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "commit": commit,
        "when": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": versions(),
        "hardware": hardware(),
        **body,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(document, indent=2) + "\n")
    print(f"written to bench/results/{path.name}", flush=True)


def median(values: list[float]) -> float:
    return statistics.median(values)
