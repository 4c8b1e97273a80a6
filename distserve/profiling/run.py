"""``distserve profile``: the bare engine, the links and a running cluster, measured and fitted into one document."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from distserve.core.types import Role
from distserve.engine.config import EngineConfig
from distserve.launch.cluster import Cluster
from distserve.launch.options import served_name
from distserve.loadgen.client import Client
from distserve.loadgen.http import Target
from distserve.loadgen.machine import CpuWatch, hardware, versions
from distserve.loadgen.run import warm_up
from distserve.models.catalog import RANDOM_PREFIX, resolve_model
from distserve.profiling.bare import Bare, measure_bare
from distserve.profiling.live import LiveFailed, measure_live
from distserve.profiling.loaded import Loaded, measure_loaded, with_crowd, workload_for
from distserve.profiling.prompts import Prompts
from distserve.wire.loop import run_loop
from distserve_kernels.cores import usable_cores
from distserve_planner.latency.profile import VERSION, LiveCost, Profile
from distserve_planner.latency.regress import DECODE, PREFILL, fit_curve, range_of
from distserve_planner.workload import Workload

_BARE_SHARE, _LIVE_SHARE = 0.6, 0.15
_TIMEOUT_S = 120.0
_WARM_UP = 4
Say = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Wish:
    """What to measure. ``instances`` share the machine, each with ``threads``; ``budget_s`` is for measuring alone."""

    model: str
    dtype: str = "bfloat16"
    threads: int = 1
    instances: int = 2
    budget_s: float = 120.0
    kv_tokens: int = 65_536
    block_size: int = 16
    live: bool = True
    tokenizer: str = ""
    seed: int = 1


def measure(wish: Wish, say: Say) -> Profile:
    """The profile of this machine. ``say`` is told what goes on and the share done, 0 to 1.

    Raises ModelError, WorkerFailed, LiveFailed, ClusterFailed or CannotPlan with a sentence.
    """
    model = wish.model if wish.model.startswith(RANDOM_PREFIX) else str(resolve_model(wish.model))
    began, watch = time.monotonic(), CpuWatch((os.getpid(),))
    config = EngineConfig(
        model, dtype=wish.dtype, threads=wish.threads, kv_tokens=wish.kv_tokens, block_size=wish.block_size
    )
    bare = measure_bare(
        config, wish.instances, _BARE_SHARE * wish.budget_s, lambda words, share: say(words, _BARE_SHARE * share)
    )
    profile = _fitted(wish, bare)
    if wish.live:
        profile = _live(wish, profile, say)
    about = {
        "when": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "took_s": time.monotonic() - began,
        "rounds": bare.rounds,
        "cores_used": watch.stop(),
        "noise": noise(profile),
        "beside": "the other instances computed prompts and decodes half the time each",
        "versions": versions(),
        "hardware": hardware(),
    }
    return replace(profile, about=about)


def noise(profile: Profile) -> float:
    """How far the median run of a shape is above its best, relative, in the middle of all shapes."""
    spread = sorted(s.seconds / s.least - 1 for s in profile.samples if s.least > 0)
    return spread[len(spread) // 2] if spread else 0.0


def _fitted(wish: Wish, bare: Bare) -> Profile:
    alone = bare.samples
    return Profile(
        version=VERSION,
        model=served_name(wish.model),
        dtype=wish.dtype,
        threads=wish.threads,
        instances=wish.instances,
        cores=len(usable_cores()),
        block_size=wish.block_size,
        kv_tokens=wish.kv_tokens,
        kv_bytes_per_token=bare.facts.kv_bytes_per_token,
        max_len=bare.facts.max_len,
        prefill=fit_curve([s for s in alone if s.chunks], PREFILL),
        decode=fit_curve([s for s in alone if not s.chunks], DECODE),
        range=range_of(alone),
        links=bare.links,
        crowd=bare.crowd,
        live=LiveCost(),
        samples=tuple(bare.samples),
    )


def _live(wish: Wish, profile: Profile, say: Say) -> Profile:
    """With what a running cluster adds. Several instances are looked at twice: split by phase, and mixed."""
    count = wish.instances
    split = (*[Role.PREFILL] * max(1, count // 2), *[Role.DECODE] * (count - max(1, count // 2)))
    layouts: list[tuple[Role, ...]] = [split, (Role.MIXED,) * count] if count > 1 else [(Role.MIXED,)]
    runs: list[Loaded] = []
    for number, roles in enumerate(layouts):
        at = _BARE_SHARE + number * (1 - _BARE_SHARE) / len(layouts)
        say("starting a cluster", at)
        with Cluster([*serve_arguments(wish), *_counts(roles)]) as cluster:
            client = Client(Target.parse(cluster.http_url), "profiled", timeout_s=_TIMEOUT_S, count_empty=True)
            prompts = Prompts(wish.tokenizer or wish.model, wish.seed + number)
            if not number:
                layout = " + ".join(f"{roles.count(role)} {role}" for role in dict.fromkeys(roles))
                parts = measure_live(
                    client, prompts, profile, layout, lambda w, s: say(w, _BARE_SHARE + _LIVE_SHARE * s)
                )
                live = run_loop(parts)
                profile = replace(profile, live=live if count > 1 else replace(live, handoff_s=0.0))
            say("under load", at + 0.5 * (1 - _BARE_SHARE) / len(layouts))
            workload = workload_for(profile, roles, wish.seed)
            runs.append(run_loop(_under_load(client, prompts, roles, workload)))
    return with_crowd(profile, runs) if count > 1 else profile


async def _under_load(client: Client, prompts: Prompts, roles: Sequence[Role], workload: Workload) -> Loaded:
    if error := await warm_up(client, iter([prompts.ask(64, 8) for _ in range(_WARM_UP)]), _WARM_UP):
        raise LiveFailed(f"a warm-up request failed: {error}")
    return await measure_loaded(client, prompts, roles, workload)


def _counts(roles: Sequence[Role]) -> list[str]:
    """Of ``distserve serve``."""
    return [part for role in dict.fromkeys(roles) for part in (f"--{role.value}", str(roles.count(role)))]


def serve_arguments(wish: Wish) -> list[str]:
    """Of ``distserve serve``, for a cluster whose instances are those that were profiled."""
    given: dict[str, Any] = {
        "model": wish.model,
        "model-name": "profiled",
        "dtype": wish.dtype,
        "threads-per-rank": wish.threads,
        "kv-tokens": wish.kv_tokens,
        "block-size": wish.block_size,
        "log-level": "error",
    }
    if wish.tokenizer:
        given["tokenizer"] = wish.tokenizer
    return [part for key, value in given.items() for part in (f"--{key}", str(value))] + ["--no-prefix-cache"]
