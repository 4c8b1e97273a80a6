"""The wait-for graph: whose blocks wait for whose.

A node is one life of an instance, that is its pool and its places in the running set. An edge A → B: something keeps
A's blocks and can do nothing until B gives room. There are two kinds, both read off A's own state:

- a sequence that is prefilled on A waits, with its blocks, for B to grant its move;
- a move that B may have reserved for waits for its sequence, which is back in A's queue: B's blocks wait for A's.

While the graph has no cycle, whoever is at its end can finish, and so can everybody (DESIGN §5, "waits form no cycle").
"""

from __future__ import annotations

from distserve.core.types import InstanceRef
from distserve.sched.instance import InstanceState
from distserve.sched.lifecycle import OutPhase, Phase

Edge = tuple[InstanceRef, InstanceRef]


def edges_of(machine: InstanceState) -> frozenset[Edge]:
    """The edges that one machine's state shows."""
    me = machine.me
    edges = set()
    for move in machine.departures.moves.values():
        there = move.destination.ref
        if move.phase is OutPhase.RESERVING and move.sequence.phase is Phase.HANDOFF:
            edges.add((me, there))
        elif move.phase is not OutPhase.RESERVING and move.sequence.phase is Phase.WAITING:
            edges.add((there, me))
    return frozenset(edges)


class WaitGraph:
    """All edges of the cluster now."""

    def __init__(self) -> None:
        self._of: dict[InstanceRef, frozenset[Edge]] = {}

    def forget(self, life: InstanceRef) -> None:
        self._of.pop(life, None)

    def update(self, machine: InstanceState) -> list[InstanceRef]:
        """Take in what one machine shows; returns a cycle through a new edge, or nothing."""
        edges = edges_of(machine) if machine.departures.moves else frozenset()
        before = self._of.get(machine.me, frozenset())
        if edges == before:
            return []
        self._of[machine.me] = edges
        return self._cycle() if edges - before else []

    def _cycle(self) -> list[InstanceRef]:
        after: dict[InstanceRef, list[InstanceRef]] = {}
        for a, b in sorted(edge for edges in self._of.values() for edge in edges):
            after.setdefault(a, []).append(b)
        done: set[InstanceRef] = set()
        for start in after:
            path: list[InstanceRef] = []
            if found := _walk(start, after, path, done):
                return found
        return []


def _walk(
    node: InstanceRef, after: dict[InstanceRef, list[InstanceRef]], path: list[InstanceRef], done: set[InstanceRef]
) -> list[InstanceRef]:
    if node in path:
        return [*path[path.index(node) :], node]
    if node in done:
        return []
    path.append(node)
    for following in after.get(node, ()):
        if found := _walk(following, after, path, done):
            return found
    path.pop()
    done.add(node)
    return []
