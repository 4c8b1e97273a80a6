"""How one instance's model and KV are cut over its ranks, and who sends what to whom when two instances are cut apart
differently. Arithmetic only: knows no process, no tensor and no address.

An instance of ``tp`` × ``pp`` has ``pp`` stages of adjacent layers (pipeline parallel), each held by ``tp`` lanes that
share its heads (tensor parallel, Megatron-LM, arXiv 1909.08053). Rank ``stage * tp + lane`` drives that place; rank 0
drives the instance. With more lanes than KV heads a head is copied to ``tp / kv_heads`` adjacent lanes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class Parallel:
    """The parallel layout of an instance."""

    tp: int = 1
    pp: int = 1

    @property
    def ranks(self) -> int:
        return self.tp * self.pp

    @property
    def sampler(self) -> int:
        """The rank that chooses tokens: the first lane of the last stage."""
        return (self.pp - 1) * self.tp

    def stage(self, rank: int) -> int:
        return rank // self.tp

    def lane(self, rank: int) -> int:
        return rank % self.tp

    def __str__(self) -> str:
        return f"tp{self.tp}pp{self.pp}"


@dataclass(frozen=True, slots=True)
class KvPart:
    """A rectangle of a model's KV: these layers, these KV heads of each. Numbers are the whole model's."""

    layers: range
    heads: range

    @property
    def area(self) -> int:
        """(layer, head) pairs in it."""
        return len(self.layers) * len(self.heads)

    def shared(self, other: KvPart) -> KvPart:
        """What both hold; of area 0 when nothing."""
        return KvPart(_shared(self.layers, other.layers), _shared(self.heads, other.heads))

    def within(self, other: KvPart) -> bool:
        """Whether ``other`` holds all of it, and it holds something."""
        return self.area > 0 and self.shared(other) == self

    def __str__(self) -> str:
        return f"layers {_words(self.layers)}, KV heads {_words(self.heads)}"


@dataclass(frozen=True, slots=True)
class KvCut:
    """One model's KV, cut for a parallel layout. Raises ``ValueError`` with a sentence for a cut that cannot be."""

    parallel: Parallel
    layers: int
    kv_heads: int

    def __post_init__(self) -> None:
        if why := why_not(self.parallel, layers=self.layers, heads=self.parallel.tp, kv_heads=self.kv_heads):
            raise ValueError(why)

    @property
    def copies(self) -> int:
        """Lanes that hold the same KV head."""
        return max(1, self.parallel.tp // self.kv_heads)

    def part(self, rank: int) -> KvPart:
        """What ``rank`` holds."""
        layers = stage_layers(self.layers, self.parallel.pp)[self.parallel.stage(rank)]
        return KvPart(layers, lane_heads(self.kv_heads, self.parallel.tp, self.parallel.lane(rank)))

    def recut(self, parallel: Parallel) -> KvCut:
        """The same model's KV under another layout."""
        return KvCut(parallel, self.layers, self.kv_heads)


@dataclass(frozen=True, slots=True)
class Route:
    """This rank of the source sends this part to that rank of the destination."""

    source: int
    destination: int
    part: KvPart


def routes(source: KvCut, destination: KvCut) -> tuple[Route, ...]:
    """Who sends what: every (layer, head) of every destination rank comes exactly once, from a rank that holds it.

    Where the source keeps copies of a head, the destination's lanes take turns among them.
    """
    found = []
    for there in range(destination.parallel.ranks):
        wanted = destination.part(there)
        copy = destination.parallel.lane(there) % source.copies
        for here in range(source.parallel.ranks):
            if source.parallel.lane(here) % source.copies == copy:
                part = source.part(here).shared(wanted)
                if part.area:
                    found.append(Route(here, there, part))
    return tuple(found)


def stage_layers(layers: int, pp: int) -> tuple[range, ...]:
    """The layers of each stage; the first stages take what is left over, for the last one also has the head."""
    least, more = divmod(layers, pp)
    ends = [least * stage + min(stage, more) for stage in range(pp + 1)]
    return tuple(range(low, high) for low, high in pairwise(ends))


def lane_heads(kv_heads: int, tp: int, lane: int) -> range:
    """The KV heads of a lane; with more lanes than heads, the one it shares with its neighbours."""
    if tp >= kv_heads:
        head = lane * kv_heads // tp
        return range(head, head + 1)
    each = kv_heads // tp
    return range(lane * each, (lane + 1) * each)


def why_not(parallel: Parallel, *, layers: int, heads: int, kv_heads: int) -> str:
    """Why a model of this shape cannot be cut so, as a sentence; empty when it can."""
    tp, pp = parallel.tp, parallel.pp
    if tp < 1 or pp < 1:
        return f"--tp {tp} --pp {pp}: both must be at least 1"
    if heads % tp:
        return f"--tp {tp} does not divide the model's {heads} attention heads; choose a divisor of {heads}"
    if max(kv_heads, tp) % min(kv_heads, tp):
        return f"--tp {tp} neither divides the model's {kv_heads} KV heads nor is a multiple of them; choose another"
    if pp > layers:
        return f"--pp {pp} is more stages than the model's {layers} layers; choose at most {layers}"
    return ""


def _shared(one: range, other: range) -> range:
    low = max(one.start, other.start)
    return range(low, max(low, min(one.stop, other.stop)))


def _words(span: range) -> str:
    return f"{span.start} to {span.stop - 1}" if len(span) != 1 else str(span.start)
