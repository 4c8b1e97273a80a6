"""How fast KV moves between two processes of this machine, against the machine's own limits, side by side in one run.

Beside a hand-off (``handoff_pair.py`` says what that is), in turns and over the same bytes: a plain copy in memory, and
a bare gloo send/recv between the same two processes.

- *Plain copy*: one thread copies the prompt's bytes from the source's pool into another buffer of the same size in one
  call; NumPy's and torch's are both timed, and the faster one's median counts.
- *Bare gloo*: one message of the same bytes, from the source's pool into the destination's, until the receiver has it.
- *Cold* rows come after other memory was written, so that no byte is in a cache, as after a prefill; *warm* ones are
  the second of two acts in a row. Ratios are of medians.

    python bench/transfer_bench.py --write
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import write
from handoff_pair import BLOCK, DTYPES, Handoffs, Pair, Shape, two_processes

from distserve.loadgen.machine import CpuWatch
from distserve.transfer import TransferConfig

GOALS = {"shm / plain copy": 0.5, "gloo / bare gloo": 0.7}
TUNABLE = ("slice_bytes", "shm_piece_bytes", "shm_slots", "gloo_piece_bytes", "group_slots")


def timed(act: Callable[[], Any]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def summary(seconds: list[float], nbytes: int) -> dict[str, float]:
    low, _, high = statistics.quantiles(seconds, n=4)
    median = statistics.median(seconds)
    return {
        "median_ms": round(median * 1e3, 3),
        "quartiles_ms": [round(low * 1e3, 3), round(high * 1e3, 3)],
        "best_ms": round(min(seconds) * 1e3, 3),
        "median_gb_s": round(nbytes / median / 1e9, 3),
    }


def measure(pair: Pair, shape: Shape, args: argparse.Namespace) -> dict[str, Any]:
    """All acts with one shape in turns, so that each sees the same neighbours; cold and warm."""
    pair.take(shape)
    shm, gloo = (Handoffs(pair, shape, kind, args.config) for kind in ("shm", "gloo"))
    nbytes = shm.nbytes
    source = pair.pool.view(torch.uint8).view(-1)[:nbytes]
    target = torch.ones_like(source)
    from_array, to_array = source.numpy(), target.numpy()
    acts: dict[str, Callable[[], float]] = {
        "shm": shm.once,
        "copy (numpy)": lambda: timed(lambda: np.copyto(to_array, from_array)),
        "copy (torch)": lambda: timed(lambda: target.copy_(source)),
        "gloo": gloo.once,
        "bare gloo": lambda: pair.bare(nbytes),
    }
    rows: dict[str, dict[str, list[float]]] = {"cold": {}, "warm": {}}
    for _ in range(args.repeats):
        for name, act in acts.items():
            pair.evict()
            rows["cold"].setdefault(name, []).append(act())
            rows["warm"].setdefault(name, []).append(act())
    shm.close()
    gloo.close()
    return {"nbytes": nbytes} | {
        state: judged({name: summary(seconds, nbytes) for name, seconds in of_state.items()})
        for state, of_state in rows.items()
    }


def judged(rows: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The rows with the ratios that the goals speak of."""
    copy = max(rows["copy (numpy)"]["median_gb_s"], rows["copy (torch)"]["median_gb_s"])
    ratios = {
        "shm / plain copy": rows["shm"]["median_gb_s"] / copy,
        "gloo / bare gloo": rows["gloo"]["median_gb_s"] / rows["bare gloo"]["median_gb_s"],
    }
    return {"rows": rows, "ratios": {name: round(value, 3) for name, value in ratios.items()}}


def show(dtype: str, result: dict[str, Any]) -> None:
    print(f"\n{dtype}: {result['nbytes'] / 1e6:.1f} MB; others used {result['others_cores']} cores meanwhile")
    for state in ("cold", "warm"):
        print(f"{state:16}{'median ms':>11}{'best ms':>10}{'median GB/s':>13}")
        for name, row in result[state]["rows"].items():
            print(f"  {name:14}{row['median_ms']:11.2f}{row['best_ms']:10.2f}{row['median_gb_s']:13.2f}")
        for name, value in result[state]["ratios"].items():
            print(f"  {name:20}{value:7.1%}   (goal: {GOALS[name]:.0%})")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = TransferConfig()
    parser.add_argument("--tokens", type=int, default=900)
    parser.add_argument("--repeats", type=int, default=60, help="of every act, cold and warm")
    parser.add_argument("--dtypes", nargs="+", choices=[*DTYPES], default=[*DTYPES])
    for name in TUNABLE:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(default, name))
    parser.add_argument("--fragmented", action="store_true", help="no two blocks are adjacent")
    parser.add_argument("--destination-block-size", type=int, default=BLOCK)
    parser.add_argument("--unpinned", action="store_true", help="let the scheduler choose the cores")
    parser.add_argument("--write", action="store_true", help="write bench/results/transfer.json")
    args = parser.parse_args()
    args.config = TransferConfig(**{name: getattr(args, name) for name in TUNABLE})
    return args


def main() -> None:
    args = arguments()
    results: dict[str, Any] = {}
    with two_processes(pinned=not args.unpinned) as pair:
        for dtype in args.dtypes:
            watch = CpuWatch((pair.pid,))
            shape = Shape(dtype, args.tokens, args.fragmented, args.destination_block_size)
            results[dtype] = measure(pair, shape, args)
            results[dtype]["others_cores"] = watch.stop()["others"]
            show(dtype, results[dtype])
    if args.write:
        settings = {k: v for k, v in vars(args).items() if k not in ("write", "config")}
        write("transfer", {"goals": GOALS, "settings": settings, "results": results})


if __name__ == "__main__":
    main()
