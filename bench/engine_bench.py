"""How fast one engine computes: prefill at several lengths, decode at several batch sizes, beside the memory's speed.

Runs the bare engine, no scheduler and no network. Prints a table, or JSON with --json. Figures are the best of a few
repeats: a shared machine only ever makes them worse.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass

import torch

from distserve.core.types import Sampling, StepItem, StepPlan
from distserve.engine.config import DTYPES, EngineConfig
from distserve.engine.runner import Engine

GREEDY = Sampling(temperature=0.0)
CONTEXT = 263  # tokens each decoding sequence has behind it


@dataclass(frozen=True, slots=True)
class Prefill:
    tokens: int
    seconds: float
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Decode:
    batch: int
    step_s: float
    tokens_per_s: float
    bandwidth_share: float  # bytes of weights and KV read a second, over what a plain read reaches


def main() -> None:
    args = _arguments()
    engine = Engine.load(
        EngineConfig(
            model=args.model,
            dtype=args.dtype,
            threads=args.threads,
            kv_tokens=args.kv_tokens,
            block_size=args.block_size,
        )
    )
    read_rate = measure_read_rate()
    prefill = [measure_prefill(engine, n, args.repeats) for n in args.prefill]
    decode = [measure_decode(engine, b, args.repeats * 4, engine.weight_bytes, read_rate) for b in args.decode]
    if args.json:
        print(
            json.dumps(
                {
                    "model": args.model,
                    "dtype": args.dtype,
                    "threads": torch.get_num_threads(),
                    "read_bytes_per_s": read_rate,
                    "prefill": [asdict(p) for p in prefill],
                    "decode": [asdict(d) for d in decode],
                }
            )
        )
        return
    print(f"{args.model} {args.dtype}, {torch.get_num_threads()} threads, memory read {read_rate / 1e9:.1f} GB/s")
    for p in prefill:
        print(f"prefill {p.tokens:5d} tokens  {p.seconds * 1e3:8.1f} ms  {p.tokens_per_s:8.0f} tok/s")
    for d in decode:
        print(
            f"decode  batch {d.batch:4d}   {d.step_s * 1e3:8.2f} ms  {d.tokens_per_s:8.1f} tok/s"
            f"  {d.bandwidth_share:5.0%} of memory bandwidth"
        )


def measure_prefill(engine: Engine, tokens: int, repeats: int) -> Prefill:
    """The best time of one whole prompt of ``tokens``, first token included."""
    blocks = tuple(range(-(-tokens // engine.spec.block_size)))
    ids = tuple(torch.randint(3, engine.spec.vocab_size, (tokens,)).tolist())
    plan = StepPlan(1, (StepItem("a", 0, ids, blocks, True, 0, GREEDY),))
    best = min(_timed(engine, plan) for _ in range(repeats + 1))
    return Prefill(tokens, best, tokens / best)


def measure_decode(engine: Engine, batch: int, repeats: int, weight_bytes: int, read_rate: float) -> Decode:
    """The best time of one step of ``batch`` sequences that each have CONTEXT tokens of KV."""
    size = engine.spec.block_size
    each = -(-(CONTEXT + 1) // size)
    items = tuple(
        StepItem(str(i), CONTEXT, (17 + i,), tuple(range(i * each, (i + 1) * each)), True, 1, GREEDY)
        for i in range(batch)
    )
    best = min(_timed(engine, StepPlan(1, items)) for _ in range(repeats + 1))
    moved = weight_bytes + batch * (CONTEXT + 1) * engine.pool.block_bytes / size
    return Decode(batch, best, batch / best, moved / best / read_rate)


def measure_read_rate(size_bytes: int = 1 << 28, repeats: int = 5) -> float:
    """Bytes a second of a plain read (a sum) of a tensor larger than any cache, with torch's current threads."""
    tensor = torch.ones(size_bytes // 4)
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        tensor.sum()
        best = min(best, time.perf_counter() - began)
    return size_bytes / best


def _timed(engine: Engine, plan: StepPlan) -> float:
    began = time.perf_counter()
    engine.run(plan)
    return time.perf_counter() - began


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(DTYPES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--kv-tokens", type=int, default=32768)
    parser.add_argument("--prefill", type=int, nargs="*", default=[128, 512, 1024])
    parser.add_argument("--decode", type=int, nargs="*", default=[1, 8, 16, 64])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
