"""How requests flowed: each one's way from its arrival to its last token, in parts.

The parts are those that the instances' machines measure themselves (``Timings``), read off a run of the machines step
by step: many times slower than a count, so for a window of a workload, not for a search.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from distserve.core.types import Timings
from distserve_planner.simulation.deployment import Deployment
from distserve_planner.simulation.world import World
from distserve_planner.workload import Workload

PARTS = ("prefill queue", "prefill", "waits for room", "transfer", "decode queue", "decode")
"""In order. A request that stays where it was prefilled has the first two and the last."""
_NOTHING_S = 1e-9


@dataclass(frozen=True, slots=True)
class Journey:
    """Seconds on the simulation's clock. ``started``: its prefill; ``room``: blocks for it at the decode instance;
    ``owned``: its KV there; ``decoding``: its first step there. ``prefill``, ``decode``: instance indices.
    """

    arrival: float
    started: float
    first: float
    room: float
    owned: float
    decoding: float
    last: float
    prefill: int
    decode: int

    @property
    def parts(self) -> Iterator[tuple[str, float, float]]:
        """(name, start, end) of those that it passed through, in order."""
        marks = (self.arrival, self.started, self.first, self.room, self.owned, self.decoding, self.last)
        for name, start, end in zip(PARTS, marks[:-1], marks[1:], strict=True):
            if end - start > _NOTHING_S or name in ("prefill", "decode"):
                yield name, start, end


def journeys(deployment: Deployment, workload: Workload, count: int) -> tuple[Journey, ...]:
    """Of the first ``count`` requests to arrive, those that were answered, in order of arrival; they are alone in the
    run. Raises OutOfRange where a latency model has no data.
    """
    jobs = tuple(sorted(workload.jobs, key=lambda job: job.arrival_s)[:count])
    seen: dict[int, list[tuple[Timings, float]]] = {}

    def measured(index: int, timings: Timings, now: float) -> None:
        seen.setdefault(index, []).append((timings, now))

    trails = World(deployment, replace(workload, jobs=jobs), jumps=False, seed=0, measured=measured).run().trails
    found = []
    for index, trail in enumerate(trails):
        if trail.last == math.inf:
            continue
        (timings, _), *rest = seen[index]
        started = trail.arrival + timings.queue_s
        room = owned = decoding = trail.first
        if rest:
            there, told = rest[0]
            decoding = told - there.decode_step_s
            room, owned = trail.first + there.reserve_s, decoding - there.decode_queue_s
        found.append(
            Journey(trail.arrival, started, trail.first, room, owned, decoding, trail.last, trail.prefill, trail.decode)
        )
    return tuple(found)
