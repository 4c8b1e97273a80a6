"""Step times of a machine that was profiled (``distserve profile``): the planner's face of a ``Profile``.

One instance as the profile's were run: so many threads, no tensor or pipeline parallelism. A step takes what the bare
engine takes, longer when the other instances of the machine are busy, and what the running cluster adds to it. Refuses
shapes beyond the measured ones.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

from distserve.sched.config import InstanceConfig
from distserve_planner.latency.base import OutOfRange
from distserve_planner.latency.profile import Curve, Profile
from distserve_planner.latency.regress import squares


@dataclass(frozen=True, slots=True)
class Beside:
    """Of the time that an instance spends in one kind of step: the shares in which the others prefill and decode."""

    prefill: float = 0.0
    decode: float = 0.0


ALONE = (Beside(), Beside())
CROWDED = (Beside(0.5, 0.5), Beside(0.5, 0.5))


class ProfiledModel:
    """``LatencyModel`` and ``LinearDecode``. ``beside``: what the other instances of the machine do during this one's
    prompt steps and during its decode steps; by default they are always busy, half the time with each.

    Raises OutOfRange for parallelism that was not measured.
    """

    def __init__(self, profile: Profile, tp: int = 1, pp: int = 1, *, beside: tuple[Beside, Beside] = CROWDED) -> None:
        if (tp, pp) != (1, 1):
            raise OutOfRange(f"the profile of {profile.model} has no data for tp={tp} pp={pp}", "tp=1 pp=1")
        live = profile.live
        self.profile = profile
        prefill = _extra(profile, "prefill", beside[0], live.crowd_prefill)
        decode = _extra(profile, "decode", beside[1], live.crowd_decode)
        self._prefill_more, self._prefill_factor = prefill[0] + live.turn_s, live.prefill_scale * prefill[1]
        self._decode_more, self._decode_factor = decode[0] + live.turn_s, live.decode_scale * decode[1]
        self._weights = profile.prefill.weights
        self._context = profile.decode.weights["decode_context"] * self._decode_factor

    @property
    def name(self) -> str:
        p = self.profile
        return f"profile of {p.model} {p.dtype}, {p.instances} × {p.threads} threads on {p.cores} cores"

    @property
    def stages(self) -> int:
        return 1

    @property
    def kv_bytes_per_token(self) -> float:
        return self.profile.kv_bytes_per_token

    @property
    def kv_capacity_tokens(self) -> int:
        """No more than the largest context that was measured: a full pool is then within the profile."""
        return min(self.profile.kv_tokens, self.profile.range.context)

    @property
    def uncertainty(self) -> float:
        """The larger of the two curves' errors on steps that were left out of their fit."""
        return max(self.profile.prefill.error, self.profile.decode.error)

    def step_s(self, chunks: Sequence[tuple[int, int]], decodes: int, decode_context: int) -> float:
        p, w = self.profile, self._weights
        tokens = sum(new for new, _ in chunks)
        rows = tokens + decodes
        self._within("tokens a step", rows, p.range.step_tokens)
        self._within("tokens a sequence", max(new + before for new, before in chunks), p.range.sequence)
        self._within("decodes a step", decodes, p.range.batch)
        self._within("tokens of context", decode_context, p.range.context)
        seconds = _at(p.prefill, rows) + w["squares"] * squares(chunks) + w["chunks"] * len(chunks)
        seconds += w["decodes"] * decodes + w["decode_context"] * decode_context
        return seconds * self._prefill_factor + self._prefill_more + p.live.row_s * (decodes + len(chunks))

    def decode_s(self, batch: int, context: int) -> float:
        intercept, slope, _ = self.decode_line(batch, context)
        return intercept + slope * context

    def decode_line(self, batch: int, context: int) -> tuple[float, float, float]:
        p = self.profile
        self._within("decodes a step", batch, p.range.batch)
        self._within("tokens of context", context, p.range.context)
        fixed = _at(p.decode, batch) * self._decode_factor + self._decode_more + p.live.row_s * batch
        return fixed, self._context, math.nextafter(p.range.context, math.inf)

    def _within(self, what: str, asked: float, most: float) -> None:
        if asked > most:
            raise OutOfRange(f"the profile of {self.profile.model} does not reach {asked:.0f} {what}", f"{most:.0f}")


def within(profile: Profile, limits: InstanceConfig) -> InstanceConfig:
    """``limits`` with which no step goes beyond what was measured."""
    most = profile.range
    return replace(
        limits,
        max_sequences=min(limits.max_sequences, most.batch),
        max_batch_tokens=min(limits.max_batch_tokens, most.step_tokens),
        max_mixed_tokens=min(limits.max_mixed_tokens, most.step_tokens),
        prefill_chunk=min(limits.prefill_chunk, most.step_tokens),
    )


def _extra(profile: Profile, kind: str, beside: Beside, live: float) -> tuple[float, float]:
    """(seconds more, factor) of a step of this kind."""
    shares = {"prefill": beside.prefill, "decode": beside.decode}
    known = profile.crowd[kind]
    more = sum(known[other].constant_s * share for other, share in shares.items())
    relative = sum(known[other].relative * share for other, share in shares.items())
    return more, 1 + relative + live * min(1.0, beside.prefill + beside.decode)


def _at(curve: Curve, rows: float) -> float:
    """The table at ``rows``, its first value below it."""
    knots, values = curve.knots, curve.values
    if rows <= knots[0]:
        return values[0]
    i = min(bisect_right(knots, rows), len(knots) - 1)
    left, right = knots[i - 1], knots[i]
    return values[i - 1] + (values[i] - values[i - 1]) * (rows - left) / (right - left)
