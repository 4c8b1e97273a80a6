"""Arrange by factory: latency models without a machine behind them, small deployments, workloads."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from distserve.core.types import Role
from distserve.sched.batching import BatchPolicy
from distserve.sched.config import InstanceConfig
from distserve_planner.simulation.deployment import Deployment, InstanceSpec, limits, on_ports
from distserve_planner.workload import Job, Workload

WHOLE = 1 << 30


@dataclass(frozen=True, slots=True)
class Linear:
    """Step seconds: ``base + per_token * tokens`` for prompts, ``base + per_row * batch + per_context * context``."""

    base: float = 0.010
    per_token: float = 1e-4
    per_row: float = 1e-4
    per_context: float = 1e-6
    stages: int = 1
    kv_bytes_per_token: float = 1000.0
    kv_capacity_tokens: int = 1 << 20
    uncertainty: float = 0.0
    name: str = "made up"

    def step_s(self, chunks: Sequence[tuple[int, int]], decodes: int, decode_context: int) -> float:
        tokens = self.per_token * sum(n for n, _ in chunks)
        return (self.base + tokens + self.per_row * decodes + self.per_context * decode_context) / self.stages

    def decode_s(self, batch: int, context: int) -> float:
        return (self.base + self.per_row * batch + self.per_context * context) / self.stages


@dataclass(frozen=True, slots=True)
class StraightLinear(Linear):
    """The same, with its decode line told."""

    def decode_s(self, batch: int, context: int) -> float:
        intercept, slope, _ = self.decode_line(batch, context)
        return intercept + slope * context

    def decode_line(self, batch: int, context: int) -> tuple[float, float, float]:
        intercept = (self.base + self.per_row * batch) / self.stages
        return intercept, self.per_context / self.stages, float("inf")


def config(batching: BatchPolicy = BatchPolicy.WHOLE_PROMPTS, **changes: object) -> InstanceConfig:
    chunk = 64 if batching is BatchPolicy.CHUNKED else WHOLE
    made = limits(batching, batch=512, mixed=128, chunk=chunk, sequences=64, headroom=0.02)
    return replace(made, **changes)  # type: ignore[arg-type]


def spec(role: Role, kv_tokens: int = 1 << 16, model: Linear | None = None, **changes: object) -> InstanceSpec:
    return InstanceSpec(role, model or StraightLinear(), config(**changes), kv_tokens)  # type: ignore[arg-type]


def split(prefills: int = 1, decodes: int = 1, kv_tokens: int = 1 << 16, **changes: object) -> Deployment:
    """Prefill and decode instances on a switch that moves 1000 tokens of KV in 10 ms."""
    roles = [Role.PREFILL] * prefills + [Role.DECODE] * decodes
    return on_ports([spec(role, kv_tokens, **changes) for role in roles], 1e8)


def mixed(count: int = 1, kv_tokens: int = 1 << 16, **changes: object) -> Deployment:
    return on_ports([spec(Role.MIXED, kv_tokens, **changes) for _ in range(count)], 1e8)


def jobs(n: int, rate: float, seed: int, prompt: int = 300, output: int = 60) -> Workload:
    """Poisson arrivals; lengths uniform from 1 to twice the mean."""
    rng = random.Random(seed)
    at, made = 0.0, []
    for _ in range(n):
        at += rng.expovariate(rate)
        made.append(Job(rng.randint(1, 2 * prompt), rng.randint(1, 2 * output), at))
    return Workload(tuple(made))


def prefixed(n: int, rate: float, seed: int) -> Workload:
    """Like ``jobs``; prompts are chains of blocks of 64 tokens, of which the first few are among three beginnings."""
    rng, made = random.Random(seed), []
    for i, job in enumerate(jobs(n, rate, seed).jobs):
        blocks, own = -(-job.prompt // 64), rng.randint(2, 5)
        family = 1000 * rng.randint(1, 3)
        chain = (*(family + k for k in range(min(own, blocks))), *(10_000 * (i + 1) + k for k in range(own, blocks)))
        made.append(replace(job, prefix=chain))
    return Workload(tuple(made), 64)
