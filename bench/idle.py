"""What a cluster costs when nobody asks anything, before and after load; and how long it takes to become ready."""

from __future__ import annotations

import argparse
import asyncio
import time
from typing import Any

from common import LAYOUTS, client, serve_arguments, tokenizer, write

from distserve.launch.cluster import Cluster
from distserve.loadgen.machine import tree_cpu_s
from distserve.loadgen.run import closed_loop
from distserve.loadgen.words import VocabularyWords
from distserve.loadgen.workload import RandomPrompts


def idle_cores(pids: tuple[int, ...], seconds: float) -> float:
    """CPU seconds per second of all processes of the cluster together."""
    before, began = tree_cpu_s(pids[:1]), time.perf_counter()
    time.sleep(seconds)
    return (tree_cpu_s(pids[:1]) - before) / (time.perf_counter() - began)


def measure(layout: str, args: argparse.Namespace) -> dict[str, Any]:
    began = time.perf_counter()
    with Cluster([*serve_arguments(layout, args.model, args.dtype), "--model-name", "bench"]) as cluster:
        ready_s = time.perf_counter() - began
        pids = tuple(cluster.ready["pids"])
        time.sleep(2.0)
        before = idle_cores(pids, args.seconds)
        asks = iter(RandomPrompts(VocabularyWords(tokenizer(args.model)), 64, 16, 1))
        asyncio.run(closed_loop(client(cluster.http_url, "bench"), asks, 4, 16))
        time.sleep(2.0)
        after = idle_cores(pids, args.seconds)
    print(f"{layout}: ready in {ready_s:.1f} s, idle {before:.2%} of a core, after load {after:.2%}", flush=True)
    return {"command_to_ready_s": ready_s, "idle_cores": before, "idle_cores_after_load": after}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layouts", nargs="*", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seconds", type=float, default=30.0)
    args = parser.parse_args()
    tokenizer(args.model)  # converted before anything is timed
    layouts = {layout: measure(layout, args) for layout in args.layouts}
    write("idle", {"model": args.model, "dtype": args.dtype, "seconds": args.seconds, "layouts": layouts})


if __name__ == "__main__":
    main()
