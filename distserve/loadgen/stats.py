"""From records to figures: percentiles, rates, the share of requests within their targets."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from distserve.loadgen.client import Record


@dataclass(frozen=True, slots=True)
class Slo:
    """Latency targets in seconds, and the share of requests that must meet all of them."""

    ttft_s: float = math.inf
    tpot_s: float = math.inf
    e2e_s: float = math.inf
    attainment: float = 0.9

    @classmethod
    def parse(cls, text: str) -> Slo:
        """``ttft=1.0,tpot=0.1[,e2e=…][,attainment=0.9]``. Raises ``ValueError`` with a sentence."""
        names = {"ttft": "ttft_s", "tpot": "tpot_s", "e2e": "e2e_s", "attainment": "attainment"}
        given: dict[str, float] = {}
        for part in filter(None, (p.strip() for p in text.split(","))):
            name, _, value = part.partition("=")
            if name not in names:
                raise ValueError(f"{name!r} is no latency target; known are {', '.join(names)}")
            try:
                given[names[name]] = float(value)
            except ValueError:
                raise ValueError(f"{part!r}: a number is needed after {name}=") from None
        slo = cls(**given)
        if not 0 < slo.attainment <= 1:
            raise ValueError(f"attainment={slo.attainment:g} must be above 0 and at most 1")
        return slo

    def meets(self, record: Record) -> bool:
        """Whether a request came out well and within every target. A failed one never does."""
        return (
            record.ok and record.ttft_s <= self.ttft_s and record.tpot_s <= self.tpot_s and record.e2e_s <= self.e2e_s
        )


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean, least, most and percentiles of some seconds."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """All zeros when there are no values: JSON has no NaN."""
        if not values:
            return cls(0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
        ordered = sorted(values)
        p50, p90, p95, p99 = (percentile(ordered, p) for p in (50, 90, 95, 99))
        return cls(len(ordered), math.fsum(ordered) / len(ordered), p50, p90, p95, p99, ordered[-1])


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The value below which ``percent`` % of the ordered values lie, linear between neighbours."""
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


@dataclass(frozen=True, slots=True)
class Summary:
    """What one run showed. Seconds; rates per second; shares of all requests sent, failed ones included."""

    requests: int
    failed: int
    errors: dict[str, int]
    wall_s: float
    request_rate: float
    output_token_rate: float
    prompt_tokens: int
    output_tokens: int
    ttft_s: Spread
    tpot_s: Spread
    itl_s: Spread
    e2e_s: Spread
    attained: float
    ttft_attained: float
    tpot_attained: float
    late_s: float  # the most a request was sent after it was due: the client's own fault

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def summarize(records: Sequence[Record], slo: Slo, wall_s: float) -> Summary:
    """Figures over all records of a run that took ``wall_s`` from first due to last end."""
    good = [r for r in records if r.ok]
    sent = max(1, len(records))
    output_tokens = sum(r.output_tokens for r in good)
    return Summary(
        requests=len(records),
        failed=len(records) - len(good),
        errors=dict(Counter(r.error or "cut off: the run was decided" for r in records if not r.ok).most_common(5)),
        wall_s=wall_s,
        request_rate=len(good) / wall_s if wall_s else 0.0,
        output_token_rate=output_tokens / wall_s if wall_s else 0.0,
        prompt_tokens=sum(r.prompt_tokens for r in good),
        output_tokens=output_tokens,
        ttft_s=Spread.of([r.ttft_s for r in good]),
        tpot_s=Spread.of([r.tpot_s for r in good if r.output_tokens > 1]),
        itl_s=Spread.of([g for r in good for g in r.gaps_s]),
        e2e_s=Spread.of([r.e2e_s for r in good]),
        attained=sum(slo.meets(r) for r in records) / sent,
        ttft_attained=sum(r.ttft_s <= slo.ttft_s for r in good) / sent,
        tpot_attained=sum(r.tpot_s <= slo.tpot_s for r in good) / sent,
        late_s=max((r.sent - r.due for r in records), default=0.0),
    )
