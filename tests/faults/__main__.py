"""Run seeds: ``python -m tests.faults --seeds 1000``. Replay one or a saved plan: ``… --replay 17``.

A seed is a whole cluster of real machines (``distserve.sched``) in a simulated world; ``README.md`` beside this file
says how the parts hang together, how to replay, how to add a property. What must hold is in ``properties``. A failing
seed is shrunk to a small plan, saved, and named with the command that replays it with its event log.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tests.faults.coverage import Coverage
from tests.faults.draw import PROFILES, TOPOLOGIES, draw
from tests.faults.plan import Case, Plan, load, save
from tests.faults.shrink import Shrinker
from tests.faults.world import Outcome, command, run_plan, run_seed

FAILED = Path("build/faults")
"""Where shrunk plans of failing seeds go; ``build`` is not kept by git."""


def run_many(seeds: range, profile: str | None, topology: str | None, processes: int) -> Iterator[Outcome]:
    """Outcomes in order of seed."""
    jobs = [(seed, profile, topology) for seed in seeds]
    if processes == 1:
        yield from map(_one, jobs)
        return
    with ProcessPoolExecutor(processes) as pool:
        yield from pool.map(_one, jobs, chunksize=8)


def _one(job: tuple[int, str | None, str | None]) -> Outcome:
    seed, profile, topology = job
    return run_seed(seed, profile=profile, topology=topology)


def replay(plan: Plan, grep: str, tail: int) -> int:
    """Run a plan and print its event log, what it came to, and which property broke."""
    outcome = run_plan(plan, trace=True)
    lines = [line for line in outcome.trace if grep in line]
    print("\n".join(lines[-tail:] if tail else lines))
    print(outcome.plan.describe())
    print(f"ends: {dict(outcome.ends)}  seen: {dict(outcome.seen)}")
    print(outcome.problem or "every property held")
    return bool(outcome.problem)


def plan_of(word: str, profile: str | None, topology: str | None) -> Plan:
    """A seed's plan, or a saved one."""
    return draw(int(word), profile, topology) if word.isdigit() else load(Path(word)).plan


def report_failure(outcome: Outcome, how: str, *, shrink: bool) -> None:
    """What a developer needs who sees a seed fail."""
    print(f"\n{outcome.plan.describe()}\n  {outcome.problem}\n  {how}", flush=True)
    if not shrink or outcome.broken is None:
        return
    small = Shrinker(outcome).shrink()
    path = FAILED / f"seed-{outcome.plan.seed}-{outcome.plan.profile}.json"
    save(Case(small.outcome.problem, outcome.broken.name, small.plan), path)
    print(f"  shrunk in {small.runs} runs: {small.plan.describe()}\n  {small.outcome.problem}")
    print(f"  python -m tests.faults --replay {path}", flush=True)


class Progress:
    """One line that says how far it is; only where somebody watches."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._shown = 0.0
        self._began = time.monotonic()

    def show(self, done: int, failed: int) -> None:
        now = time.monotonic()
        if not sys.stderr.isatty() or (now - self._shown < 0.5 and done < self.total):
            return
        self._shown = now
        share = done / self.total
        left = (now - self._began) * (1 / share - 1)
        bar = "█" * int(30 * share)
        end = "\n" if done == self.total else ""
        text = f"\r{bar:░<30} {done}/{self.total} seeds, {failed} failed, {left:4.0f} s left"
        print(text, end=end, file=sys.stderr, flush=True)


def run_seeds(args: argparse.Namespace) -> int:
    """Many seeds, one report."""
    began = time.perf_counter()
    events, runs, failed = 0, 0, 0
    ends: Counter[str] = Counter()
    coverage = Coverage()
    progress = Progress(args.seeds)
    for outcome in run_many(range(args.start, args.start + args.seeds), args.profile, args.topology, args.processes):
        events, runs = events + outcome.events, runs + 1
        ends += outcome.ends
        coverage.add(outcome.coverage)
        if outcome.problem:
            failed += 1
            how = command(outcome.plan.seed, args.profile, args.topology)
            report_failure(outcome, how, shrink=args.shrink and failed == 1)
            if failed >= 10 and not args.keep_going:
                break
        progress.show(runs, failed)
    took = time.perf_counter() - began
    print(f"{coverage.table()}\nhow streams ended: {dict(ends.most_common())}")
    if missing := coverage.missing():
        print(f"never happened: {'; '.join(missing)}")
    pace = f"{runs / took * 60:.0f} seeds/min, {events / took:.0f} events/s with {args.processes} processes"
    print(f"{runs} seeds, {events} events, {failed} failed, in {took:.0f} s; {pace}")
    return bool(failed)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=200, help="how many seeds to run")
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--profile", choices=PROFILES, help="one kind of trouble; default: drawn by each seed")
    parser.add_argument("--topology", choices=TOPOLOGIES, help="one cluster; default: drawn by each seed")
    parser.add_argument("--replay", metavar="SEED|PLAN", help="run one seed or saved plan and print its event log")
    parser.add_argument("--grep", default="", help="with --replay: only lines that contain this")
    parser.add_argument("--tail", type=int, default=0, help="with --replay: only the last lines")
    parser.add_argument("--digest", type=int, nargs="+", metavar="SEED", help="print the journal digests of some seeds")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at ten failing seeds")
    parser.add_argument("--no-shrink", dest="shrink", action="store_false", help="do not shrink the first failing seed")
    args = parser.parse_args()
    if args.digest:
        for seed in args.digest:
            print(seed, run_seed(seed, profile=args.profile, topology=args.topology, digest=True).digest)
        return 0
    if args.replay is not None:
        return replay(plan_of(args.replay, args.profile, args.topology), args.grep, args.tail)
    return run_seeds(args)


if __name__ == "__main__":
    sys.exit(main())
