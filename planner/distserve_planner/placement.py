"""Which GPUs each instance sits on, so that KV travels the fastest links without overloading any.

A *segment* is one pipeline stage of one instance: its GPUs share an NVLink domain. *Flows* are the KV bytes a second
that prefill segments send to decode segments. The placement is a mixed-integer program (scipy ``milp``): it minimises
the seconds of transfer a second of traffic needs (each flow over the bandwidth of the path it takes), and before that
any overload of a link. DistServe's low node-affinity rule (same-stage segments share a node) is a constraint. Small
clusters are solved exactly; beyond ``EXACT_BINARIES`` a greedy descent answers, and the result says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from distserve_planner.cluster import Cluster, Domain, Pod
from distserve_planner.hardware import Gpu
from distserve_planner.refusal import CannotPlan

EXACT_BINARIES = 160
TIME_LIMIT_S = 20.0
_OVERLOAD_COST = 1e4  # one whole link too much outweighs any transfer time
_NIC_SHARE = 0.9  # of a link's datasheet rate that KV transfers reach (Vidur's H100 NVLink: 348 of 450 GB/s at 64 MiB)


class Path(StrEnum):
    """How two segments reach each other."""

    NVLINK = "nvlink"
    PCIE = "pcie"
    NETWORK = "network"


@dataclass(frozen=True, slots=True)
class Segment:
    """One stage of one instance: ``gpus`` of one type in one domain."""

    instance: str
    stage: int
    gpus: int
    gpu: Gpu


@dataclass(frozen=True, slots=True)
class Flow:
    """KV bytes a second from one segment to another, by their indices."""

    source: int
    target: int
    bytes_s: float


@dataclass(frozen=True, slots=True)
class LinkLoad:
    """Expected traffic of one link, one direction, against what it carries."""

    link: str
    bytes_s: float
    capacity_bytes_s: float

    @property
    def share(self) -> float:
        return self.bytes_s / self.capacity_bytes_s


@dataclass(frozen=True, slots=True)
class Placement:
    """``domains``: one index into ``cluster.domains`` per segment; ``gpus``: the GPU numbers on its node.

    ``transfer_load``: seconds of transfer per second, summed over the flows, if each had its path alone. ``exact``:
    proven best.
    """

    domains: tuple[int, ...]
    gpus: tuple[tuple[int, ...], ...]
    paths: tuple[Path, ...]
    links: tuple[LinkLoad, ...]
    transfer_load: float
    exact: bool

    @property
    def worst(self) -> float:
        """The greatest share of any link's capacity."""
        return max((link.share for link in self.links), default=0.0)


def place(
    cluster: Cluster, segments: Sequence[Segment], flows: Sequence[Flow], together: Sequence[Sequence[int]] = ()
) -> Placement:
    """The best placement of ``segments``. Each group in ``together`` shares a node.

    Raises CannotPlan when they do not fit.
    """
    where = _feasible_domains(cluster, segments)
    if len(segments) * len(cluster.domains) <= EXACT_BINARIES:
        return _exact(cluster, segments, flows, together, where)
    return evaluate(cluster, segments, flows, _Descent(cluster, segments, flows, where).run(together), exact=False)


def path_between(cluster: Cluster, a: Domain, b: Domain, same_instance: bool = False) -> Path:
    """The fastest way between a GPU of ``a`` and one of ``b``."""
    if a.node != b.node or (cluster.pod is Pod.INSTANCE and not same_instance):
        return Path.NETWORK
    return Path.NVLINK if a == b and a.nvlink else Path.PCIE


def path_bytes_s(cluster: Cluster, path: Path, source: Segment, target: Segment, a: Domain, b: Domain) -> float:
    """What one flow reaches alone: every GPU of a segment has its own port, a node one network link."""
    ports = min(source.gpus, target.gpus)
    match path:
        case Path.NVLINK:
            return _NIC_SHARE * ports * a.fabric_bytes_s
        case Path.PCIE:
            return _NIC_SHARE * ports * min(a.gpu.pcie_bytes_s, b.gpu.pcie_bytes_s)
        case Path.NETWORK:
            return _NIC_SHARE * min(cluster.nodes[a.node].network_bytes_s, cluster.nodes[b.node].network_bytes_s)


