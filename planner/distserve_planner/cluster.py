"""The machines to plan for: nodes, GPUs, NVLink domains, and the links between them, read from a YAML file.

Validated on reading; an unknown key names the nearest known one. Bandwidths are in GB/s (10^9 bytes a second) of one
direction. ``pod`` says what one pod holds, because CUDA IPC and so NVLink stop at the pod (PLATFORM §1.4): ``slice`` is
a node's GPUs in one pod, so that instances of one node reach each other over NVLink; ``instance`` is one instance a
pod, so that KV between any two instances goes over the network.

    version: 1
    pod: slice
    network_gbs: 25
    gpu_types:
      a100-big: {like: a100-80g, memory_gib: 96}
    nodes:
      - {name: left, gpu: a100-80g, gpus: 8, nvlink_domains: [4, 4]}
      - {name: right, count: 3, gpu: a100-big, gpus: 8, price_per_hour: 2.5}
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from distserve.core.documents import parse_yaml
from distserve_planner.hardware import Gpu, gpu_described, gpu_named
from distserve_planner.refusal import CannotPlan, mapping, nearest, number, only_known, whole

VERSION = 1
MOST_NODES, MOST_GPUS = 10_000, 1024  # of a cluster, of a node
DEFAULT_NETWORK_GBS = 3.125  # 25 Gbit/s, the paper's testbed
_KEYS = ("version", "name", "pod", "network_gbs", "gpu_types", "nodes")
_NODE_KEYS = (
    "name",
    "count",
    "gpu",
    "gpus",
    "nvlink_domains",
    "nvlink_gbs",
    "pcie_gbs",
    "network_gbs",
    "price_per_hour",
)


class Pod(StrEnum):
    """What one pod holds; see the module docstring."""

    SLICE = "slice"
    INSTANCE = "instance"


@dataclass(frozen=True, slots=True)
class Domain:
    """GPUs of one node that reach each other at full speed: over NVLink, or PCIe where there is none."""

    node: int
    index: int
    first_gpu: int
    gpus: int
    gpu: Gpu

    @property
    def nvlink(self) -> bool:
        return self.gpu.nvlink_bytes_s > 0

    @property
    def fabric_bytes_s(self) -> float:
        """Of one GPU's port, one direction."""
        return self.gpu.nvlink_bytes_s or self.gpu.pcie_bytes_s


@dataclass(frozen=True, slots=True)
class Node:
    """One machine. ``domains`` are GPU counts; ``network_bytes_s`` is of the whole node, one direction."""

    name: str
    gpu: Gpu
    domains: tuple[int, ...]
    network_bytes_s: float

    @property
    def gpus(self) -> int:
        return sum(self.domains)


@dataclass(frozen=True, slots=True)
class Cluster:
    """Nodes and how they are joined."""

    name: str
    nodes: tuple[Node, ...]
    pod: Pod = Pod.SLICE

    @property
    def gpus(self) -> int:
        return sum(node.gpus for node in self.nodes)

    @property
    def gpu_types(self) -> tuple[Gpu, ...]:
        """The types present, in the order of the nodes."""
        return tuple(dict.fromkeys(node.gpu for node in self.nodes))

    @property
    def domains(self) -> tuple[Domain, ...]:
        """Every NVLink domain, node by node."""
        found = []
        for n, node in enumerate(self.nodes):
            first = 0
            for i, size in enumerate(node.domains):
                found.append(Domain(n, i, first, size, node.gpu))
                first += size
        return tuple(found)

    def count_of(self, gpu: Gpu) -> int:
        """GPUs of one type."""
        return sum(node.gpus for node in self.nodes if node.gpu == gpu)

    def widest(self, gpu: Gpu) -> int:
        """The most GPUs of this type in one domain: the greatest tensor-parallel degree."""
        return max((size for node in self.nodes if node.gpu == gpu for size in node.domains), default=0)

    def price_per_hour(self, gpus: Mapping[Gpu, int]) -> float:
        """Of so many GPUs of each type; 0 where no price is told."""
        return sum(gpu.price_per_hour * count for gpu, count in gpus.items())


def uniform(name: str, gpu: Gpu, nodes: int, gpus: int, network_gbs: float = DEFAULT_NETWORK_GBS) -> Cluster:
    """``nodes`` equal machines of ``gpus`` GPUs in one domain each."""
    node = Node("", gpu, (gpus,), network_gbs * 1e9)
    return Cluster(name, tuple(dataclasses.replace(node, name=f"node-{i}") for i in range(nodes)))


