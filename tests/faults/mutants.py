"""The proof that the check can fail: ``python -m tests.faults.mutants`` switches every deliberate bug on, one by one,
and prints which property caught it, in which seed, after how many.

A bug counts as caught when a property of ``properties`` breaks; an exception out of a patched method is not enough.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from tests.faults.breakages import BREAKAGES, BY_NAME, switched_on
from tests.faults.properties import Property
from tests.faults.world import Outcome, run_seed


@dataclass(frozen=True)
class Verdict:
    """What became of one deliberate bug."""

    name: str
    profile: str
    caught_by: str  # empty: it survived
    seed: int
    seeds: int
    bound: int
    cpu_s: float
    problem: str


def judge(name: str) -> Verdict:
    """Run seeds of the bug's profile until a property breaks."""
    breakage = BY_NAME[name]
    began = time.process_time()
    caught, seed = "", -1
    outcome: Outcome | None = None
    with switched_on(breakage):
        for seed in range(breakage.seeds):
            outcome = run_seed(seed, profile=breakage.profile)
            if outcome.broken is not None and outcome.broken is not Property.CRASH:
                caught = outcome.broken.value
                break
    problem = outcome.problem if outcome is not None else ""
    return Verdict(name, breakage.profile, caught, seed, seed + 1, breakage.seeds, time.process_time() - began, problem)


def judge_all(names: list[str], processes: int) -> Iterator[Verdict]:
    if processes == 1:
        yield from map(judge, names)
        return
    with ProcessPoolExecutor(processes) as pool:
        yield from pool.map(judge, names)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.mutants",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", default="", help="those whose name contains this")
    parser.add_argument("--why", action="store_true", help="print what the property said")
    args = parser.parse_args()
    names = [b.name for b in BREAKAGES if args.only in b.name]
    print(f"{'deliberate bug':44} {'trouble':10} {'caught by':34} {'seed':>5} {'seeds':>6} {'within':>7}")
    survived, cpu = 0, 0.0
    for v in judge_all(names, args.processes):
        survived += not v.caught_by
        cpu += v.cpu_s
        seed = str(v.seed) if v.caught_by else "-"
        found = " *" if BY_NAME[v.name].found else ""
        print(f"{v.name + found:44} {v.profile:10} {v.caught_by or 'SURVIVED':34} {seed:>5} {v.seeds:>6} {v.bound:>7}")
        if args.why:
            print(f"    {v.problem}")
    print(f"* once found in earnest.  {len(names) - survived} of {len(names)} caught, {cpu:.0f} s of CPU")
    return bool(survived)


if __name__ == "__main__":
    sys.exit(main())
