"""What share of the machine's limits the native engine reaches, and where the rest of a step goes.

Shares: a decode step of one sequence in bytes of weights and KV a second, over the best plain read of memory; prompts
of 512 and 1,024 tokens in floating point operations a second, over oneDNN's best matrix product of the same dtype and
threads (``engine_bench`` measures both).

The profile is by difference, since the step is one native call: the model's shape with random weights, again with one
dimension made small (an eighth of the vocabulary or of the MLP, one group of heads, no context), both engines in turns,
the best of each. What the smaller one saves, scaled to the whole dimension, is what that part costs where it stands.
The remainder is what no dimension explains: norms, the residual, threads meeting, the call, sampling, and all errors.

    python bench/roofline.py            # writes results/roofline.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import write
from engine_bench import CONTEXT, GREEDY, Bench, Limits, measure_limits, once

from distserve.core.types import StepItem, StepPlan
from distserve.engine.config import DTYPES, EngineConfig
from distserve.engine.runner import Engine
from distserve.loadgen.machine import CpuWatch
from distserve.models.catalog import RANDOM_PREFIX, resolve_model

GOALS = {"decode of one sequence": 0.70, "prefill of 1024 tokens": 0.60}
PIECE = 16
"""Tokens of the pieces that a prompt is cut into to take the attention out of its step."""


LEAST = 32
"""Small dimensions are multiples of this, the width of a packed panel."""


@dataclass(frozen=True, slots=True)
class Part:
    """``seconds`` of a step that a part of the model costs, and its share of the step it was found in."""

    name: str
    seconds: float
    share: float


@dataclass(frozen=True, slots=True)
class Smaller:
    """A model with less of something: what is taken away, times ``scale``, is the whole of it."""

    name: str
    changes: dict[str, int]
    scale: float


def smaller_models(config: dict[str, Any]) -> list[Smaller]:
    """By one dimension each. Heads shrink to one KV head with its queries, so that groups stay as they are."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    found = []
    for name, key in (("head", "vocab_size"), ("gate, up and down products", "intermediate_size")):
        small = max(LEAST, config[key] // 8 // LEAST * LEAST)
        found.append(Smaller(name, {key: small}, config[key] / (config[key] - small)))
    if kv_heads > 1:
        size = config.get("head_dim") or config["hidden_size"] // heads
        fewer = {"num_attention_heads": heads // kv_heads, "num_key_value_heads": 1, "head_dim": size}
        found.append(Smaller("qkv and out products, and attention", fewer, kv_heads / (kv_heads - 1)))
    return found


def prompt_plan(engine: Engine, tokens: int, piece: int) -> StepPlan:
    """One step of ``tokens`` prompt tokens in sequences of ``piece``; the last of all is sampled."""
    ids = torch.randint(3, engine.spec.vocab_size, (tokens,), generator=torch.Generator().manual_seed(1)).tolist()
    size, items = engine.spec.block_size, []
    for n, first in enumerate(range(0, tokens, piece)):
        part = tuple(ids[first : first + piece])
        each = -(-piece // size)
        blocks = tuple(range(n * each, n * each + -(-len(part) // size)))
        items.append(StepItem(str(n), 0, part, blocks, first + piece >= tokens, 0, GREEDY))
    return StepPlan(1, tuple(items))


def decode_plan(engine: Engine, context: int) -> StepPlan:
    """One sequence's next token behind ``context`` tokens of KV."""
    blocks = tuple(range(-(-(context + 1) // engine.spec.block_size)))
    return StepPlan(1, (StepItem("a", context, (17,), blocks, True, 1, GREEDY),))


def in_turns(work: Sequence[tuple[Engine, StepPlan]], repeats: int) -> list[float]:
    """Best seconds of each step, all taking turns, so that a slow minute hurts all alike."""
    torch.set_num_threads(1)  # only sampling is torch's, as in an instance
    best = [float("inf")] * len(work)
    for _ in range(repeats + 1):
        for i, (engine, plan) in enumerate(work):
            best[i] = min(best[i], once(lambda engine=engine, plan=plan: engine.run(plan)))  # type: ignore[misc]
    return best


class Profile:
    """Steps of the model with random weights, beside models that have less of something."""

    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        self._args, self._scratch = args, scratch
        self._config = json.loads((resolve_model(args.model) / "config.json").read_text())
        self._whole = self._load("whole", {})

    def _load(self, name: str, changes: dict[str, int]) -> Engine:
        folder = self._scratch / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(self._config | changes))
        args = self._args
        return Engine.load(
            EngineConfig(
                model=f"{RANDOM_PREFIX}{folder}", dtype=args.dtype, threads=args.threads, kv_tokens=2048,
                kernels="native",
            )
        )  # fmt: skip

    def steps(self, lengths: Sequence[int]) -> dict[str, Any]:
        """The parts of a decode step of one sequence and of each prompt length, most expensive first."""
        shapes = {"decode of one sequence": 0, **{f"prefill of {n} tokens": n for n in lengths}}
        found: dict[str, list[tuple[str, float, float]]] = {shape: [] for shape in shapes}
        for number, less in enumerate(smaller_models(self._config)):
            engine = self._load(str(number), less.changes)
            for shape, tokens in shapes.items():
                whole, rest = self._compare((self._whole, self._plan(self._whole, tokens)),
                                            (engine, self._plan(engine, tokens)), tokens)  # fmt: skip
                found[shape].append((less.name, (whole - rest) * less.scale, whole))
                print(f"  {shape}: {whole * 1e3:.2f} ms; {less.name} {found[shape][-1][1] / whole:.0%}", flush=True)
            del engine
        return {shape: self._parts(found[shape], tokens) for shape, tokens in shapes.items()}

    def _plan(self, engine: Engine, tokens: int) -> StepPlan:
        return prompt_plan(engine, tokens, tokens) if tokens else decode_plan(engine, CONTEXT)

    def _compare(
        self, whole: tuple[Engine, StepPlan], rest: tuple[Engine, StepPlan], tokens: int
    ) -> tuple[float, float]:
        first, second = in_turns([whole, rest], self._args.repeats * (1 if tokens else 10))
        return first, second

    def _parts(self, found: list[tuple[str, float, float]], tokens: int) -> dict[str, Any]:
        """Cut attention over the context out of the part with the heads, and name what is left."""
        engine = self._whole
        without = prompt_plan(engine, tokens, PIECE) if tokens else decode_plan(engine, 0)
        whole, rest = self._compare((engine, self._plan(engine, tokens)), (engine, without), tokens)
        over_context = Part(f"attention over {'earlier tokens' if tokens else f'{CONTEXT} tokens'}", whole - rest,
                            (whole - rest) / whole)  # fmt: skip
        parts = [Part(name, seconds, seconds / step) for name, seconds, step in found]
        if len(parts) > 2:  # the last is of the heads
            heads = parts.pop()
            products = heads.seconds - over_context.seconds
            parts.append(Part("qkv and out products", products, heads.share - over_context.share))
        parts.append(over_context)
        left = 1.0 - sum(part.share for part in parts)
        parts.append(Part("norms, residual, threads meeting, call, sampling", left * whole, left))
        return {"step_s": whole, "parts": [asdict(p) for p in sorted(parts, key=lambda p: -p.share)]}


def shares(args: argparse.Namespace) -> dict[str, Any]:
    """Of the limits, by the engine with the model's own weights. Limits are the better of before and after."""
    bench = Bench(args)
    before = bench.limits
    prefill = [bench.prefill(n)[0] for n in args.prefill]
    decode = bench.decode(1)[0]
    limits = better(before, measure_limits(args.threads, DTYPES[args.dtype]))
    reached = {"decode of one sequence": decode.bandwidth_share * before.read_bytes_per_s / limits.read_bytes_per_s}
    for p in prefill:
        share = p.matmul_share * before.matmul_flops_per_s / limits.matmul_flops_per_s
        reached[f"prefill of {p.tokens} tokens"] = share
    print(f"plain read {limits.read_bytes_per_s / 1e9:.1f} GB/s, matmul {limits.matmul_flops_per_s / 1e9:.0f} GFLOP/s")
    for name, share in reached.items():
        goal = f" (goal {GOALS[name]:.0%})" if name in GOALS else ""
        print(f"{name}: {share:.0%} of the limit{goal}", flush=True)
    return {
        "limits": asdict(limits),
        "share_of_limit": reached,
        "goals": GOALS,
        "prefill": [{"tokens": p.tokens, "seconds": p.seconds, "tokens_per_s": p.tokens_per_s} for p in prefill],
        "decode": {"context": CONTEXT, "step_s": decode.step_s, "tokens_per_s": decode.tokens_per_s},
    }


def better(a: Limits, b: Limits) -> Limits:
    return Limits(
        a.threads,
        max(a.read_bytes_per_s, b.read_bytes_per_s),
        max(a.matmul_flops_per_s, b.matmul_flops_per_s),
    )


def main() -> None:
    args = arguments()
    watch = CpuWatch()
    body = {"model": args.model, "dtype": args.dtype, "threads": args.threads, **shares(args)}
    if not args.no_profile:
        with tempfile.TemporaryDirectory() as scratch:
            body["profile"] = Profile(args, Path(scratch)).steps(args.prefill)
        for shape, step in body["profile"].items():
            print(f"{shape}: {step['step_s'] * 1e3:.2f} ms")
            for part in step["parts"]:
                print(f"  {part['share']:6.1%} {part['seconds'] * 1e3:8.2f} ms  {part['name']}")
    write(args.name, {**body, "cores": watch.stop()})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(DTYPES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prefill", type=int, nargs="+", default=[512, 1024], help="lengths of prompts")
    parser.add_argument("--repeats", type=int, default=10, help="of each prompt's step; ten times as many of decode's")
    parser.add_argument("--no-profile", action="store_true", help="only the shares of the limits")
    parser.add_argument("--name", default="roofline", help="of the file in bench/results")
    parser.set_defaults(kernels=["native"], block_size=16, kv_tokens=4096)
    return parser.parse_args()


if __name__ == "__main__":
    main()
