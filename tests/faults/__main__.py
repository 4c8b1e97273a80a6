"""Run seeds: ``python -m tests.faults --seeds 1000 --start 0``; replay one: ``python -m tests.faults --replay 17``.

A seed is a whole cluster of real machines (``distserve.sched``) in a simulated world. ``plan`` draws everything from
the seed; ``heap`` is the clock, ``network`` and ``dataplane`` are hostile, ``shells`` stand where the live ones do,
``truth`` knows every right token and what each KV position must hold, ``clients`` read, ``watch`` checks after every
event, and ``world`` runs it: trouble, rest, one request more through every gateway, rest. What must hold:

- a client gets its tokens exactly, in order, each once, and an end; a failure has a reason that fits;
- a step computes the right tokens over exactly the right KV, into blocks that nobody else holds until it is done;
- a stage is sent only when computed, stored only under an open ticket, into reserved blocks of its own;
- an epoch of a request has one owner, once; tokens of a stale epoch are not taken; a lost gateway's requests end;
- every machine's own ``check``; every wait has a deadline; a tick never spins; work is done unless blocks are moving;
- in the end all blocks are free or cached, no timer runs, nobody is counted, and the cluster serves again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

from tests.faults.plan import PROFILES, TOPOLOGIES
from tests.faults.world import Outcome, command, run_seed


def run_many(seeds: range, profile: str | None, topology: str | None, processes: int) -> Iterator[Outcome]:
    """Outcomes in order of seed."""
    jobs = [(seed, profile, topology) for seed in seeds]
    if processes == 1:
        yield from map(_one, jobs)
        return
    with ProcessPoolExecutor(processes) as pool:
        yield from pool.map(_one, jobs, chunksize=4)


def _one(job: tuple[int, str | None, str | None]) -> Outcome:
    seed, profile, topology = job
    return run_seed(seed, profile=profile, topology=topology)


def replay(seed: int, profile: str | None, topology: str | None, grep: str, tail: int) -> int:
    outcome = run_seed(seed, profile=profile, topology=topology, trace=True)
    lines = [line for line in outcome.trace if grep in line]
    print("\n".join(lines[-tail:] if tail else lines))
    print(outcome.plan.describe())
    print(f"ends: {dict(outcome.ends)}  seen: {dict(outcome.seen)}")
    print(outcome.problem or "every property held")
    return bool(outcome.problem)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=200, help="how many seeds to run")
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--profile", choices=PROFILES, help="one kind of trouble; default: drawn by each seed")
    parser.add_argument("--topology", choices=TOPOLOGIES, help="one cluster; default: drawn by each seed")
    parser.add_argument("--replay", type=int, metavar="SEED", help="run one seed and print its event log")
    parser.add_argument("--grep", default="", help="with --replay: only lines that contain this")
    parser.add_argument("--tail", type=int, default=0, help="with --replay: only the last lines")
    parser.add_argument("--digest", type=int, nargs="+", metavar="SEED", help="print the journal digests of some seeds")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at ten failing seeds")
    args = parser.parse_args()
    if args.digest:
        for seed in args.digest:
            print(seed, run_seed(seed, profile=args.profile, topology=args.topology, digest=True).digest)
        return 0
    if args.replay is not None:
        return replay(args.replay, args.profile, args.topology, args.grep, args.tail)
    began = time.perf_counter()
    events, runs, failed = 0, 0, 0
    ends: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    for outcome in run_many(range(args.start, args.start + args.seeds), args.profile, args.topology, args.processes):
        events, runs = events + outcome.events, runs + 1
        ends += outcome.ends
        seen += outcome.seen
        if outcome.problem:
            failed += 1
            print(f"{outcome.plan.describe()}\n  {outcome.problem}")
            print(f"  {command(outcome.plan.seed, args.profile, args.topology)}", flush=True)
            if failed >= 10 and not args.keep_going:
                break
    took = time.perf_counter() - began
    print(f"ends: {dict(ends.most_common())}\nseen: {dict(seen.most_common())}")
    print(f"{runs} seeds, {failed} failed; {runs / took * 60:.0f} seeds/min, {events / took:.0f} events/s")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
