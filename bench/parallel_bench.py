"""What cutting an instance over two ranks costs or gains on two cores, native kernels and torch side by side.

One instance of one rank and two threads, and two of two ranks with one thread each: tensor parallel and pipeline
parallel. Ranks are the processes that ``distserve instance`` starts, each on a core of its own, driven as an instance
drives them; no scheduler, no network. Decode steps of several batch sizes, and one prompt; with stages also the batch
as two steps in flight, as an instance has it decode. Of one layout both kernels run in turns, so that each sees the
same neighbours. Torch computes its single rank with two threads as well.

The model is SmolLM2-135M's shape with random weights, but for the heads: its 9 and 3 cannot be cut in two, so it gets 8
query heads and 4 KV heads.

    python bench/parallel_bench.py --write
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import orjson
from common import write

from distserve.core.types import InstanceRef, Sampling, StepItem, StepPlan
from distserve.engine.config import DTYPES, EngineConfig
from distserve.engine.runner import Engine
from distserve.instance.ranks.engine import RankedEngine
from distserve.instance.ranks.instance import RankedInstance
from distserve.instance.ranks.moves import RankedDataPlane
from distserve.instance.ranks.muster import Orders, started_place
from distserve.kv.shard import Parallel
from distserve.loadgen.machine import CpuWatch
from distserve.models.catalog import RANDOM_PREFIX, resolve_model
from distserve.transfer import TransferConfig
from distserve_kernels.cores import keep_to, usable_cores

CORES = 2
LAYOUTS = {"tp1": Parallel(), "tp2": Parallel(2, 1), "pp2": Parallel(1, 2)}
KERNELS = ("native", "torch")
GREEDY = Sampling(temperature=0.0)
CONTEXT = 263  # tokens each decoding sequence has behind it
BLOCK = 16


class System:
    """One instance under test; whatever touches it runs on its own thread, as an instance's steps do."""

    def __init__(self, args: argparse.Namespace, layout: Parallel, kernels: str) -> None:
        self._layout = layout
        self._config = EngineConfig(
            model=args.model,
            dtype=args.dtype,
            threads=CORES // layout.ranks,
            kv_tokens=args.kv_tokens,
            block_size=BLOCK,
            kernels=kernels,
            steps_in_flight=layout.pp,
        )
        self._cores = usable_cores()[:CORES]
        own = started_place(layout, 0).cores(self._cores, self._config.threads)
        self._thread = ThreadPoolExecutor(1, initializer=keep_to, initargs=(own,))
        self._data_plane: RankedDataPlane | None = None
        self._engine: Engine | RankedEngine | None = None

    def load(self) -> None:
        self._thread.submit(self._load).result()

    def seconds(self, plans: Sequence[StepPlan]) -> float:
        """Of these steps, all in flight at once."""
        return self._thread.submit(self._run, plans).result()

    def close(self) -> None:
        if self._data_plane is not None:
            self._data_plane.close()  # which ends the ranks
        self._engine = None
        self._thread.shutdown()

    def _load(self) -> None:
        if self._layout.ranks == 1:
            self._engine = Engine.load(self._config)
            return
        orders = Orders(InstanceRef("bench", 1), self._layout, "shm", 60.0, "warning", b"", (), 0, self._cores)
        ranks = RankedInstance(orders, None, lost=_lost, asked=lambda: None, report=lambda event: None)
        self._engine = ranks.load(self._config, lambda done, total, what: None)
        self._data_plane = ranks.data_plane(TransferConfig())

    def _run(self, plans: Sequence[StepPlan]) -> float:
        assert self._engine is not None
        began = time.perf_counter()
        for plan in plans:
            self._engine.submit(plan)
        for _ in plans:
            self._engine.wait()
        return time.perf_counter() - began


def _lost(why: str) -> None:
    print(why, flush=True)


@contextmanager
def systems(args: argparse.Namespace, layout: Parallel) -> Iterator[dict[str, System]]:
    """One instance of each kind of kernels, loaded."""
    with ExitStack() as held:
        found = {}
        for kernels in KERNELS:
            found[kernels] = System(args, layout, kernels)
            held.callback(found[kernels].close)
            found[kernels].load()
        yield found


