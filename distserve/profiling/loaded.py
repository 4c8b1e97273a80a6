"""What instances, gateway and client take from each other when all are busy: short runs under load, and a fit to them.

Each layout serves a made-up workload at a rate that keeps its instances at work most of the time. Two numbers,
the slow-down of prompt steps and of decode steps beside busy instances, are then chosen so that the simulation tells
what was measured on all layouts at once: the median TPOT, and the lower quartile of TTFT, which queues hardly touch.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from distserve.core.types import Role
from distserve.loadgen.client import Client
from distserve.loadgen.run import open_loop
from distserve.profiling.live import LiveFailed
from distserve.profiling.prompts import Prompts
from distserve_planner.latency.profile import Profile
from distserve_planner.latency.profiled import ALONE, ProfiledModel
from distserve_planner.simulation.deployment import policy
from distserve_planner.simulation.shared import Machine, simulate_shared
from distserve_planner.workload import Job, Workload

REQUESTS = 36
_READING = {Role.PREFILL: 0.55, Role.MIXED: 0.35}  # share of an instance's time that prompts take
_PROMPTS, _ANSWERS = (128, 192, 256, 320, 384), (24, 48, 64, 96)
_MOST = 0.6  # a slow-down beyond this is another machine's
_STEP = 0.05
_CALM = 0.25


@dataclass(frozen=True, slots=True)
class Loaded:
    """One run: who served what, and what a client saw: lower quartile of TTFT, median of TPOT, seconds."""

    roles: tuple[Role, ...]
    workload: Workload
    ttft_s: float
    tpot_s: float


def workload_for(profile: Profile, roles: Sequence[Role], seed: int) -> Workload:
    """Poisson arrivals of varied lengths, at the rate that fills so much of the prompt-reading instances' time."""
    rng = random.Random(seed)
    at, jobs = 0.0, []
    for _ in range(REQUESTS):
        at += rng.expovariate(1.0)
        jobs.append(Job(rng.choice(_PROMPTS), rng.choice(_ANSWERS), at))
    model = ProfiledModel(profile, beside=ALONE)
    work_s = sum(model.step_s([(j.prompt, 0)], 0, 0) for j in jobs) / len(jobs)
    readers = [_READING[role] for role in roles if role.can_prefill]
    return Workload(tuple(jobs), 0, "made up").at_rate(sum(readers) / work_s)


def machine_of(profile: Profile, roles: Sequence[Role]) -> Machine:
    """As ``distserve serve`` makes it by default, without a prefix cache."""
    return Machine(profile, tuple(roles), policy("serve"))


async def measure_loaded(client: Client, prompts: Prompts, roles: Sequence[Role], workload: Workload) -> Loaded:
    """Raises LiveFailed when a request fails."""
    asks = [prompts.ask(j.prompt, j.output, j.arrival_s) for j in workload.jobs]
    records, _ = await open_loop(client, asks)
    for record in records:
        if not record.ok:
            raise LiveFailed(f"a request of the run under load failed: {record.error}")
    ttft, tpot = [r.ttft_s for r in records], [r.tpot_s for r in records]
    return Loaded(tuple(roles), workload, float(np.quantile(ttft, _CALM)), float(np.median(tpot)))


def with_crowd(profile: Profile, runs: Sequence[Loaded]) -> Profile:
    """The profile with slow-downs that fit the runs; what they foretold before and after is kept with it."""

    def scaled(factors: Sequence[float]) -> Profile:
        return replace(
            profile, live=replace(profile.live, crowd_prefill=float(factors[0]) - 1, crowd_decode=float(factors[1]) - 1)
        )

    def off(factors: Sequence[float]) -> list[float]:
        return [math.log(ratio) for run in runs for ratio in _ratios(scaled(factors), run)]

    bounds = (1 - _MOST / 2, 1 + _MOST)  # of factors: a simulation moves in jumps, so the steps must be wide
    found = least_squares(off, x0=[1.05, 1.05], bounds=bounds, diff_step=_STEP, max_nfev=12)
    fitted = scaled(found.x)
    seen: dict[str, Any] = {
        " + ".join(f"{run.roles.count(role)} {role}" for role in dict.fromkeys(run.roles)): {
            "rate": run.workload.rate,
            "ttft_p25_s": run.ttft_s,
            "tpot_p50_s": run.tpot_s,
            "told_over_measured": dict(zip(("ttft", "tpot"), _ratios(fitted, run), strict=True)),
        }
        for run in runs
    }
    return replace(fitted, live=replace(fitted.live, seen={**fitted.live.seen, "under load": seen}))


def _ratios(profile: Profile, run: Loaded) -> tuple[float, float]:
    """Told over measured: TTFT, TPOT."""
    result = simulate_shared(machine_of(profile, run.roles), run.workload)
    return float(np.quantile(result.ttft_s(), _CALM)) / run.ttft_s, float(np.median(result.tpot_s())) / run.tpot_s
