"""How fast the simulator is: `python bench/planner_speed.py [REQUESTS]`, in simulated requests a CPU second.

OPT-13B on A100s, ShareGPT-like lengths, Poisson arrivals. Rows: counts (what searches use), the machines with jumps,
the machines step by step; all give the same digest. Then how the cost grows with the number of requests.
"""

from __future__ import annotations

import sys
import time

from distserve.core.types import Role
from distserve_planner.latency.source import latency_model
from distserve_planner.simulation.deployment import NVLINK_A100, Deployment, instance, on_ports, policy
from distserve_planner.simulation.run import simulate
from distserve_planner.workload import SHAREGPT, poisson, synthetic

PROFILE = "distserve:a100-80g"
REPEATS = 3


def split(prefills: int = 1, decodes: int = 1) -> Deployment:
    prefill = instance(Role.PREFILL, latency_model(PROFILE, "opt-13b", 2, 1), policy("distserve"))
    decode = instance(Role.DECODE, latency_model(PROFILE, "opt-13b", 1, 1), policy("distserve"))
    return on_ports([prefill] * prefills + [decode] * decodes, NVLINK_A100)


def mixed() -> Deployment:
    model = latency_model("vllm:a100-80g", "opt-13b", 1, 1)
    return on_ports([instance(Role.MIXED, model, policy("vllm-2023"))], NVLINK_A100)


def row(name: str, deployment: Deployment, rate: float, n: int, **how: bool) -> None:
    workload = synthetic(SHAREGPT, poisson(rate), n, 1)
    best = float("inf")
    for _ in range(REPEATS):
        began = time.process_time()
        digest = simulate(deployment, workload, **how).digest
        best = min(best, time.process_time() - began)
    print(f"{name:44} {n:7} {rate:6.1f} {n / best:9,.0f}  {digest[:12]}")


def main(n: int) -> None:
    print(f"{'':44} {'N':>7} {'rate':>6} {'req/CPU s':>9}  digest")
    row("1 prefill TP2 + 1 decode TP1", split(), 4.5, n)
    row("  the machines, with jumps", split(), 4.5, n // 10, machines=True)
    row("  the machines, step by step", split(), 4.5, n // 10, machines=True, jumps=False)
    row("  counts, as many requests", split(), 4.5, n // 10)
    row("1 prefill + 1 decode, over capacity", split(), 9.0, n)
    row("2 prefill + 4 decode", split(2, 4), 16.0, n)
    row("1 mixed TP1, prompts first", mixed(), 2.0, n)
    for times in (1, 2, 4):
        row("growth with N", split(), 4.5, n * times // 2)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000)