def steps(args: argparse.Namespace, stages: int) -> dict[str, list[tuple[StepItem, ...]]]:
    """What is timed, by name: the items of a step, or of as many as there are stages, at once in flight."""
    draw = random.Random(1)
    prompt = tuple(draw.randrange(3, 1000) for _ in range(args.prompt))
    each = -(-(CONTEXT + 1) // BLOCK)
    found: dict[str, list[tuple[StepItem, ...]]] = {}
    for batch in args.batches:
        rows = tuple(
            StepItem(str(i), CONTEXT, (17 + i,), tuple(range(i * each, (i + 1) * each)), True, 1, GREEDY)
            for i in range(batch)
        )
        found[f"decode {batch}"] = [rows]
        if 1 < stages <= batch:
            found[f"decode {batch} in {stages}"] = [rows[at::stages] for at in range(stages)]
    whole = (StepItem("p", 0, prompt, tuple(range(-(-args.prompt // BLOCK))), True, 0, GREEDY),)
    found[f"prefill {args.prompt}"] = [whole]
    return found


def measure(args: argparse.Namespace, layout: Parallel) -> dict[str, Any]:
    """Milliseconds of every kind of step, by kernels, and what others used of the cores."""
    times: dict[str, dict[str, list[float]]] = {}
    numbers = count(1)
    with systems(args, layout) as both:
        watch = CpuWatch(children())
        for name, items in steps(args, layout.pp).items():
            repeats = args.repeats if name.startswith("decode") else max(3, args.repeats // 4)
            for turn in range(args.warmup + repeats):
                for kernels, system in both.items():
                    seconds = system.seconds([StepPlan(next(numbers), each) for each in items])
                    if turn >= args.warmup:
                        times.setdefault(name, {}).setdefault(kernels, []).append(seconds)
        others = watch.stop()["others"]
    rows = {name: judged({kernels: summary(each) for kernels, each in both.items()}) for name, both in times.items()}
    return {"others_cores": others, "steps": rows}


def children() -> tuple[int, ...]:
    """Processes that we have started: the other ranks."""
    tasks = Path("/proc/self/task").iterdir()
    return tuple(int(pid) for task in tasks for pid in (task / "children").read_text().split())


def summary(seconds: list[float]) -> dict[str, Any]:
    low, median, high = statistics.quantiles(seconds, n=4)
    milliseconds = [round(value * 1e3, 3) for value in (low, high)]
    return {"median_ms": round(median * 1e3, 3), "quartiles_ms": milliseconds, "best_ms": round(min(seconds) * 1e3, 3)}


def judged(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {**rows, "torch / native": round(rows["torch"]["median_ms"] / rows["native"]["median_ms"], 2)}


def show(layout: str, result: dict[str, Any]) -> None:
    print(f"\n{layout}; others used {result['others_cores']} cores meanwhile")
    print(f"  {'step':18}{'native ms':>11}{'torch ms':>11}{'torch / native':>16}")
    for name, row in result["steps"].items():
        native, torch = (row[kernels]["median_ms"] for kernels in KERNELS)
        print(f"  {name:18}{native:11.2f}{torch:11.2f}{row['torch / native']:16.2f}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="another one, whose heads can be cut in two")
    parser.add_argument("--dtype", choices=[*DTYPES], default="bfloat16")
    parser.add_argument("--layouts", nargs="+", choices=[*LAYOUTS], default=[*LAYOUTS])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--repeats", type=int, default=40, help="of every decode step; a fourth of it of the prompt")
    parser.add_argument("--warmup", type=int, default=3, help="repeats that are not counted")
    parser.add_argument("--kv-tokens", type=int, default=16384)
    parser.add_argument("--write", action="store_true", help="write bench/results/parallel.json")
    return parser.parse_args()


def even_heads(folder: Path) -> str:
    """A configuration as the module says, under ``folder``; its name for the engine."""
    shape = orjson.loads((resolve_model("smollm2-135m") / "config.json").read_bytes())
    shape |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
    (folder / "config.json").write_bytes(orjson.dumps(shape))
    return f"{RANDOM_PREFIX}{folder}"


def main() -> None:
    args = arguments()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        args.model = args.model or even_heads(Path(folder))
        for name in args.layouts:
            results[name] = measure(args, LAYOUTS[name])
            show(name, results[name])
    if args.write:
        settings = {k: v for k, v in vars(args).items() if k not in ("write", "model")}
        write("parallel", {"settings": settings | {"cores": CORES, "context": CONTEXT}, "results": results})


if __name__ == "__main__":
    main()
