"""Serving, end to end: clusters of ours and peers given by URL, side by side, by one client in one run.

For each system: TTFT of single prompts, single-stream decode, throughput at fixed concurrency, and goodput under two
targets. One system at a time: a peer with a --peer-command is started for its turn and ended after it, because some
spin when idle. Leave the machine alone while it runs; what others used of the cores is in the result.

    python bench/serving.py                                       # ours: 1p1d, 1p1d-overflow, 2mixed, 1mixed-2t
    python bench/serving.py --systems 1mixed-2t --peer vllm-cpu=http://127.0.0.1:8100 \\
        --peer-command vllm-cpu='vllm serve DIR --port 8100'
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import LAYOUTS, OUTPUT_TOKENS, PROMPT_TOKENS, client, peer_process, serve_arguments, tokenizer, write

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
PARTS = ("single", "closed", "goodput")
OURS = "distserve "
"""How the names of our own systems begin in the result."""


@dataclass(frozen=True, slots=True)
class Load:
    """The workload, and how much of it."""

    tokenizer: Path
    words: VocabularyWords
    seed: int
    repeats: int
    window_s: float
    start_rate: float
    prompts: Path | None
    parts: tuple[str, ...]

    def asks(self, prompt_tokens: int, output_tokens: int, number: int) -> Iterator[Ask]:
        return iter(RandomPrompts(self.words, prompt_tokens, output_tokens, self.seed * 7919 + number))


async def measure(target: Client, load: Load, pids: tuple[int, ...]) -> dict[str, Any]:
    """Everything about one system, which nobody else uses meanwhile."""
    if error := await warm_up(target, load.asks(64, 8, 0), 3):
        raise SystemExit(f"{target.target}: a warm-up request failed: {error}")
    result: dict[str, Any] = {}
    if "single" in load.parts:
        result["single"] = await single(target, load)
    if "closed" in load.parts:
        result["closed"] = {str(n): await closed(target, load, n, pids) for n in CONCURRENCIES}
    if "goodput" in load.parts and load.window_s > 0:
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
        target, load, goodput=True, rate=load.start_rate, duration_s=load.window_s, slo=slo, most_rate=50.0,
        least_requests=20, server_pids=pids,
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
    return Plan(
        client=target, tokenizer=load.tokenizer, seed=load.seed, warmup=0, prompt_tokens=PROMPT_TOKENS,
        max_tokens=OUTPUT_TOKENS, **fields,
    )  # fmt: skip


def _url(target: Client) -> str:
    return f"http://{target.target.host}:{target.target.port}{target.target.path}"


def speeds(result: Mapping[str, Any]) -> dict[str, float]:
    """The figures of one system that are compared, each the larger the better."""
    found: dict[str, float] = {}
    for name, value in result.get("single", {}).items():
        found[name if name.startswith("decode") else f"1 / {name}"] = value if name.startswith("decode") else 1 / value
    for concurrency, run in result.get("closed", {}).items():
        found[f"output tokens/s at {concurrency}"] = run["output_token_rate"]
    for slo, run in result.get("goodput", {}).items():
        found[f"goodput, {slo}"] = run["rate"] or 0.0
    return found


def against(systems: Mapping[str, Any]) -> dict[str, Any]:
    """For each figure the best peer, and each of our systems over it. Empty without peers."""
    measured = {name: speeds(result) for name, result in systems.items()}
    peers = {name: found for name, found in measured.items() if not name.startswith(OURS)}
    table: dict[str, Any] = {}
    for figure in dict.fromkeys(figure for found in peers.values() for figure in found):
        best = max((name for name in peers if figure in peers[name]), key=lambda name: peers[name][figure])
        bar = peers[best][figure]
        over = {n: round(f[figure] / bar, 3) for n, f in measured.items() if n not in peers and figure in f and bar > 0}
        table[figure] = {"best_peer": best, "ours_over_it": over}
    return table


def run_peer(args: argparse.Namespace, load: Load, name: str, url: str, model: str) -> dict[str, Any]:
    """One peer's turn, started for it if there is a command."""
    target, command = client(url, model), dict(args.peer_command).get(name)
    print(f"{name} at {url}", flush=True)
    if command is None:
        return {"url": url, **asyncio.run(measure(target, load, ()))}
    with peer_process(command, target) as (pid, start_s):
        print(f"  ready after {start_s:.0f} s", flush=True)
        return {"url": url, "start_s": round(start_s, 1), **asyncio.run(measure(target, load, (pid,)))}


def run_ours(args: argparse.Namespace, load: Load, layout: str) -> dict[str, Any]:
    print(f"{OURS}{layout}", flush=True)
    with Cluster([*serve_arguments(layout, args.model, args.dtype), "--model-name", "bench"]) as cluster:
        pids = tuple(cluster.ready["pids"])
        result = asyncio.run(measure(client(cluster.http_url, "bench"), load, pids))
        return {"start_s": cluster.ready["start_s"], **result}


def main() -> None:
    args = arguments()
    file = tokenizer(args.model)
    words, parts = VocabularyWords(file), tuple(args.parts)
    load = Load(file, words, args.seed, args.repeats, args.window, args.start_rate, args.prompts, parts)
    systems: dict[str, Any] = {}
    watch = CpuWatch()
    workload = {"prompt_tokens": PROMPT_TOKENS, "output_tokens": OUTPUT_TOKENS, "seed": args.seed}
    about = {"model": args.model, "dtype": args.dtype, "workload": workload}

    def keep(name: str, result: dict[str, Any]) -> None:
        """Written after each system: a run that is cut short keeps what it measured."""
        systems[name] = result
        write(args.name, {**about, "cores": watch.stop(), "against": against(systems), "systems": systems})

    for name, url, model in args.peer:
        keep(name, run_peer(args, load, name, url, model))
    for layout in args.systems:
        keep(f"{OURS}{layout}", run_ours(args, load, layout))
    for figure, row in against(systems).items():
        print(f"{figure}: best peer {row['best_peer']}; ours over it {row['ours_over_it']}", flush=True)


def peer(text: str) -> tuple[str, str, str]:
    """NAME=URL or NAME=URL,MODEL."""
    name, _, rest = text.partition("=")
    url, _, model = rest.partition(",")
    return name, url, model or "smollm2"


def peer_command(text: str) -> tuple[str, str]:
    """NAME=COMMAND."""
    name, _, command = text.partition("=")
    return name, command


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="*", default=list(LAYOUTS), choices=list(LAYOUTS), help="layouts of ours")
    parser.add_argument("--peer", action="append", default=[], type=peer, metavar="NAME=URL[,MODEL]")
    parser.add_argument(
        "--peer-command", action="append", default=[], type=peer_command, metavar="NAME=COMMAND",
        help="start that peer for its turn, and end it (its whole process group) after it",
    )  # fmt: skip
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS, help="what to measure of each")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--window", type=float, default=30.0, help="seconds of arrivals in a point of the goodput search; 0: no search"
    )
    parser.add_argument("--start-rate", type=float, default=2.0, help="requests/s that the goodput search tries first")
    parser.add_argument("--prompts", type=Path, default=None, help="a requests file of real prompts, measured as well")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--name", default="serving", help="of the file in bench/results")
    args = parser.parse_args()
    if unknown := {name for name, _ in args.peer_command} - {name for name, _, _ in args.peer}:
        parser.error(f"--peer-command for {', '.join(sorted(unknown))}, of which no --peer says the URL")
    return args


if __name__ == "__main__":
    main()
