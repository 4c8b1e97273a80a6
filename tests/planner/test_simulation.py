"""The simulator: jumps change nothing, one seed one result, and nothing is lost or made up on the way."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from distserve.core.types import Role
from distserve.sched.batching import BatchPolicy
from distserve_planner.refusal import CannotPlan
from distserve_planner.simulation.deployment import Deployment, on_ports, open_door
from distserve_planner.simulation.result import Slo
from distserve_planner.simulation.run import simulate
from distserve_planner.workload import Job, Workload
from tests.planner.arrange import Linear, StraightLinear, jobs, mixed, prefixed, spec, split

CASES = {
    "one pair": (split(), jobs(120, 8.0, 1)),
    "a pool that preempts": (split(kv_tokens=4096), jobs(120, 20.0, 2)),
    "back-pressure": (split(kv_tokens=2048), jobs(100, 30.0, 3)),
    "two and two": (split(2, 2, kv_tokens=1 << 14), jobs(150, 25.0, 4)),
    "chunked beside decodes": (mixed(batching=BatchPolicy.CHUNKED, kv_tokens=1 << 13), jobs(120, 12.0, 5)),
    "prompts first": (mixed(2, batching=BatchPolicy.PROMPTS_FIRST, kv_tokens=4096), jobs(120, 15.0, 6)),
    "long answers, few at once": (split(), jobs(20, 0.5, 7, output=600)),
    "a model without a line": (split(model=Linear()), jobs(100, 10.0, 8)),
    "two stages": (split(model=StraightLinear(stages=2)), jobs(120, 14.0, 9)),
    "shared prefixes": (mixed(2, prefix_cache=True, kv_tokens=1 << 13), prefixed(120, 12.0, 11)),
    "shared prefixes, handed off": (split(prefix_cache=True, kv_tokens=1 << 13), prefixed(120, 12.0, 12)),
    "prompts overflow": (
        replace(split(1, 2, batching=BatchPolicy.CHUNKED), cluster=open_door(300)),
        jobs(150, 40.0, 13),
    ),
    "hand-offs in chunks": (split(batching=BatchPolicy.CHUNKED), jobs(120, 8.0, 10)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_jump_is_exactly_its_steps(name: str) -> None:
    deployment, workload = CASES[name]
    fast, slow = simulate(deployment, workload), simulate(deployment, workload, jumps=False)
    assert fast.trails == slow.trails
    assert fast.digest == slow.digest
    assert [i.steps for i in fast.instances] == [i.steps for i in slow.instances]


def test_the_cases_reach_what_they_are_named_for() -> None:
    preempting = simulate(*CASES["a pool that preempts"])
    assert preempting.instances[1].preemptions > 0
    for name in ("shared prefixes", "shared prefixes, handed off"):
        assert sum(t.cached for t in simulate(*CASES[name]).trails) > 5000
    spilling = [(t.prefill, t.decode) for t in simulate(*CASES["prompts overflow"]).trails]
    assert min(map(spilling.count, ((0, 1), (0, 2), (1, 1), (2, 2)))) > 10
    held = simulate(*CASES["back-pressure"])
    waits = [t.owned - t.first for t in held.trails if t.output > 1]
    assert max(waits) > 1.0, "nobody waited for a ticket"


def test_one_seed_one_result_whatever_the_hash_seed() -> None:
    program = (
        "from tests.planner.test_simulation import CASES, simulate\n"
        "print(simulate(*CASES['two and two'], seed=3).digest)"
    )
    outs = set()
    for hash_seed in ("0", "1", "77"):
        run = subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ":".join(p or "." for p in sys.path)},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        outs.add(run.stdout)
    assert len(outs) == 1


@pytest.mark.parametrize("name", CASES)
def test_everybody_is_served_in_full_and_in_order(name: str) -> None:
    deployment, workload = CASES[name]
    result = simulate(deployment, workload)
    for trail, job in zip(result.trails, workload.jobs, strict=True):
        assert trail.arrival == job.arrival_s
        assert trail.arrival < trail.first <= trail.last < float("inf")
        assert (trail.last > trail.first) == (job.output > 1)
    made = sum(i.output_tokens for i in result.instances)
    assert made == sum(j.output for j in workload.jobs)


def test_steps_compute_what_was_asked_and_no_more() -> None:
    """Tokens, work and Little's law, summed over every step of a run without preemption."""
    deployment, workload = CASES["one pair"]
    steps: list[tuple[int, float, float, int, int]] = []
    result = simulate(deployment, workload, jumps=False, watch=lambda *step: steps.append(step))
    assert sum(i.preemptions for i in result.instances) == 0
    assert sum(prompt for _, _, _, prompt, _ in steps) == sum(j.prompt for j in workload.jobs)
    assert sum(rows for *_, rows in steps) == sum(j.output - 1 for j in workload.jobs)
    for index, report in enumerate(result.instances):
        mine = [(start, end) for i, start, end, _, _ in steps if i == index]
        assert report.busy_s == pytest.approx(sum(end - start for start, end in mine))
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(mine)), "two steps at once"
    # Little: the time-average of those who decode is their rate times the time each decodes.
    span = max(t.last for t in result.trails)
    present = sum((end - start) * rows for i, start, end, _, rows in steps if i == 1) / span
    first_step = {}
    for i, start, end, _, rows in steps:
        if i == 1 and rows:
            first_step[end] = start
    lived = 0.0
    for trail in (t for t in result.trails if t.output > 1):
        ends = sorted(end for end in first_step if end <= trail.last)
        lived += trail.last - first_step[ends[-(trail.output - 1)]]
    assert present == pytest.approx(lived / span)