def evaluate(
    cluster: Cluster, segments: Sequence[Segment], flows: Sequence[Flow], domains: Sequence[int], exact: bool
) -> Placement:
    """Links and transfer time of a given assignment of segments to domains."""
    every = cluster.domains
    paths, load = [], 0.0
    carried: dict[tuple[str, int], float] = {}
    for flow in flows:
        a, b = every[domains[flow.source]], every[domains[flow.target]]
        path = path_between(cluster, a, b)
        paths.append(path)
        load += flow.bytes_s / path_bytes_s(cluster, path, segments[flow.source], segments[flow.target], a, b)
        for key in _links_of(path, every, a, b):
            carried[key] = carried.get(key, 0.0) + flow.bytes_s
    capacity, names = _capacities(cluster), _names(cluster)
    links = tuple(LinkLoad(names[k], carried.get(k, 0.0), c) for k, c in capacity.items() if k in carried or _shown(k))
    return Placement(tuple(domains), _gpus(every, segments, domains), tuple(paths), links, load, exact)


# ── links ────────────────────────────────────────────────────────────────────────────────────────────────────────────
# A link is (kind, index): ("nvlink" | "pcie", domain) or ("out" | "in", node).


def _links_of(path: Path, every: Sequence[Domain], a: Domain, b: Domain) -> Iterator[tuple[str, int]]:
    match path:
        case Path.NVLINK:
            yield "nvlink", every.index(a)
        case Path.PCIE:
            yield "pcie", every.index(a)
            if a != b:
                yield "pcie", every.index(b)
        case Path.NETWORK:
            yield "out", a.node
            yield "in", b.node


def _capacities(cluster: Cluster) -> dict[tuple[str, int], float]:
    """Bytes a second each link carries. Half of a domain's ports send while the other half receive."""
    found: dict[tuple[str, int], float] = {}
    for n, node in enumerate(cluster.nodes):
        found["out", n] = found["in", n] = _NIC_SHARE * node.network_bytes_s
    for i, domain in enumerate(cluster.domains):
        half = max(1.0, domain.gpus / 2)
        if domain.nvlink:
            found["nvlink", i] = _NIC_SHARE * half * domain.gpu.nvlink_bytes_s
        found["pcie", i] = _NIC_SHARE * half * domain.gpu.pcie_bytes_s
    return found


def _names(cluster: Cluster) -> dict[tuple[str, int], str]:
    names = {}
    for n, node in enumerate(cluster.nodes):
        names["out", n], names["in", n] = f"{node.name} network out", f"{node.name} network in"
    for i, domain in enumerate(cluster.domains):
        node = cluster.nodes[domain.node]
        which = f"{node.name}" + (f" domain {domain.index}" if len(node.domains) > 1 else "")
        names["nvlink", i], names["pcie", i] = f"{which} NVLink", f"{which} PCIe"
    return names


def _shown(key: tuple[str, int]) -> bool:
    return key[0] in ("out", "in")


