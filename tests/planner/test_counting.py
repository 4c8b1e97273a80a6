"""Counted instances decide as the machines do: outcomes equal to the last bit, over drawn deployments and loads."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from distserve.core.types import Role
from distserve.sched.batching import BatchPolicy
from distserve_planner.simulation.deployment import Deployment, InstanceSpec, on_ports, open_door
from distserve_planner.simulation.quick import QuickWorld, covers
from distserve_planner.simulation.run import simulate
from distserve_planner.simulation.tally import NotCounted
from distserve_planner.workload import Job, Workload
from tests.planner.arrange import StraightLinear, jobs, mixed, spec
from tests.planner.test_simulation import CASES


def same(deployment: Deployment, workload: Workload) -> bool:
    """Asserts that both tell the same; False where counts decline."""
    machines = simulate(deployment, workload, machines=True)
    try:
        counted = QuickWorld(deployment, workload).run()
    except NotCounted:
        return False
    assert counted.trails == machines.trails
    assert counted.digest == machines.digest
    for mine, theirs in zip(counted.instances, machines.instances, strict=True):
        assert (mine.steps, mine.preemptions) == (theirs.steps, theirs.preemptions)
        assert mine.busy_s == pytest.approx(theirs.busy_s)
    assert counted.links == machines.links
    return True


@pytest.mark.parametrize("name", [name for name in CASES if covers(CASES[name][0])])
def test_named_cases(name: str) -> None:
    assert same(*CASES[name])


def drawn(seed: int) -> tuple[Deployment, Workload]:
    rng = random.Random(seed)

    def one(role: Role) -> InstanceSpec:
        model = StraightLinear(stages=rng.choice((1, 1, 2)), per_context=rng.choice((0.0, 1e-6)))
        made = spec(
            role,
            kv_tokens=rng.choice((1536, 4096, 1 << 14)),
            model=model,
            batching=rng.choice(list(BatchPolicy)),
            max_sequences=rng.choice((3, 16, 64)),
            headroom_share=rng.choice((0.0, 0.02, 0.1)),
        )
        overlap, stall = rng.choice((0.0, 0.4, 1.0)), rng.choice((0.0, 1e-5))
        return replace(made, pipeline_overlap=overlap, pull_stall_s=stall, block_size=rng.choice((8, 16)))

    counts = {Role.PREFILL: rng.randint(1, 2), Role.DECODE: rng.randint(1, 3), Role.MIXED: rng.choice((0, 0, 1))}
    if rng.random() < 0.25:
        counts = {Role.MIXED: rng.randint(1, 3)}
    specs = [one(role) for role, n in counts.items() for _ in range(n)]
    deployment = on_ports(specs, rng.choice((1e5, 1e7, 1e9)), latency_s=rng.choice((0.0, 0.0, 0.002)))
    longest = rng.choice((40, 300, 600))
    workload = jobs(
        rng.randint(30, 90), rng.choice((1.0, 10.0, 60.0)), seed, prompt=longest, output=rng.choice((2, 50, 150))
    )
    return deployment, workload


def test_drawn_cases() -> None:
    counted = sum(same(*drawn(seed)) for seed in range(60))
    assert counted >= 50, f"counts declined in {60 - counted} of 60 cases"


def test_drawn_cases_in_which_prompts_overflow() -> None:
    counted = spilt = 0
    for seed in range(30):
        deployment, workload = drawn(seed)
        deployment = replace(deployment, cluster=open_door(random.Random(seed).choice((1, 200, 800))))
        counted += same(deployment, workload)
        trails = simulate(deployment, workload).trails
        spilt += sum(deployment.instances[t.prefill].role is Role.DECODE for t in trails)
    assert counted >= 25 and spilt > 150


def test_what_counts_do_not_cover_goes_to_the_machines() -> None:
    cached = mixed(prefix_cache=True)
    assert not covers(cached)
    assert not covers(replace(mixed(), cluster=replace(mixed().cluster, max_open_requests=5)))
    refusing = replace(mixed(), cluster=replace(mixed().cluster, max_open_requests=5))
    crowd = Workload(tuple(Job(100, 50, 0.0) for _ in range(8)))
    result = simulate(refusing, crowd)
    assert sum("its limit" in t.refused for t in result.trails) == 3
