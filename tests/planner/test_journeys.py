"""The parts of each request's way: in order, without gaps, and the same as the run without them tells."""

from __future__ import annotations

from itertools import pairwise

import pytest

from distserve_planner.simulation.journeys import PARTS, journeys
from distserve_planner.simulation.run import simulate
from tests.planner import arrange

CASES = {
    "split": (arrange.split(1, 2), 6.0),
    "mixed": (arrange.mixed(2), 6.0),
    "little room": (arrange.split(2, 1, kv_tokens=2000), 9.0),
}


@pytest.mark.parametrize("name", CASES)
def test_parts_follow_each_other_from_arrival_to_last_token(name: str) -> None:
    deployment, rate = CASES[name]
    workload = arrange.jobs(120, rate, seed=3)
    found = journeys(deployment, workload, len(workload.jobs))
    told = sorted((t for t in simulate(deployment, workload).trails if not t.refused), key=lambda t: t.arrival)
    assert len(found) == len(told)
    for way, trail in zip(found, told, strict=True):
        parts = list(way.parts)
        assert [name for name, _, _ in parts] == sorted((name for name, _, _ in parts), key=PARTS.index)
        assert parts[0][1] == way.arrival and parts[-1][2] == way.last
        for (_, _, end), (_, start, _) in pairwise(parts):
            assert start == pytest.approx(end)
        assert (way.first, way.last) == pytest.approx((trail.first, trail.last))
        assert (way.prefill, way.decode) == (trail.prefill, trail.decode)
        if way.prefill != way.decode and trail.output > 1:
            assert way.owned == pytest.approx(trail.owned)


def parts_of(name: str) -> set[str]:
    deployment, rate = CASES[name]
    ways = journeys(deployment, arrange.jobs(120, rate, seed=3), 120)
    return {part for way in ways for part, _, _ in way.parts}


def test_each_case_shows_the_parts_it_should() -> None:
    assert parts_of("mixed") == {"prefill queue", "prefill", "decode"}
    assert parts_of("split") >= {"prefill queue", "prefill", "transfer", "decode queue", "decode"}
    assert "waits for room" in parts_of("little room")


def test_only_the_first_to_arrive_are_run() -> None:
    workload = arrange.jobs(50, 6.0, seed=1)
    found = journeys(CASES["split"][0], workload, 10)
    assert [way.arrival for way in found] == sorted(job.arrival_s for job in workload.jobs)[:10]