def test_links_carry_the_kv_that_moves() -> None:
    deployment, workload = CASES["one pair"]
    result = simulate(deployment, workload)
    moved = sum(j.prompt for j in workload.jobs if j.output > 1) * 1000.0
    assert result.links["out0"].carried == pytest.approx(moved)
    assert result.links["in1"].carried == pytest.approx(moved)
    assert result.links["in1"].busy_s == pytest.approx(moved / 1e8, rel=1e-6)


def test_moves_that_share_a_link_take_longer() -> None:
    both = Workload((Job(400, 3, 0.0), Job(400, 3, 0.0)))
    pair = split(2, 2, model=StraightLinear(kv_bytes_per_token=1e5))
    apart = simulate(pair, both)
    shared = simulate(replace(pair, routes={(0, 2): ("out0",), (1, 3): ("out0",)}), both)
    gap = [max(t.owned - t.first for t in r.trails) for r in (apart, shared)]
    assert gap[0] == pytest.approx(0.4)
    assert gap[1] == pytest.approx(0.8)


def test_prefill_keeps_the_kv_until_it_is_pulled() -> None:
    """A slow link fills the prefill instance: later prompts wait for room there, not for its time."""
    slow = on_ports([spec(Role.PREFILL, 1024), spec(Role.DECODE)], 1e5)
    workload = Workload(tuple(Job(500, 2, 0.0) for _ in range(6)))
    result = simulate(slow, workload)
    assert result.instances[0].kv_peak_blocks == 64
    firsts = sorted(t.first for t in result.trails)
    assert firsts[1] < 1.0 < 5.0 < firsts[2]


def test_a_prefix_computed_once_is_not_computed_again() -> None:
    blocks = (1, 2, 3, 4)
    twice = Workload((Job(256, 4, 0.0, blocks), Job(256, 4, 5.0, (1, 2, 3, 9))), prefix_tokens=64)
    deployment = mixed(prefix_cache=True)
    result = simulate(deployment, twice)
    fresh = simulate(mixed(), twice)
    assert result.trails[1].ttft_s == pytest.approx(0.010 + 64 * 1e-4)
    assert fresh.trails[1].ttft_s == pytest.approx(0.010 + 256 * 1e-4)


def test_a_request_too_large_for_the_pool_is_refused_with_a_reason() -> None:
    result = simulate(split(kv_tokens=1024), Workload((Job(2000, 5, 0.0), Job(100, 5, 0.0))))
    assert "2005 tokens" in result.trails[0].refused
    assert result.trails[0].ttft_s == float("inf")
    assert result.attainment(Slo(1.0, 1.0)) == 0.5


def test_order_of_jobs_in_the_list_does_not_matter() -> None:
    deployment, workload = CASES["two and two"]
    order = np.random.default_rng(0).permutation(len(workload.jobs))
    shuffled = simulate(deployment, Workload(tuple(workload.jobs[i] for i in order)))
    straight = simulate(deployment, workload)
    assert [t.last for t in shuffled.trails] == [straight.trails[i].last for i in order]


def test_refusals() -> None:
    with pytest.raises(CannotPlan, match="holds no requests"):
        simulate(split(), Workload(()))
    with pytest.raises(CannotPlan, match="one that decodes"):
        Deployment((spec(Role.PREFILL),))
    with pytest.raises(CannotPlan, match="bandwidth above 0"):
        on_ports([spec(Role.MIXED)], 0.0)
