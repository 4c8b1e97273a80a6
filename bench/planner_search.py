"""The search: CPU seconds, one answer from five seeds, free ratios, growth. `python bench/planner_search.py [--quick]`

Prints what issue 4 asks to be shown (must-show 2, 3 and 7), with the limits beside the figures. ``--quick`` leaves out
the steady-state part.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace

from distserve_planner.cluster import uniform
from distserve_planner.hardware import gpu_named
from distserve_planner.models import load_model
from distserve_planner.selection import Effort, FromFit, Problem, SearchResult, search
from distserve_planner.simulation.result import Slo
from distserve_planner.workload import SHAREGPT, Workload, poisson, synthetic

A100 = gpu_named("a100-80g")
PROFILE = "distserve:a100-80g"
SHORT = Effort(requests=300, final_requests=300)


def sharegpt(requests: int, seed: int = 0) -> Workload:
    return synthetic(SHAREGPT, poisson(1.0), requests, seed, "sharegpt")


def problem(model: str, nodes: int, gpus: int, slo: Slo, effort: Effort, algorithm: str, seed: int = 0) -> Problem:
    return Problem(
        model=load_model(model),
        cluster=uniform(f"{nodes}x{gpus}", A100, nodes, gpus),
        workload=sharegpt(max(effort.requests, effort.final_requests) * 21 // 20, seed),
        slo=slo,
        rate=0.5,
        latency=FromFit(PROFILE, model),
        algorithm=algorithm,
        policy="distserve",
        mixed_policies=(),
        effort=replace(effort, seed=seed),
    )


def timed(asked: Problem, exhaustive: bool = False) -> tuple[SearchResult, float]:
    began = time.process_time()
    result = search(asked, exhaustive=exhaustive)
    return result, time.process_time() - began


def speed() -> None:
    print(f"{'search (N = 300)':36s} {'units':>6s} {'tried':>6s} {'runs':>6s} {'CPU s':>7s} {'limit':>6s}  best")
    first, second = Slo(0.25, 0.1), Slo(2.5, 0.15)
    rows = (
        ("OPT-13B 1x4, all pairs measured", problem("opt-13b", 1, 4, first, SHORT, "low"), True, 1.0),
        ("OPT-13B 1x4", problem("opt-13b", 1, 4, first, SHORT, "low"), False, 1.0),
        ("OPT-66B 1x8", problem("opt-66b", 1, 8, second, SHORT, "low"), False, 3.0),
        ("OPT-13B 4x8, low", problem("opt-13b", 4, 8, first, SHORT, "low"), False, 60.0),
        ("OPT-66B 4x8, low and high", problem("opt-66b", 4, 8, second, SHORT, "auto"), False, 60.0),
    )
    for name, asked, exhaustive, limit in rows:
        result, spent = timed(asked, exhaustive)
        ranking = result.ranking
        counts = f"{len(ranking.entries):6d} {ranking.simulated:6d} {ranking.trials:6d}"
        print(f"{name:36s} {counts} {spent:7.2f} {limit:6.1f}  {result.best.unit}")


def growth() -> None:
    print("\ncost of one search over requests (OPT-13B 1x4, every pair measured)")
    for requests in (300, 600, 1200, 2400):
        effort = Effort(requests=requests, final_requests=requests)
        result, spent = timed(problem("opt-13b", 1, 4, Slo(0.25, 0.1), effort, "low"), exhaustive=True)
        each = spent / result.ranking.trials / requests * 1e6
        print(f"  N = {requests:5d}: {spent:6.2f} CPU s, {each:6.1f} µs a request and trial")


def seeds() -> None:
    print("\nthe same answer from five seeds, at steady state (limit: 5 of 5 alike, spread 5 %)")
    found = []
    for seed in range(5):
        effort = Effort(requests=2000, final_requests=40000, finalists=1)
        result, spent = timed(problem("opt-13b", 1, 4, Slo(0.25, 0.1), effort, "low", seed))
        assert result.best.found is not None
        goodput = result.best.found
        found.append((str(result.best.unit), goodput.rate))
        shown = f"{goodput.rate:.3f} ({goodput.low:.3f} to {goodput.high:.3f})"
        print(f"  seed {seed}: {shown} {result.best.unit}, {spent:.1f} CPU s")
    rates = [rate for _, rate in found]
    alike = len({unit for unit, _ in found}) == 1
    print(f"  {'alike' if alike else 'NOT alike'}, spread {(max(rates) - min(rates)) / min(rates):.1%}")


def ratios() -> None:
    print("\nfree ratios against the best 1:1 (OPT-13B, 1x8; limit 1.15)")
    effort = Effort(requests=2000, final_requests=6000)
    for slo in (Slo(0.25, 0.1), Slo(0.2, 0.1)):
        pair, _ = timed(problem("opt-13b", 1, 8, slo, effort, "low"))
        free, spent = timed(problem("opt-13b", 1, 8, slo, effort, "auto"))
        one = max(e.rate / e.unit.gpus for e in pair.finalists)
        any_ratio = max(e.rate / e.unit.gpus for e in free.finalists)
        print(f"  TTFT {slo.ttft_s}: {any_ratio:.3f} against {one:.3f} req/s per GPU = {any_ratio / one:.2f}")
        print(f"    {free.finalists[0].unit} ({spent:.1f} CPU s)")


if __name__ == "__main__":
    speed()
    growth()
    if "--quick" not in sys.argv:
        ratios()
        seeds()
