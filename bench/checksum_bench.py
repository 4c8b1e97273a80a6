"""What the checksum costs: hand-offs with it and without it, in turns, between the same two pools.

``handoff_pair.py`` says what a hand-off is and how it is timed. Two pairs of movers work over the same pools, one with
checksums as always and one without; which of the two goes first is drawn anew each turn. The share is 1 − without/with,
of medians; beside it, the middle nine tenths of the shares of resampled turns (bootstrap), for single turns scatter.

    python bench/checksum_bench.py --write
"""

from __future__ import annotations

import argparse
import random
from typing import Any

import numpy as np
from common import write
from handoff_pair import DTYPES, Handoffs, Pair, Shape, two_processes

from distserve.loadgen.machine import CpuWatch
from distserve.transfer import TransferConfig

GOAL_SHARE = 0.05
RESAMPLED = 2000


def turns(pair: Pair, shape: Shape, kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds with and without, in turns; and what follows from them."""
    pair.take(shape)
    both = [Handoffs(pair, shape, kind, TransferConfig(checksum=checksum)) for checksum in (True, False)]
    lots = random.Random(args.seed)
    seconds = np.empty((args.turns, 2))
    for turn in range(args.turns):
        for which in lots.sample((0, 1), 2):
            pair.evict()
            seconds[turn, which] = both[which].once()
    for each in both:
        each.close()
    shares = np.empty(RESAMPLED)
    draw = np.random.default_rng(args.seed)
    for i in range(RESAMPLED):
        shares[i] = _share(seconds[draw.integers(0, args.turns, args.turns)])
    with_ms, without_ms = np.median(seconds, axis=0) * 1e3
    return {
        "nbytes": both[0].nbytes,
        "with_ms": round(float(with_ms), 3),
        "without_ms": round(float(without_ms), 3),
        "share": round(_share(seconds), 4),
        "share_90": [round(float(each), 4) for each in np.percentile(shares, (5, 95))],
    }


def _share(seconds: np.ndarray) -> float:
    """Of hand-off time; [turns, (with, without)]."""
    with_s, without_s = np.median(seconds, axis=0)
    return float(1 - without_s / with_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=900)
    parser.add_argument("--turns", type=int, default=300)
    parser.add_argument("--dtypes", nargs="+", choices=[*DTYPES], default=[*DTYPES])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="write bench/results/checksum.json")
    args = parser.parse_args()
    results: dict[str, Any] = {}
    with two_processes() as pair:
        watch = CpuWatch((pair.pid,))
        for kind in ("shm", "gloo"):
            for dtype in args.dtypes:
                found = turns(pair, Shape(dtype, args.tokens), kind, args)
                results[f"{kind}, {dtype}"] = found
                low, high = found["share_90"]
                print(
                    f"{kind:5}{dtype:9} with {found['with_ms']:7.2f} ms, without {found['without_ms']:7.2f} ms: "
                    f"{found['share']:6.1%} of it ({low:.1%} to {high:.1%}; goal: at most {GOAL_SHARE:.0%})",
                    flush=True,
                )
        others = watch.stop()["others"]
    if args.write:
        settings = {"tokens": args.tokens, "turns": args.turns, "seed": args.seed}
        write("checksum", {"goal_share": GOAL_SHARE, "settings": settings, "others_cores": others, "results": results})


if __name__ == "__main__":
    main()
