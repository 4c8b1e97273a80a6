"""What the cluster costs per token: TPOT through gateway, gRPC and streams, over the bare engine loop's, at batch 8.

Both run the same prompts' lengths with the same threads, in turns, so that a busy moment hurts both. Counted are the
steps in which all streams decode: from the last stream's first token to the first stream's last.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from common import LAYOUTS, PROMPT_TOKENS, client, serve_arguments, tokenizer, write

from distserve.core.types import Sampling, StepItem, StepPlan
from distserve.engine.config import EngineConfig
from distserve.engine.runner import Engine
from distserve.launch.cluster import Cluster
from distserve.loadgen.client import Record
from distserve.loadgen.words import VocabularyWords
from distserve.loadgen.workload import RandomPrompts

GREEDY = Sampling(temperature=0.0)
ANSWER_TOKENS = 224
"""Long enough that all streams decode together for most of it, though prompts are read one after the other."""

THREADS = {"1p1d": 1, "1p1d-overflow": 1, "2mixed": 1, "1mixed-2t": 2}


def bare_step_s(engine: Engine, batch: int, steps: int) -> float:
    """Median seconds of a decode step of a loop that does nothing but run the engine."""
    size = engine.spec.block_size
    each = -(-(PROMPT_TOKENS + steps + 1) // size)
    tables = [tuple(range(i * each, (i + 1) * each)) for i in range(batch)]
    prompt = tuple(17 + n % 1000 for n in range(PROMPT_TOKENS))
    last = [
        engine.run(StepPlan(1, (StepItem(str(i), 0, prompt, table, True, 0, GREEDY),))).tokens[0][1].id
        for i, table in enumerate(tables)
    ]
    taken = []
    for step in range(steps):
        items = tuple(
            StepItem(str(i), PROMPT_TOKENS + step, (last[i],), tables[i], True, step + 1, GREEDY) for i in range(batch)
        )
        began = time.perf_counter()
        last = [token.id for _, token in engine.run(StepPlan(step + 2, items)).tokens]
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def bare(args: argparse.Namespace) -> None:
    """In a process of its own, as an instance is."""
    config = EngineConfig(model=args.model, dtype=args.dtype, threads=args.threads, kv_tokens=32768)
    engine = Engine.load(config)
    bare_step_s(engine, args.batch, 4)
    print(json.dumps(bare_step_s(engine, args.batch, ANSWER_TOKENS)))


def measure_bare(args: argparse.Namespace, threads: int) -> float:
    own = ["--bare", "--threads", str(threads), "--batch", str(args.batch)]
    own += ["--model", args.model, "--dtype", args.dtype]
    environ = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, __file__, *own], env=environ, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


async def measure_cluster(url: str, words: VocabularyWords, batch: int, seed: int) -> float:
    """Seconds per step seen by the clients while all streams decode."""
    target = client(url, "bench", count_empty=True)
    asks = list(itertools.islice(RandomPrompts(words, PROMPT_TOKENS, ANSWER_TOKENS, seed), batch + 1))
    await target.send(asks.pop())
    records = await asyncio.gather(*(target.send(ask) for ask in asks))
    if errors := [r.error for r in records if not r.ok]:
        raise SystemExit(f"a request failed: {errors[0]}")
    return step_s(records)


def step_s(records: Sequence[Record]) -> float:
    start = max(r.token_times[0] for r in records)
    end = min(r.token_times[-1] for r in records)
    inside = [[t for t in r.token_times if start <= t <= end] for r in records]
    paces = [(times[-1] - times[0]) / (len(times) - 1) for times in inside if len(times) > 1]
    return statistics.median(paces)


def main() -> None:
    args = arguments()
    if args.bare:
        return bare(args)
    words = VocabularyWords(tokenizer(args.model))
    layouts: dict[str, Any] = {}
    for layout in args.layouts:
        bare_s, cluster_s = [], []
        for turn in range(args.turns):
            bare_s.append(measure_bare(args, THREADS[layout]))
            with Cluster([*serve_arguments(layout, args.model, args.dtype), "--model-name", "bench"]) as cluster:
                seeds = range(turn * 10, turn * 10 + 3)
                runs = [asyncio.run(measure_cluster(cluster.http_url, words, args.batch, s)) for s in seeds]
            cluster_s += runs
            shown = ", ".join(f"{s * 1e3:.2f}" for s in runs)
            print(f"{layout}: bare {bare_s[-1] * 1e3:.2f} ms, cluster {shown} ms", flush=True)
        ratio = statistics.median(cluster_s) / statistics.median(bare_s)
        layouts[layout] = {"bare_step_s": bare_s, "cluster_step_s": cluster_s, "ratio": ratio}
        print(f"{layout}: ratio {ratio:.3f}", flush=True)
    write("control_plane", {"model": args.model, "dtype": args.dtype, "batch": args.batch, "layouts": layouts})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layouts", nargs="*", default=["1p1d", "1mixed-2t"], choices=list(LAYOUTS))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
