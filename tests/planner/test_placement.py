"""Bandwidth-aware placement against brute force, its constraints, and what the pod shape does to paths."""

from __future__ import annotations

import itertools
import random

import pytest

from distserve_planner.cluster import Cluster, Node, Pod, cluster_of, uniform
from distserve_planner.hardware import gpu_named
from distserve_planner.placement import Flow, Path, Placement, Segment, evaluate, place
from distserve_planner.refusal import CannotPlan

A100, H100 = gpu_named("a100"), gpu_named("h100")


def brute_force(
    cluster: Cluster, segments: list[Segment], flows: list[Flow], together: tuple[tuple[int, ...], ...]
) -> float:
    """The least cost over every assignment that fits: overload first, transfer time second."""
    every = cluster.domains
    best = float("inf")
    for at in itertools.product(range(len(every)), repeat=len(segments)):
        used = [sum(s.gpus for s, d in zip(segments, at, strict=True) if d == i) for i in range(len(every))]
        fits = all(u <= d.gpus for u, d in zip(used, every, strict=True))
        fits = fits and all(every[d].gpu == s.gpu for s, d in zip(segments, at, strict=True))
        if fits and all(len({every[at[s]].node for s in group}) == 1 for group in together):
            best = min(best, cost(evaluate(cluster, segments, flows, at, exact=True)))
    return best


def cost(placement: Placement) -> float:
    return 1e4 * max(0.0, placement.worst - 1) + placement.transfer_load


def random_case(rng: random.Random) -> tuple[Cluster, list[Segment], list[Flow], tuple[tuple[int, ...], ...]]:
    domains = rng.choice([(4,), (2, 2), (4, 4)])
    types = [A100, rng.choice([A100, H100])]
    nodes = tuple(Node(f"n{i}", types[i], domains, rng.choice([1e9, 3e9, 40e9])) for i in range(2))
    cluster = Cluster("c", nodes, rng.choice(list(Pod)))
    segments = [Segment(f"i{i}", 0, rng.choice([1, 2]), rng.choice(types)) for i in range(rng.randint(2, 5))]
    half = len(segments) // 2
    flows = [
        Flow(p, d, rng.choice([0.2e9, 1e9, 5e9]))
        for p in range(half)
        for d in range(half, len(segments))
        if rng.random() < 0.8
    ]
    first_type = [i for i, s in enumerate(segments) if s.gpu == A100]
    together = (tuple(first_type[:2]),) if len(first_type) > 1 and rng.random() < 0.4 else ()
    return cluster, segments, flows, together


@pytest.mark.parametrize("seed", range(40))
def test_the_program_finds_what_brute_force_finds(seed):
    cluster, segments, flows, together = random_case(random.Random(seed))
    best = brute_force(cluster, segments, flows, together)
    if best == float("inf"):
        with pytest.raises(CannotPlan):
            place(cluster, segments, flows, together)
        return
    found = place(cluster, segments, flows, together)
    assert found.exact
    assert cost(found) == pytest.approx(best, rel=1e-6, abs=1e-9)


def check(cluster: Cluster, segments: list[Segment], placement: Placement) -> None:
    """No GPU twice, every segment in one domain of its type."""
    taken = set()
    for segment, d, gpus in zip(segments, placement.domains, placement.gpus, strict=True):
        domain = cluster.domains[d]
        assert domain.gpu == segment.gpu and len(gpus) == segment.gpus
        for gpu in gpus:
            assert domain.first_gpu <= gpu < domain.first_gpu + domain.gpus
            assert (domain.node, gpu) not in taken
            taken.add((domain.node, gpu))


def test_pairs_that_talk_share_nvlink_when_they_can():
    cluster = uniform("two", A100, nodes=2, gpus=4)
    segments = [Segment(name, 0, 2, A100) for name in ("p0", "p1", "d0", "d1")]
    flows = [Flow(0, 2, 2e9), Flow(1, 3, 2e9)]
    found = place(cluster, segments, flows)
    check(cluster, segments, found)
    assert found.paths == (Path.NVLINK, Path.NVLINK)
    assert found.worst < 0.01


def test_traffic_avoids_a_link_that_it_would_overload():
    nodes = [Node("slow", A100, (2,), 1e9), Node("fast", A100, (2,), 50e9), Node("other", A100, (2,), 50e9)]
    cluster = Cluster("c", tuple(nodes))
    found = place(cluster, [Segment("p", 0, 2, A100), Segment("d", 0, 2, A100)], [Flow(0, 1, 5e9)])
    assert sorted(cluster.domains[d].node for d in found.domains) == [1, 2]
    assert found.worst == pytest.approx(5 / 45)


def test_an_overload_that_cannot_be_avoided_is_shown():
    cluster = uniform("two", A100, nodes=2, gpus=1, network_gbs=1)
    found = place(cluster, [Segment("p", 0, 1, A100), Segment("d", 0, 1, A100)], [Flow(0, 1, 3e9)])
    assert found.worst == pytest.approx(3 / 0.9)
    over = {link.link.split(" network ")[1] for link in found.links if link.share > 1}
    assert over == {"out", "in"}


def test_pods_of_one_instance_have_no_nvlink_between_them():
    document = {"nodes": [{"gpu": "a100", "gpus": 4, "network_gbs": 10}], "pod": "instance"}
    segments = [Segment("p", 0, 2, A100), Segment("d", 0, 2, A100)]
    apart = place(cluster_of(document), segments, [Flow(0, 1, 1e9)])
    shared = place(cluster_of(document | {"pod": "slice"}), segments, [Flow(0, 1, 1e9)])
    assert (apart.paths, shared.paths) == ((Path.NETWORK,), (Path.NVLINK,))
    assert shared.transfer_load < apart.transfer_load / 10


def test_low_affinity_keeps_same_stage_segments_on_one_node():
    cluster = uniform("two", A100, nodes=2, gpus=4)
    segments = [Segment("p", 0, 2, A100), Segment("p", 1, 2, A100), Segment("d", 0, 2, A100), Segment("d", 1, 2, A100)]
    found = place(cluster, segments, [Flow(0, 2, 1e9), Flow(1, 3, 1e9)], together=[(0, 2), (1, 3)])
    node = [cluster.domains[d].node for d in found.domains]
    assert node[0] == node[2] and node[1] == node[3] and node[0] != node[1]
    check(cluster, segments, found)


def test_a_cluster_too_large_for_the_program_is_still_placed_well():
    cluster = uniform("many", A100, nodes=8, gpus=8)
    segments = [Segment(f"p{i}", 0, 2, A100) for i in range(16)] + [Segment(f"d{i}", 0, 2, A100) for i in range(16)]
    flows = [Flow(i, 16 + i, 1e9) for i in range(16)]
    found = place(cluster, segments, flows)
    check(cluster, segments, found)
    assert not found.exact
    assert set(found.paths) == {Path.NVLINK}


def test_what_cannot_be_placed_says_why():
    cluster = uniform("one", A100, nodes=1, gpus=4)
    with pytest.raises(CannotPlan, match="the widest of this cluster has 4"):
        place(cluster, [Segment("p", 0, 8, A100)], [])
    with pytest.raises(CannotPlan, match="6 × a100-80g are needed, but the cluster has 4"):
        place(cluster, [Segment(str(i), 0, 2, A100) for i in range(3)], [])
    with pytest.raises(CannotPlan, match="the widest of this cluster has 0"):
        place(cluster, [Segment("p", 0, 1, H100)], [])
