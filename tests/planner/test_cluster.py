"""Cluster files: what they say, and what is wrong with those that cannot be used."""

from __future__ import annotations

import pytest

from distserve_planner.cluster import Pod, cluster_of, read_cluster, uniform
from distserve_planner.hardware import gpu_named
from distserve_planner.refusal import CannotPlan

GOOD = """
version: 1
pod: slice
network_gbs: 25
gpu_types:
  a100-big: {like: a100-80g, memory_gib: 96}
nodes:
  - {name: left, gpu: a100-80g, gpus: 8, nvlink_domains: [4, 4]}
  - {name: right, count: 3, gpu: a100-big, gpus: 8, price_per_hour: 2.5, network_gbs: 50}
"""


def test_a_cluster_file_is_read(tmp_path):
    path = tmp_path / "lab.yaml"
    path.write_text(GOOD)
    cluster = read_cluster(path)
    assert (cluster.name, cluster.gpus, cluster.pod) == ("lab", 32, Pod.SLICE)
    assert [node.name for node in cluster.nodes] == ["left", "right-0", "right-1", "right-2"]
    assert [domain.gpus for domain in cluster.domains] == [4, 4, 8, 8, 8]
    assert [domain.first_gpu for domain in cluster.domains] == [0, 4, 0, 0, 0]
    small, big = cluster.gpu_types
    assert (cluster.widest(small), cluster.widest(big), cluster.count_of(big)) == (4, 8, 24)
    assert cluster.price_per_hour({big: 8}) == 20.0
    assert cluster.nodes[0].network_bytes_s == 25e9 and cluster.nodes[1].network_bytes_s == 50e9


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"noodes": []}, "did you mean 'nodes'"),
        ({"nodes": [{"gpu": "h100", "nvlinkgbs": 8}]}, "did you mean 'nvlink_gbs'"),
        ({"nodes": [{"gpu": "h10", "gpus": 8}]}, "did you mean 'h100'"),
        ({"nodes": []}, "at least one node"),
        ({"nodes": [{"gpus": 8}]}, "`gpu` is missing"),
        ({"nodes": [{"gpu": "h100", "gpus": 0}]}, "not a whole number of at least 1"),
        ({"nodes": [{"gpu": "h100", "gpus": 8, "nvlink_domains": [4]}]}, "hold 4 GPUs, but the node has 8"),
        ({"nodes": [{"gpu": "h100"}], "pod": "slices"}, "did you mean 'slice'"),
        ({"nodes": [{"gpu": "h100"}], "network_gbs": -1}, "not a number above 0"),
        ({"nodes": [{"gpu": "h100"}], "version": 2}, "reads version 1"),
        ({"nodes": [{"gpu": "h100", "name": "a"}, {"gpu": "h100", "name": "a"}]}, "two nodes are named 'a'"),
        ({"nodes": ["h100"]}, "keys and values are needed"),
    ],
)
def test_a_bad_cluster_is_refused_with_a_sentence(document, words):
    with pytest.raises(CannotPlan, match=words):
        cluster_of(document)


def test_a_missing_or_broken_file_is_refused(tmp_path):
    with pytest.raises(CannotPlan, match="cannot read"):
        read_cluster(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("nodes: [")
    with pytest.raises(CannotPlan, match="not valid YAML"):
        read_cluster(tmp_path / "bad.yaml")


def test_a_uniform_cluster_is_so_many_equal_nodes():
    cluster = uniform("x", gpu_named("h100"), 4, 8)
    assert cluster.gpus == 32 and cluster.widest(gpu_named("h100")) == 8
