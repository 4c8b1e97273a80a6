"""What the search chooses from: shapes of an instance, units of instances, and the ways to enumerate them.

A *shape* is one instance's GPU type, TP and PP. A *unit* is the least that serves alone: so many prefill and decode
instances, or so many mixed ones. Knows sizes and memory, no time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from distserve_planner.cluster import Cluster, Node
from distserve_planner.hardware import Gpu
from distserve_planner.memory import DEFAULT_RULE, MemoryRule, shapes_that_fit, why_nothing_fits
from distserve_planner.models import ModelFacts
from distserve_planner.refusal import CannotPlan

DEGREES = (1, 2, 3, 4, 6, 8, 16)
_UNEVEN = 1.05  # the largest stage's layers against the mean's


@dataclass(frozen=True, slots=True)
class Shape:
    """One instance: GPU type, tensor- and pipeline-parallel degree."""

    gpu: Gpu
    tp: int = 1
    pp: int = 1

    @property
    def gpus(self) -> int:
        return self.tp * self.pp

    def __str__(self) -> str:
        return f"{self.gpu.name} tp={self.tp} pp={self.pp}"


@dataclass(frozen=True, slots=True)
class Unit:
    """Instances that serve together. Either ``prefill`` and ``decode`` are given, or ``mixed``.

    ``policy`` names the batching limits. ``one_node``: same-stage segments share a node, so KV moves over its fabric.
    """

    prefill: Shape | None = None
    decode: Shape | None = None
    mixed: Shape | None = None
    n_prefill: int = 0
    n_decode: int = 0
    n_mixed: int = 0
    policy: str = ""
    one_node: bool = False

    @property
    def gpus(self) -> int:
        return sum(shape.gpus * count for shape, count in self.parts())

    @property
    def colocated(self) -> bool:
        return self.mixed is not None

    @property
    def serves(self) -> bool:
        """Whether it serves alone; a phase alone does not."""
        return self.colocated or (self.prefill is not None and self.decode is not None)

    def parts(self) -> Iterator[tuple[Shape, int]]:
        """(shape, count) of each kind of instance."""
        for shape, count in ((self.prefill, self.n_prefill), (self.decode, self.n_decode), (self.mixed, self.n_mixed)):
            if shape is not None and count:
                yield shape, count

    def gpus_by_type(self) -> Mapping[Gpu, int]:
        found: dict[Gpu, int] = {}
        for shape, count in self.parts():
            found[shape.gpu] = found.get(shape.gpu, 0) + shape.gpus * count
        return found

    @property
    def price_per_hour(self) -> float:
        """0 when no type's price is told."""
        return sum(gpu.price_per_hour * count for gpu, count in self.gpus_by_type().items())

    @property
    def key(self) -> str:
        """Names the unit among all others; also its order among equals."""
        return str(self)

    def __str__(self) -> str:
        if self.mixed is not None:
            words = f" {self.policy}" if self.policy else ""
            return f"{self.n_mixed} × mixed ({self.mixed}){words}"
        near = " on one node" if self.one_node else ""
        return f"{self.n_prefill} × prefill ({self.prefill}) + {self.n_decode} × decode ({self.decode}){near}"

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        roles = (("prefill", self.prefill, self.n_prefill), ("decode", self.decode, self.n_decode))
        found: dict[str, Any] = {
            role: {"gpu": shape.gpu.name, "tp": shape.tp, "pp": shape.pp, "n": count}
            for role, shape, count in (*roles, ("mixed", self.mixed, self.n_mixed))
            if shape is not None
        }
        return found | {"gpus": self.gpus, "policy": self.policy, "one_node": self.one_node}


def shapes(model: ModelFacts, cluster: Cluster, least_tokens: int, rule: MemoryRule = DEFAULT_RULE) -> list[Shape]:
    """Every shape that fits the cluster and holds ``least_tokens`` of KV: a stage inside one domain (TP), stages
    anywhere.

    Raises CannotPlan, with what would do, when there is none.
    """
    found: list[Shape] = []
    reasons = []
    for gpu in cluster.gpu_types:
        widest, total = cluster.widest(gpu), _stages_at_most(cluster, gpu)
        pairs = [
            (tp, pp)
            for tp in DEGREES
            if tp <= widest
            for pp in DEGREES
            if pp <= total[tp] and _even(model.layers, pp) and model.why_not(tp, pp) is None
        ]
        fitting = shapes_that_fit(model, gpu, pairs, least_tokens, rule)
        found += [Shape(gpu, tp, pp) for (tp, pp), _ in fitting]
        reasons.append(why_nothing_fits(model, gpu, pairs or [(1, 1)], least_tokens, rule))
    if not found:
        raise CannotPlan(reasons[0])
    return found


def _even(layers: int, pp: int) -> bool:
    """Whether stages are so alike that the largest costs little more than the mean."""
    return pp <= layers and math.ceil(layers / pp) * pp < _UNEVEN * layers


def _stages_at_most(cluster: Cluster, gpu: Gpu) -> dict[int, int]:
    """For each TP degree, how many stages of it the cluster's domains of this type hold together."""
    sizes = [d.gpus for d in cluster.domains if d.gpu == gpu]
    return {tp: sum(size // tp for size in sizes) for tp in DEGREES}


def low_affinity_pairs(cluster: Cluster, found: Iterable[Shape]) -> Iterator[Unit]:
    """Algorithm 2: one prefill and one decode instance whose segments of the same layers share a node."""
    every = list(found)
    for p in every:
        for d in every:
            if d.gpu == p.gpu and node_segments(cluster, p, d):
                yield Unit(prefill=p, decode=d, n_prefill=1, n_decode=1, one_node=True)


def node_segments(cluster: Cluster, p: Shape, d: Shape) -> int:
    """Into how few nodes a pair can be cut so that each holds the same layers of both phases; 0 when into none.

    The paper's inter-node pipeline degree: it divides both degrees, and each cut has its own stages inside the node.
    """
    nodes = [n for n in cluster.nodes if n.gpu == p.gpu]
    for cuts in range(1, len(nodes) + 1):
        if p.pp % cuts == 0 and d.pp % cuts == 0:
            held = sum(min(_stages_in(n, p.tp, p.pp // cuts, d.tp, d.pp // cuts), cuts) for n in nodes)
            if held >= cuts:
                return cuts
    return 0


def _stages_in(node: Node, tp_p: int, pp_p: int, tp_d: int, pp_d: int) -> int:
    """Cuts that one node holds, its domains taken one stage at a time."""
    free, cuts = list(node.domains), 0
    while True:
        for need in sorted([tp_p] * pp_p + [tp_d] * pp_d, reverse=True):
            where = max(range(len(free)), key=lambda i: free[i])
            if free[where] < need:
                return cuts
            free[where] -= need
        cuts += 1


def ratios(p: Shape, d: Shape, capacity: Mapping[Gpu, int], most_gpus: int, one_node: bool = False) -> Iterator[Unit]:
    """Free ratios: every n prefill and m decode instances within the GPUs there are and ``most_gpus``, lowest terms
    first.
    """
    for n in range(1, most_gpus // p.gpus + 1):
        for m in range(1, (most_gpus - n * p.gpus) // d.gpus + 1):
            unit = Unit(prefill=p, decode=d, n_prefill=n, n_decode=m, one_node=one_node)
            if all(count <= capacity.get(gpu, 0) for gpu, count in unit.gpus_by_type().items()):
                yield unit
