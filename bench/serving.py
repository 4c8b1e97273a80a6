"""Serving, end to end: clusters of ours and peers given by URL, side by side, by one client in one run.

For each system: TTFT of single prompts, single-stream decode, throughput at fixed concurrency, and goodput under two
targets. Leave the machine alone while it runs; what others used of the cores is in the result.

    python bench/serving.py                                       # ours: 1p1d, 2mixed, 1mixed-2t
    python bench/serving.py --systems 1mixed-2t --peer vllm-cpu=http://127.0.0.1:8100
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import LAYOUTS, OUTPUT_TOKENS, PROMPT_TOKENS, client, serve_arguments, tokenizer, write

from distserve.launch.cluster import Cluster
from distserve.loadgen.bench import Bench, Plan
from distserve.loadgen.client import Client
from distserve.loadgen.machine import CpuWatch
from distserve.loadgen.run import warm_up
from distserve.loadgen.stats import Slo
from distserve.loadgen.words import VocabularyWords
from distserve.loadgen.workload import Ask, RandomPrompts

TARGETS = {"ttft=1.0,tpot=0.1": Slo(1.0, 0.1), "ttft=1.5,tpot=0.15": Slo(1.5, 0.15)}
SINGLE_LENGTHS = (128, 512, 1024)
CONCURRENCIES = (1, 4, 8, 16)


@dataclass(frozen=True, slots=True)
class Load:
    """The workload, and how much of it."""

    tokenizer: Path
    words: VocabularyWords
    seed: int
    repeats: int
    window_s: float
    prompts: Path | None

    def asks(self, prompt_tokens: int, output_tokens: int, number: int) -> Iterator[Ask]:
        return iter(RandomPrompts(self.words, prompt_tokens, output_tokens, self.seed * 7919 + number))


async def measure(target: Client, load: Load, pids: tuple[int, ...]) -> dict[str, Any]:
    """Everything about one system, which nobody else uses meanwhile."""
    if error := await warm_up(target, load.asks(64, 8, 0), 3):
        raise SystemExit(f"{target.target}: a warm-up request failed: {error}")
    result: dict[str, Any] = {"single": await single(target, load)}
    result["closed"] = {str(n): await closed(target, load, n, pids) for n in CONCURRENCIES}
    if load.window_s > 0:
        result["goodput"] = {name: await goodput(target, load, slo, pids) for name, slo in TARGETS.items()}
    if load.prompts is not None:
        result["real_prompts"] = await real_prompts(target, load, pids)
    return result


async def single(target: Client, load: Load) -> dict[str, Any]:
    """TTFT of one prompt alone at several lengths, and the pace of one stream alone."""
    found: dict[str, Any] = {}
    for tokens in SINGLE_LENGTHS:
        asks = load.asks(tokens, 4, 1000 + tokens)
        records = [await target.send(next(asks)) for _ in range(load.repeats)]
        found[f"ttft_{tokens}_s"] = statistics.median(r.ttft_s for r in records if r.ok)
        print(f"  TTFT of {tokens} tokens: {found[f'ttft_{tokens}_s']:.3f} s", flush=True)
    asks = load.asks(32, 128, 2000)
    records = [await target.send(next(asks)) for _ in range(load.repeats)]
    found["decode_tokens_per_s"] = statistics.median(1 / r.tpot_s for r in records if r.ok)
    print(f"  one stream: {found['decode_tokens_per_s']:.1f} tokens/s", flush=True)
    return found


async def closed(target: Client, load: Load, concurrency: int, pids: tuple[int, ...]) -> dict[str, Any]:
    plan = plan_of(target, load, concurrency=concurrency, num_requests=max(4, 3 * concurrency), server_pids=pids)
    document = await Bench(plan, lambda _: None, print).run()
    s = document["results"]
    print(
        f"  {concurrency:2d} at once: {s['output_token_rate']:6.1f} output tokens/s, "
        f"TTFT p50 {s['ttft_s']['p50']:.2f} s, TPOT p50 {s['tpot_s']['p50']:.3f} s, cores {document['cores']}",
        flush=True,
    )
    return {**s, "cores": document["cores"]}


async def goodput(target: Client, load: Load, slo: Slo, pids: tuple[int, ...]) -> dict[str, Any]:
    plan = plan_of(
        target, load, goodput=True, rate=0.5, duration_s=load.window_s, slo=slo, most_rate=50.0, least_requests=20,
        server_pids=pids,
    )  # fmt: skip
    document = await Bench(plan, lambda _: None, lambda words: print("  " + words, flush=True)).run()
    found = document["results"]
    print(f"  goodput {found['rate']:.2f} req/s (fails at {found['fails_at']})", flush=True)
    return {**found, "cores": document["cores"]}


async def real_prompts(target: Client, load: Load, pids: tuple[int, ...]) -> dict[str, Any]:
    """Prompts that people wrote, at a modest rate; answers may end early."""
    natural = client(_url(target), target.model, ignore_eos=False)
    plan = plan_of(natural, load, requests=load.prompts, rate=0.5, duration_s=2 * load.window_s, server_pids=pids)
    document = await Bench(plan, lambda _: None, print).run()
    return {**document["results"], "cores": document["cores"]}


def plan_of(target: Client, load: Load, **fields: Any) -> Plan:
    lengths = {"prompt_tokens": PROMPT_TOKENS, "max_tokens": OUTPUT_TOKENS}
    return Plan(client=target, tokenizer=load.tokenizer, seed=load.seed, warmup=0, **lengths, **fields)


def _url(target: Client) -> str:
    return f"http://{target.target.host}:{target.target.port}{target.target.path}"


def main() -> None:
    args = arguments()
    file = tokenizer(args.model)
    load = Load(file, VocabularyWords(file), args.seed, args.repeats, args.window, args.prompts)
    systems: dict[str, Any] = {}
    watch = CpuWatch()
    workload = {"prompt_tokens": PROMPT_TOKENS, "output_tokens": OUTPUT_TOKENS, "seed": args.seed}
    about = {"model": args.model, "dtype": args.dtype, "workload": workload}

    def keep(name: str, result: dict[str, Any]) -> None:
        """Written after each system: a run that is cut short keeps what it measured."""
        systems[name] = result
        write(args.name, {**about, "cores": watch.stop(), "systems": systems})

    for name, url, model in args.peer:
        print(f"{name} at {url}", flush=True)
        keep(name, {"url": url, **asyncio.run(measure(client(url, model), load, ()))})
    for layout in args.systems:
        print(f"distserve {layout}", flush=True)
        with Cluster([*serve_arguments(layout, args.model, args.dtype), "--model-name", "bench"]) as cluster:
            pids = tuple(cluster.ready["pids"])
            result = asyncio.run(measure(client(cluster.http_url, "bench"), load, pids))
            keep(f"distserve {layout}", {"start_s": cluster.ready["start_s"], **result})


def peer(text: str) -> tuple[str, str, str]:
    """NAME=URL or NAME=URL,MODEL."""
    name, _, rest = text.partition("=")
    url, _, model = rest.partition(",")
    return name, url, model or "smollm2"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="*", default=list(LAYOUTS), choices=list(LAYOUTS), help="layouts of ours")
    parser.add_argument("--peer", action="append", default=[], type=peer, metavar="NAME=URL[,MODEL]")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--window", type=float, default=30.0, help="seconds of arrivals in a point of the goodput search; 0: no search"
    )
    parser.add_argument("--prompts", type=Path, default=None, help="a requests file of real prompts, measured as well")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--name", default="serving", help="of the file in bench/results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