def read_cluster(path: str | Path) -> Cluster:
    """A cluster file. Raises CannotPlan with a sentence."""
    file = Path(path)
    try:
        document = parse_yaml(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CannotPlan(f"cannot read {file}: {error.strerror or error}") from error
    except ValueError as error:  # no UTF-8, or no YAML
        raise CannotPlan(f"{file} {error}") from error
    return cluster_of(mapping(document, str(file)), file.stem)


def cluster_of(document: Mapping[str, Any], name: str = "cluster") -> Cluster:
    """A cluster from a document as ``read_cluster`` reads it. Raises CannotPlan."""
    only_known(document, _KEYS, "cluster")
    if document.get("version", VERSION) != VERSION:
        raise CannotPlan(f"cluster: version {document['version']!r} is not known; this planner reads version {VERSION}")
    pod = document.get("pod", Pod.SLICE)
    if pod not in list(Pod):
        hint = nearest(str(pod), ("slice", "instance"))
        raise CannotPlan(f"cluster.pod: {pod!r} is neither slice nor instance{hint}")
    described = mapping(document.get("gpu_types") or {}, "gpu_types")
    types = {str(k): gpu_described(str(k), mapping(v, f"gpu_types.{k}")) for k, v in described.items()}
    network = number(document.get("network_gbs", DEFAULT_NETWORK_GBS), "cluster.network_gbs")
    listed = document.get("nodes")
    if not isinstance(listed, Sequence) or isinstance(listed, str) or not listed:
        raise CannotPlan("cluster: `nodes` must list at least one node, such as {gpu: h100, gpus: 8}")
    nodes: list[Node] = []
    for i, each in enumerate(listed):
        nodes += _nodes_of(mapping(each, f"nodes[{i}]"), i, types, network)
        if len(nodes) > MOST_NODES:
            raise CannotPlan(f"cluster: it has more than the {MOST_NODES} nodes that can be planned for")
    twice = [name for name, count in Counter(node.name for node in nodes).items() if count > 1]
    if twice:
        raise CannotPlan(f"cluster: two nodes are named {twice[0]!r}")
    return Cluster(str(document.get("name", name)), tuple(nodes), Pod(pod))


def _nodes_of(document: Mapping[str, Any], i: int, types: Mapping[str, Gpu], network: float) -> list[Node]:
    where = f"nodes[{i}]"
    only_known(document, _NODE_KEYS, where)
    if "gpu" not in document:
        raise CannotPlan(f"{where}: `gpu` is missing, the type of its GPUs")
    kind = str(document["gpu"])
    gpu = types[kind] if kind in types else gpu_named(kind)
    changed: dict[str, Any] = {}
    for key, field in (("nvlink_gbs", "nvlink_bytes_s"), ("pcie_gbs", "pcie_bytes_s")):
        if key in document:
            changed[field] = number(document[key], f"{where}.{key}", -1.0) * 1e9
    if "price_per_hour" in document:
        changed["price_per_hour"] = number(document["price_per_hour"], f"{where}.price_per_hour", -1.0)
    gpu = dataclasses.replace(gpu, **changed)
    gpus = whole(document.get("gpus", 1), f"{where}.gpus", most=MOST_GPUS)
    node = Node(
        str(document.get("name", f"node-{i}")),
        gpu,
        _domains(document.get("nvlink_domains"), gpus, where),
        number(document.get("network_gbs", network), f"{where}.network_gbs") * 1e9,
    )
    count = whole(document.get("count", 1), f"{where}.count", most=MOST_NODES)
    if count == 1:
        return [node]
    return [dataclasses.replace(node, name=f"{node.name}-{c}") for c in range(count)]


def _domains(value: Any, gpus: int, where: str) -> tuple[int, ...]:
    if value is None:
        return (gpus,)
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise CannotPlan(f"{where}.nvlink_domains: a list of GPU counts is needed, such as [4, 4]")
    sizes = tuple(whole(size, f"{where}.nvlink_domains") for size in value)
    if sum(sizes) != gpus:
        raise CannotPlan(f"{where}: nvlink_domains {list(sizes)} hold {sum(sizes)} GPUs, but the node has {gpus}")
    return sizes
