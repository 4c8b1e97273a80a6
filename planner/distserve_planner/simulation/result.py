"""What a simulation found out: per request and per instance, and the shares and percentiles read off it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, slots=True)
class Slo:
    """Limits in seconds. ``attainment``: the share of requests that must meet both."""

    ttft_s: float
    tpot_s: float
    attainment: float = 0.9

    def scaled(self, factor: float) -> Slo:
        """Both limits times ``factor``; the share stays."""
        return Slo(self.ttft_s * factor, self.tpot_s * factor, self.attainment)


@dataclass(slots=True)
class Trail:
    """One request's way; times in seconds, ``inf`` what never came. ``prefill``, ``decode``: instance indices."""

    arrival: float
    prompt: int
    output: int
    prefill: int = -1
    decode: int = -1
    first: float = math.inf
    owned: float = math.inf
    last: float = math.inf
    cached: int = 0
    refused: str = ""

    @property
    def ttft_s(self) -> float:
        return self.first - self.arrival

    @property
    def tpot_s(self) -> float:
        """Mean time per token after the first; 0 for an answer of one token."""
        if self.output > 1:
            return (self.last - self.first) / (self.output - 1) if self.last < math.inf else math.inf
        return 0.0 if self.first < math.inf else math.inf


@dataclass(frozen=True, slots=True)
class InstanceReport:
    """How one instance spent its time. ``busy_s`` is the sum of its step times."""

    steps: int
    busy_s: float
    prompt_tokens: int  # computed, cached ones not counted
    output_tokens: int
    preemptions: int
    kv_peak_blocks: int
    kv_total_blocks: int


@dataclass(frozen=True, slots=True)
class LinkReport:
    """What one link carried, in bytes, and how long it was in use."""

    capacity: float
    carried: float
    busy_s: float


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """``trails`` in the order of the workload's jobs."""

    trails: tuple[Trail, ...]
    instances: tuple[InstanceReport, ...] = ()
    links: dict[str, LinkReport] = field(default_factory=dict)
    end_s: float = 0.0
    events: int = 0

    def ttft_s(self) -> np.ndarray:
        return np.array([t.ttft_s for t in self.trails])

    def tpot_s(self) -> np.ndarray:
        return np.array([t.tpot_s for t in self.trails])

    def met(self, slo: Slo) -> np.ndarray:
        """Whether each request met both limits."""
        met: np.ndarray = (self.ttft_s() < slo.ttft_s) & (self.tpot_s() < slo.tpot_s)
        return met

    def attainment(self, slo: Slo) -> float:
        """Share of requests that met both limits, 0 to 1."""
        return float(self.met(slo).mean()) if self.trails else 0.0

    def percentile(self, values: Sequence[float] | np.ndarray, q: float) -> float:
        """The smallest value that at least ``q`` of the requests do not exceed."""
        ordered = np.sort(np.asarray(values))
        return float(ordered[max(0, math.ceil(q * len(ordered)) - 1)]) if len(ordered) else math.nan

    @property
    def digest(self) -> str:
        """Of every request's way and every instance's counts: equal digests, equal runs."""
        lines = [
            f"{t.prefill} {t.decode} {t.first!r} {t.owned!r} {t.last!r} {t.cached} {t.refused}" for t in self.trails
        ]
        lines += [f"{i.steps} {i.output_tokens} {i.prompt_tokens} {i.preemptions}" for i in self.instances]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()
