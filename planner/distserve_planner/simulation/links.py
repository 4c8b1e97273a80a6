"""KV on its way: transfers that share links, each at its max-min fair rate, and what every link carried.

Knows no requests. Progressive filling: the link that leaves its flows least is filled first (max-min fairness).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

P = TypeVar("P")


@dataclass(slots=True, eq=False)
class Flow(Generic[P]):
    """One transfer under way."""

    path: tuple[str, ...]
    left: float  # bytes
    payload: P
    order: int
    rate: float = 0.0


class Links(Generic[P]):
    """All flows of a cluster. The owner asks ``next_end`` and calls ``finish`` when that time has come."""

    def __init__(self, capacity: Mapping[str, float]) -> None:
        self.capacity = dict(capacity)
        self.carried = dict.fromkeys(capacity, 0.0)  # bytes
        self.busy_s = dict.fromkeys(capacity, 0.0)
        self._flows: list[Flow[P]] = []
        self._now = 0.0
        self._count = 0

    def start(self, path: tuple[str, ...], nbytes: float, payload: P, now: float) -> None:
        """Begin a transfer; an empty path takes no time."""
        self._advance(now)
        self._count += 1
        self._flows.append(Flow(path, max(0.0, nbytes), payload, self._count))
        for link in path:
            self.carried[link] += nbytes
        self._share()

    def next_end(self) -> float | None:
        """When the first of the flows ends as things stand."""
        if not self._flows:
            return None
        if len(self._flows) == 1:
            flow = self._flows[0]
            return self._now + flow.left / flow.rate
        return self._now + min([f.left / f.rate for f in self._flows])

    def finish(self, now: float) -> list[P]:
        """Payloads of the flows that end at ``now``, in the order they began."""
        self._advance(now)
        if len(self._flows) == 1:
            flow = self._flows[0]
            if flow.left > 1e-9 * flow.rate:
                return []
            self._flows = []
            return [flow.payload]
        tolerance = [1e-9 * f.rate for f in self._flows]  # a nanosecond's worth: rounding never strands a flow
        over = [f for f, t in zip(self._flows, tolerance, strict=True) if f.left <= t]
        self._flows = [f for f, t in zip(self._flows, tolerance, strict=True) if f.left > t]
        self._share()
        return [f.payload for f in over]

    def cancel(self, of: Callable[[P], bool], now: float) -> None:
        """Drop the flows whose payload is one of those meant."""
        if any(of(f.payload) for f in self._flows):
            self._advance(now)
            self._flows = [f for f in self._flows if not of(f.payload)]
            self._share()

    def _advance(self, now: float) -> None:
        elapsed, self._now = now - self._now, now
        if not self._flows or elapsed <= 0:
            return
        if len(self._flows) == 1:
            flow = self._flows[0]
            for link in flow.path:
                self.busy_s[link] += elapsed
            flow.left = max(0.0, flow.left - flow.rate * elapsed)
            return
        for link in {name: None for f in self._flows for name in f.path}:
            self.busy_s[link] += elapsed
        for flow in self._flows:
            flow.left = max(0.0, flow.left - flow.rate * elapsed)

    def _share(self) -> None:
        if len(self._flows) == 1:
            flow = self._flows[0]
            flow.rate = min([self.capacity[name] for name in flow.path], default=1e30)
            return
        room, open_flows = dict(self.capacity), list(self._flows)
        while open_flows:
            users: dict[str, int] = {}
            for flow in open_flows:
                for link in flow.path:
                    users[link] = users.get(link, 0) + 1
            if not users:
                for flow in open_flows:
                    flow.rate = 1e30
                return
            tight = min(users, key=lambda link: room[link] / users[link])
            share = room[tight] / users[tight]
            for flow in open_flows:
                if tight in flow.path:
                    flow.rate = share
                    for link in flow.path:
                        room[link] -= share
            open_flows = [f for f in open_flows if tight not in f.path]
