"""How fast one engine computes, native kernels and torch side by side, and what share of the machine's limits that is.

Runs the bare engine, no scheduler and no network: prefill at several lengths, decode at several batch sizes. Limits are
measured in the same run: a plain read of memory (decode reads all weights and KV once a step) and oneDNN's best matrix
product in the same dtype (prefill is arithmetic). Prints a table, or JSON with --json. Figures are the best of a few
repeats, both sides in turn: a shared machine only ever makes them worse.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from distserve.core.types import Sampling, StepItem, StepPlan
from distserve.engine.config import DTYPES, KERNELS, EngineConfig
from distserve.engine.runner import Engine
from distserve.models.catalog import resolve_model
from distserve.models.config import read_config
from distserve_kernels.linear import Linear

GREEDY = Sampling(temperature=0.0)
DRAWN = Sampling(temperature=0.8, top_p=0.95, seed=1)
KINDS = {
    "greedy": GREEDY,
    "top-p": DRAWN,
    "top-k 50, top-p": replace(DRAWN, top_k=50),
    "repetition penalty": replace(DRAWN, repetition_penalty=1.1),
    "greedy, 5 logprobs": replace(GREEDY, logprobs=5),
}
HISTORY = tuple(range(1000, 1256))
CONTEXT = 263  # tokens each decoding sequence has behind it


@dataclass(frozen=True, slots=True)
class Limits:
    """What the machine reaches with ``threads``, of plain work."""

    threads: int
    read_bytes_per_s: float
    matmul_flops_per_s: float


@dataclass(frozen=True, slots=True)
class Prefill:
    kernels: str
    tokens: int
    seconds: float
    tokens_per_s: float
    matmul_share: float  # floating point operations of weights and attention a second, over the matmul rate


@dataclass(frozen=True, slots=True)
class Decode:
    kernels: str
    batch: int
    step_s: float
    tokens_per_s: float
    bandwidth_share: float  # bytes of weights and KV a second, over what a plain read reaches
    matmul_share: float


@dataclass(frozen=True, slots=True)
class Sampled:
    """Best time to choose one token for each of ``batch`` sequences, in seconds by kind of sampling."""

    kernels: str
    batch: int
    seconds: dict[str, float]


class Bench:
    """Engines that differ in their kernels alone."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self.engines = {kernels: self._load(kernels) for kernels in args.kernels}
        self._hidden = read_config(resolve_model(args.model)).hidden
        self.limits = measure_limits(args.threads, DTYPES[args.dtype])

    def _load(self, kernels: str) -> Engine:
        args = self._args
        return Engine.load(
            EngineConfig(
                model=args.model,
                dtype=args.dtype,
                threads=args.threads,
                kv_tokens=args.kv_tokens,
                block_size=args.block_size,
                kernels=kernels,
            )
        )

    def prefill(self, tokens: int) -> list[Prefill]:
        """The best time of one whole prompt of ``tokens``, first token included."""
        spec = next(iter(self.engines.values())).spec
        ids = tuple(torch.randint(3, spec.vocab_size, (tokens,)).tolist())
        plan = StepPlan(1, (StepItem("a", 0, ids, tuple(range(-(-tokens // spec.block_size))), True, 0, GREEDY),))
        results = []
        for kernels, best in self._best(plan, self._args.repeats).items():
            flops = self._flops(self.engines[kernels], tokens, sum(range(tokens + 1)), 1)
            share = flops / best / self.limits.matmul_flops_per_s
            results.append(Prefill(kernels, tokens, best, tokens / best, share))
        return results

    def decode(self, batch: int) -> list[Decode]:
        """The best time of one step of ``batch`` sequences that each have CONTEXT tokens of KV."""
        spec = next(iter(self.engines.values())).spec
        each = -(-(CONTEXT + 1) // spec.block_size)
        items = tuple(
            StepItem(str(i), CONTEXT, (17 + i,), tuple(range(i * each, (i + 1) * each)), True, 1, GREEDY)
            for i in range(batch)
        )
        results = []
        for kernels, best in self._best(StepPlan(1, items), 4 * self._args.repeats).items():
            engine = self.engines[kernels]
            moved = engine.weight_bytes + batch * (CONTEXT + 1) * engine.pool.block_bytes / spec.block_size
            flops = self._flops(engine, batch, batch * (CONTEXT + 1), batch)
            results.append(
                Decode(
                    kernels,
                    batch,
                    best,
                    batch / best,
                    moved / best / self.limits.read_bytes_per_s,
                    flops / best / self.limits.matmul_flops_per_s,
                )
            )
        return results

    def sampling(self, batch: int) -> list[Sampled]:
        """Of logits as spread as a model's, with the histories of half-way answers."""
        logits = torch.randn(batch, next(iter(self.engines.values())).spec.vocab_size) * 4
        results = []
        for kernels, engine in self.engines.items():
            self._as_alone(kernels)
            times = {}
            for name, sampling in KINDS.items():
                history = (HISTORY, HISTORY[::4]) if sampling.needs_history else ((), ())
                items = [StepItem(str(i), 0, (1,), (0,), True, 3, sampling, (), *history) for i in range(batch)]
                with torch.inference_mode():
                    times[name] = best_of(lambda items=items: engine._pass.choose(logits, items), 5)  # type: ignore[misc]  # noqa: B023
            results.append(Sampled(kernels, batch, times))
        return results

    def _as_alone(self, kernels: str) -> None:
        """Torch's threads as they are when an engine of this kind is alone in a process."""
        torch.set_num_threads(1 if kernels == "native" else self._args.threads)

    def _best(self, plan: StepPlan, repeats: int) -> dict[str, float]:
        """The best time of ``plan`` on each engine, which take turns."""
        best = dict.fromkeys(self.engines, float("inf"))
        for _ in range(repeats + 1):
            for kernels, engine in self.engines.items():
                self._as_alone(kernels)
                best[kernels] = min(best[kernels], once(lambda engine=engine: engine.run(plan)))  # type: ignore[misc]
        return best

    def _flops(self, engine: Engine, tokens: int, pairs: int, sampled: int) -> float:
        """Of ``tokens`` through the layers, ``pairs`` of query and key, and the head for ``sampled`` rows."""
        spec = engine.spec
        parameters = engine.weight_bytes / DTYPES[self._args.dtype].itemsize
        head = self._hidden * spec.vocab_size
        return 2 * tokens * (parameters - head) + 4 * pairs * spec.layers * self._hidden + 2 * sampled * head


def measure_limits(threads: int, dtype: torch.dtype) -> Limits:
    torch.set_num_threads(threads)
    return Limits(threads, measure_read_rate(), measure_matmul_rate(dtype))


def measure_read_rate(size_bytes: int = 1 << 28, repeats: int = 5) -> float:
    """Bytes a second of a plain read (a sum) of a tensor larger than any cache, with torch's current threads."""
    tensor = torch.ones(size_bytes // 4)
    return size_bytes / best_of(tensor.sum, repeats)


def measure_matmul_rate(dtype: torch.dtype, sizes: Sequence[int] = (1024, 2048, 4096), budget_s: float = 2.0) -> float:
    """Floating point operations a second of oneDNN's product of square matrices, of the size that suits it best."""
    rates = []
    for size in sizes:
        weight, x = Linear(torch.randn(size, size).to(dtype)), torch.randn(size, size).to(dtype)
        with torch.inference_mode():
            first_s = best_of(lambda weight=weight, x=x: weight(x), 1)  # type: ignore[misc]
            repeats = max(3, int(budget_s / len(sizes) / first_s))
            rates.append(2 * size**3 / best_of(lambda weight=weight, x=x: weight(x), repeats))  # type: ignore[misc]
    return max(rates)


def best_of(work: Callable[[], object], repeats: int) -> float:
    return min(once(work) for _ in range(repeats + 1))


def once(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    args = _arguments()
    bench = Bench(args)
    prefill = [result for n in args.prefill for result in bench.prefill(n)]
    decode = [result for b in args.decode for result in bench.decode(b)]
    sampling = [result for b in args.sampling for result in bench.sampling(b)]
    if args.json:
        results: dict[str, Sequence[Any]] = {"prefill": prefill, "decode": decode, "sampling": sampling}
        about = {"model": args.model, "dtype": args.dtype, **asdict(bench.limits)}
        print(json.dumps(about | {name: [asdict(r) for r in rows] for name, rows in results.items()}))
        return
    limits = bench.limits
    print(
        f"{args.model} {args.dtype}, {limits.threads} threads; a plain read {limits.read_bytes_per_s / 1e9:.1f} GB/s, "
        f"matmul {limits.matmul_flops_per_s / 1e9:.0f} GFLOP/s"
    )
    for p in prefill:
        print(
            f"prefill {p.tokens:5d} tokens  {p.kernels:6s} {p.seconds * 1e3:8.1f} ms  {p.tokens_per_s:8.0f} tok/s"
            f"  {p.matmul_share:5.0%} of matmul"
        )
    for d in decode:
        print(
            f"decode  batch {d.batch:4d}   {d.kernels:6s} {d.step_s * 1e3:8.2f} ms  {d.tokens_per_s:8.1f} tok/s"
            f"  {d.bandwidth_share:5.0%} of reading  {d.matmul_share:5.0%} of matmul"
        )
    for s in sampling:
        kinds = "  ".join(f"{name} {seconds * 1e3:.2f} ms" for name, seconds in s.seconds.items())
        print(f"sampling batch {s.batch:4d}  {s.kernels:6s} {kinds}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(DTYPES))
    parser.add_argument("--kernels", nargs="+", default=["native", "torch"], choices=KERNELS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--kv-tokens", type=int, default=32768)
    parser.add_argument("--prefill", type=int, nargs="*", default=[128, 512, 1024])
    parser.add_argument("--decode", type=int, nargs="*", default=[1, 8, 16, 64])
    parser.add_argument("--sampling", type=int, nargs="*", default=[1, 16, 256])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
