"""What a running cluster adds to the engine's own steps, seen by a client on the same machine.

Each by the smallest run that shows it: single requests on an idle cluster (the way around, and the hand-off), and
streams that decode together (what a turn of an instance costs beyond its step, and a row). What instances, gateway and
client take from each other is ``loaded``'s matter.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import nnls

from distserve.loadgen.client import Client, Record
from distserve.profiling.prompts import Prompts
from distserve_planner.latency.profile import LiveCost, Profile
from distserve_planner.latency.profiled import ALONE, ProfiledModel

_SINGLES = (64, 256, 512)
_REPEATS = 5
_SHORT_PROMPT = 32
_BATCHES = (1, 8, 16)
_ANSWER = 80


class LiveFailed(RuntimeError):
    """A request of the live run failed; the text is for the user."""


@dataclass(frozen=True, slots=True)
class _Bare:
    """The fitted engine with nothing around it, and exactly measured steps where there are any."""

    model: ProfiledModel
    prompts: Mapping[int, float]

    @classmethod
    def of(cls, profile: Profile) -> _Bare:
        alone = [s for s in profile.samples if s.kind == "prefill" and len(s.chunks) == 1]
        exact = {s.chunks[0][0]: s.seconds for s in alone if s.chunks[0][1] == 0}
        return cls(ProfiledModel(replace(profile, live=LiveCost()), beside=ALONE), exact)

    def prompt_s(self, tokens: int) -> float:
        return self.prompts.get(tokens) or self.model.step_s([(tokens, 0)], 0, 0)


async def measure_live(
    client: Client, prompts: Prompts, profile: Profile, layout: str, say: Callable[[str, float], None]
) -> LiveCost:
    """Costs on a cluster that serves nobody else. ``profile`` holds the bare engine's. Raises LiveFailed."""
    bare = _Bare.of(profile)
    await _send(client, [prompts.ask(_SHORT_PROMPT, 8) for _ in range(2)])
    say("single requests", 0.0)
    ttft, second = await _singles(client, prompts)
    say("streams together", 0.3)
    periods = {batch: await _together(client, prompts, batch) for batch in _BATCHES}
    around, around_token = _line({p: t - bare.prompt_s(p) for p, t in ttft.items()})
    mean_context = {b: b * (_SHORT_PROMPT + _ANSWER / 2) for b in _BATCHES}
    turn, row = _line({b: s - bare.model.decode_s(b, int(mean_context[b])) for b, s in periods.items()})
    live = LiveCost(layout, around, around_token, turn, row)
    told = ProfiledModel(replace(profile, live=live), beside=ALONE)
    handoff = statistics.median(
        gap - told.decode_s(1, p + 1) - p * profile.kv_bytes_per_token / profile.link.bytes_s
        for p, gap in second.items()
    )
    return replace(
        live,
        handoff_s=max(0.0, handoff),
        seen={
            "ttft_s": _named(ttft),
            "second_token_s": _named(second),
            "step_s": _named(periods),
        },
    )


def _named(values: Mapping[int, float]) -> dict[str, float]:
    return {str(key): value for key, value in values.items()}


def _line(points: Mapping[int, float]) -> tuple[float, float]:
    """(constant, per unit), neither negative, by least squares."""
    design = np.array([[1.0, x] for x in points])
    (constant, slope), _ = nnls(design, np.array(list(points.values())))
    return float(constant), float(slope)


async def _singles(client: Client, prompts: Prompts) -> tuple[dict[int, float], dict[int, float]]:
    """TTFT by prompt length, and the gap between first and second token, one request at a time."""
    ttft, second = {}, {}
    for tokens in _SINGLES:
        records = []
        for _ in range(_REPEATS):
            records += await _send(client, [prompts.ask(tokens, 6)])
        ttft[tokens] = statistics.median(r.ttft_s for r in records)
        second[tokens] = statistics.median(r.token_times[1] - r.token_times[0] for r in records)
    return ttft, second


async def _together(client: Client, prompts: Prompts, batch: int) -> float:
    """Seconds a step while ``batch`` streams decode together."""
    records = await _send(client, [prompts.ask(_SHORT_PROMPT, _ANSWER + batch) for _ in range(batch)])
    return step_s(records)


async def _send(client: Client, asks: Iterable[Any]) -> list[Record]:
    """All at once; waits for all. Raises LiveFailed with the first error."""
    records = await asyncio.gather(*(client.send(ask) for ask in asks))
    for record in records:
        if not record.ok or len(record.token_times) < min(2, record.output_tokens):
            raise LiveFailed(f"a request of the live run failed: {record.error or 'too few tokens came'}")
    return list(records)


def step_s(records: Sequence[Record]) -> float:
    """Median pace of the streams between the last one's first token and the first one's last."""
    start = max(r.token_times[0] for r in records)
    end = min(r.token_times[-1] for r in records)
    inside = [[t for t in r.token_times if start <= t <= end] for r in records]
    paces = [(times[-1] - times[0]) / (len(times) - 1) for times in inside if len(times) > 1]
    if not paces:
        raise LiveFailed("the streams of the live run never decoded together")
    return statistics.median(paces)