def _gpus(every: Sequence[Domain], segments: Sequence[Segment], domains: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """GPU numbers on the node, handed out in the order of the segments."""
    taken = [domain.first_gpu for domain in every]
    found = []
    for segment, d in zip(segments, domains, strict=True):
        found.append(tuple(range(taken[d], taken[d] + segment.gpus)))
        taken[d] += segment.gpus
    return tuple(found)


def _feasible_domains(cluster: Cluster, segments: Sequence[Segment]) -> list[list[int]]:
    """For each segment the domains of its GPU type that are large enough. Raises CannotPlan when one has none."""
    where = []
    for segment in segments:
        fitting = [i for i, d in enumerate(cluster.domains) if d.gpu == segment.gpu and d.gpus >= segment.gpus]
        if not fitting:
            widest = cluster.widest(segment.gpu)
            raise CannotPlan(
                f"instance {segment.instance} needs {segment.gpus} × {segment.gpu.name} in one NVLink domain; "
                f"the widest of this cluster has {widest}"
            )
        where.append(fitting)
    for gpu in dict.fromkeys(s.gpu for s in segments):
        needed = sum(s.gpus for s in segments if s.gpu == gpu)
        if needed > cluster.count_of(gpu):
            raise CannotPlan(f"{needed} × {gpu.name} are needed, but the cluster has {cluster.count_of(gpu)}")
    return where


# ── the mixed-integer program ────────────────────────────────────────────────────────────────────────────────────────


class _Program:
    """Rows of ``low <= A x <= high``, collected one by one."""

    def __init__(self) -> None:
        self.costs: list[float] = []
        self.whole: list[int] = []
        self._rows: list[int] = []
        self._columns: list[int] = []
        self._values: list[float] = []
        self._low: list[float] = []
        self._high: list[float] = []

    def variable(self, whole: bool, cost: float = 0.0) -> int:
        self.costs.append(cost)
        self.whole.append(int(whole))
        return len(self.costs) - 1

    def row(self, terms: Sequence[tuple[int, float]], low: float, high: float) -> None:
        for column, value in terms:
            self._rows.append(len(self._low))
            self._columns.append(column)
            self._values.append(value)
        self._low.append(low)
        self._high.append(high)

    def pairs(self, a: Mapping[int, int], b: Mapping[int, int]) -> dict[tuple[int, int], int]:
        """A variable for each pair of choices, 1 exactly when both are taken: products of two one-of-many choices."""
        y = {(i, j): self.variable(whole=False) for i in a for j in b}
        for i, chosen in a.items():
            self.row([*((y[i, j], 1.0) for j in b), (chosen, -1.0)], 0, 0)
        for j, chosen in b.items():
            self.row([*((y[i, j], 1.0) for i in a), (chosen, -1.0)], 0, 0)
        return y

    def solve(self, upper: Sequence[float]) -> tuple[np.ndarray, bool]:
        shape = (len(self._low), len(self.costs))
        matrix = csr_array((self._values, (self._rows, self._columns)), shape=shape)
        result = milp(
            np.array(self.costs),
            integrality=np.array(self.whole),
            bounds=Bounds(np.zeros(len(self.costs)), np.array(upper)),
            constraints=LinearConstraint(matrix, np.array(self._low), np.array(self._high)),
            options={"time_limit": TIME_LIMIT_S, "mip_rel_gap": 1e-9},
        )
        if result.x is None:
            raise CannotPlan(
                "the instances do not fit the cluster's nodes and NVLink domains together; fewer or narrower ones would"
            )
        return result.x, bool(result.status == 0)


def _exact(
    cluster: Cluster,
    segments: Sequence[Segment],
    flows: Sequence[Flow],
    together: Sequence[Sequence[int]],
    where: list[list[int]],
) -> Placement:
    program = _Program()
    every = cluster.domains
    x = [{d: program.variable(whole=True) for d in domains} for domains in where]
    for at in x:
        program.row([(v, 1) for v in at.values()], 1, 1)
    for d, domain in enumerate(every):
        program.row([(at[d], s.gpus) for at, s in zip(x, segments, strict=True) if d in at], 0, domain.gpus)
    for group in together:
        _share_a_node(program, cluster, x, group)
    carried: dict[tuple[str, int], list[tuple[int, float]]] = {}
    for flow in flows:
        source, target = segments[flow.source], segments[flow.target]
        for (a, b), y in program.pairs(x[flow.source], x[flow.target]).items():
            path = path_between(cluster, every[a], every[b])
            program.costs[y] = flow.bytes_s / path_bytes_s(cluster, path, source, target, every[a], every[b])
            for key in _links_of(path, every, every[a], every[b]):
                carried.setdefault(key, []).append((y, flow.bytes_s))
    for first, second in _interchangeable(segments, flows, together):
        order = [*((v, float(d)) for d, v in x[first].items()), *((v, -float(d)) for d, v in x[second].items())]
        program.row(order, -np.inf, 0)
    over = program.variable(whole=False, cost=_OVERLOAD_COST)
    capacities = _capacities(cluster)
    for key, terms in carried.items():
        capacity = capacities[key]
        program.row([*((y, b / capacity) for y, b in terms), (over, -1)], -np.inf, 1)
    upper = [1.0] * len(program.costs)
    upper[over] = np.inf
    solved, proven = program.solve(upper)
    domains = [max(at, key=lambda d, at=at: solved[at[d]]) for at in x]  # type: ignore[misc]
    return evaluate(cluster, segments, flows, domains, exact=proven)


def _share_a_node(program: _Program, cluster: Cluster, x: list[dict[int, int]], group: Sequence[int]) -> None:
    """The group's first segment and each other one are in the same node."""
    every = cluster.domains
    for n in range(len(cluster.nodes)):
        first = [(v, 1.0) for d, v in x[group[0]].items() if every[d].node == n]
        for other in group[1:]:
            program.row([*first, *((v, -1.0) for d, v in x[other].items() if every[d].node == n)], 0, 0)


def _interchangeable(
    segments: Sequence[Segment], flows: Sequence[Flow], together: Sequence[Sequence[int]]
) -> Iterator[tuple[int, int]]:
    """Neighbouring pairs of segments that could swap places without any difference: one order is enough."""
    grouped = {s for group in together for s in group}
    last: dict[object, int] = {}
    for s, segment in enumerate(segments):
        if s in grouped:
            continue
        mine = sorted(
            (f.source == s, f.target if f.source == s else f.source, f.bytes_s)
            for f in flows
            if s in (f.source, f.target)
        )
        key = (segment.gpus, segment.gpu, tuple(mine))
        if key in last:
            yield last[key], s
        last[key] = s


# ── large clusters ───────────────────────────────────────────────────────────────────────────────────────────────────


class _Descent:
    """Groups and wide segments first, each where most of its traffic stays near; then swaps while they help."""

    def __init__(
        self, cluster: Cluster, segments: Sequence[Segment], flows: Sequence[Flow], where: list[list[int]]
    ) -> None:
        self._every = cluster.domains
        self._segments, self._where = segments, where
        self._free = [domain.gpus for domain in self._every]
        self._at = [-1] * len(segments)
        self._neighbours: list[list[tuple[int, float]]] = [[] for _ in segments]
        for flow in flows:
            self._neighbours[flow.source].append((flow.target, flow.bytes_s))
            self._neighbours[flow.target].append((flow.source, flow.bytes_s))

    def run(self, together: Sequence[Sequence[int]]) -> list[int]:
        grouped = {s for group in together for s in group}
        units = [list(group) for group in together] + [[s] for s in range(len(self._segments)) if s not in grouped]
        units.sort(key=lambda unit: -sum(self._segments[s].gpus for s in unit))
        for unit in units:
            self._put(unit)
        self._swap([s for s in range(len(self._segments)) if s not in grouped])
        return self._at

    def _near(self, s: int, d: int) -> float:
        """Bytes a second that stay in domain ``d``; those that stay in its node count a third."""
        kept = 0.0
        for other, amount in self._neighbours[s]:
            if self._at[other] == d:
                kept += amount
            elif self._at[other] >= 0 and self._every[self._at[other]].node == self._every[d].node:
                kept += amount / 3
        return kept

    def _put(self, unit: Sequence[int]) -> None:
        options = [o for node in {d.node: None for d in self._every} if (o := self._in_node(unit, node)) is not None]
        if not options:
            raise CannotPlan("the instances do not fit the cluster's nodes and NVLink domains together")
        best = max(options, key=lambda o: (sum(self._near(s, d) for s, d in o.items()), -self._left(o)))
        for s, d in best.items():
            self._at[s] = d
            self._free[d] -= self._segments[s].gpus

    def _left(self, option: Mapping[int, int]) -> int:
        """GPUs still free in the option's domains: less is a tighter packing."""
        return sum(self._free[d] for d in sorted(set(option.values())))

    def _in_node(self, unit: Sequence[int], node: int) -> dict[int, int] | None:
        left, chosen = list(self._free), {}
        for s in sorted(unit, key=lambda s: -self._segments[s].gpus):
            fits = [d for d in self._where[s] if self._every[d].node == node and left[d] >= self._segments[s].gpus]
            if not fits:
                return None
            chosen[s] = max(fits, key=lambda d: (self._near(s, d), -left[d], -d))
            left[chosen[s]] -= self._segments[s].gpus
        return chosen

    def _swap(self, movable: Sequence[int]) -> None:
        better = True
        while better:
            better = False
            for i, a in enumerate(movable):
                for b in movable[i + 1 :]:
                    better = self._try(a, b) or better

    def _try(self, a: int, b: int) -> bool:
        """Swaps two segments of one kind when more traffic then stays near."""
        one, two = self._at[a], self._at[b]
        same = (self._segments[a].gpus, self._segments[a].gpu) == (self._segments[b].gpus, self._segments[b].gpu)
        if one == two or not same:
            return False
        before = self._near(a, one) + self._near(b, two)
        self._at[a], self._at[b] = two, one
        if self._near(a, two) + self._near(b, one) > before * (1 + 1e-9):
            return True
        self._at[a], self._at[b] = one, two
        return False
