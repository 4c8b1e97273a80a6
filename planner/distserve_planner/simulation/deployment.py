"""What is simulated: instances with their latency models and limits, and the links their KV moves over."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from distserve.core.types import Role
from distserve.sched.batching import BatchPolicy
from distserve.sched.config import ClusterConfig, InstanceConfig
from distserve_planner.latency.base import LatencyModel, OfEngine
from distserve_planner.refusal import CannotPlan, nearest

NEVER_S = 1e12
NVLINK_A100 = 228e9
"""Bytes a second between two A100s over NVLink, measured (Vidur's point-to-point profile)."""

_PATIENT = {
    "max_waiting": 1 << 40,
    "lease_s": NEVER_S,
    "reserve_repeat_s": NEVER_S,
    "reserve_timeout_s": NEVER_S,
    "commit_repeat_s": NEVER_S,
    "commit_timeout_s": NEVER_S,
    "deadline_slack_s": NEVER_S,
}


def limits(
    policy: BatchPolicy, *, batch: int, mixed: int, chunk: int, sequences: int, headroom: float
) -> InstanceConfig:
    """An instance's settings for simulation: nothing is lost on a virtual network, so no deadline ever acts."""
    return InstanceConfig(
        max_batch_tokens=batch,
        max_mixed_tokens=mixed,
        prefill_chunk=chunk,
        max_sequences=sequences,
        batching=policy,
        prefix_cache=False,
        headroom_share=headroom,
        **_PATIENT,  # type: ignore[arg-type]
    )


WHOLE = 1 << 30
POLICIES: dict[str, InstanceConfig] = {
    # this project's own: prompts are cut into chunks, and share steps with decodes on a mixed instance
    "chunked": limits(BatchPolicy.CHUNKED, batch=2048, mixed=512, chunk=512, sequences=256, headroom=0.02),
    # the same with the limits that `distserve serve` has by default
    "serve": limits(BatchPolicy.CHUNKED, batch=2048, mixed=512, chunk=512, sequences=64, headroom=0.02),
    # and without chunks: prompts whole and before decodes, as its engine does with --batching prompts-first
    "prompts-first": limits(BatchPolicy.PROMPTS_FIRST, batch=2048, mixed=2048, chunk=2048, sequences=64, headroom=0.02),
    # DistServe's scripts: whole prompts, 8192 tokens a prefill batch; its engine admits a sequence when its blocks fit
    "distserve": limits(BatchPolicy.WHOLE_PROMPTS, batch=8192, mixed=8192, chunk=WHOLE, sequences=1024, headroom=0.0),
    # vLLM of 2023: prompts before decodes, 2560 tokens and 256 sequences a batch, 1 % of the blocks kept free
    "vllm-2023": limits(BatchPolicy.PROMPTS_FIRST, batch=2560, mixed=2560, chunk=WHOLE, sequences=256, headroom=0.01),
}


def policy(name: str) -> InstanceConfig:
    """Batching limits by name. Raises CannotPlan."""
    if name not in POLICIES:
        raise CannotPlan(f"there is no policy {name!r}{nearest(name, POLICIES)} (known: {', '.join(POLICIES)})")
    return POLICIES[name]


OPEN_DOOR = ClusterConfig(lease_s=NEVER_S, max_queued_tokens=1 << 60, max_open_requests=1 << 60)
"""A controller that refuses nobody: overload shows as waiting, as it does in the systems compared with."""


def open_door(overflow_prefill_tokens: int) -> ClusterConfig:
    """The same, with this much owed by every prefill queue before prompts overflow (0: they never do)."""
    return replace(OPEN_DOOR, overflow_prefill_tokens=overflow_prefill_tokens)


@dataclass(frozen=True, slots=True)
class InstanceSpec:
    """One instance. ``kv_tokens``: its pool; ``ingress``/``egress`` name links of the deployment its KV passes.

    ``pull_stall_s``: per KV token of a sequence that comes by a hand-off, how long the step it joins is held up.
    ``pipeline_overlap``: share of the ideal overlap of decode batches that a pipeline reaches, 0 to 1.
    """

    role: Role
    model: LatencyModel
    config: InstanceConfig
    kv_tokens: int
    block_size: int = 16
    pull_stall_s: float = 0.0
    pipeline_overlap: float = 1.0
    egress: tuple[str, ...] = ()
    ingress: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kv_tokens < self.block_size:
            raise CannotPlan(f"an instance with room for {self.kv_tokens} tokens of KV holds no sequence at all")


@dataclass(frozen=True, slots=True)
class Deployment:
    """All instances and links. A move from i to j passes ``routes[i, j]`` if given, else i's egress and j's ingress.

    ``links``: name → bytes a second. ``link_latency_s``: from the last byte sent to its being in place. Messages
    between gateway, controller and instances take no time.
    """

    instances: tuple[InstanceSpec, ...]
    links: Mapping[str, float] = field(default_factory=dict)
    routes: Mapping[tuple[int, int], tuple[str, ...]] = field(default_factory=dict)
    link_latency_s: float = 0.0
    cluster: ClusterConfig = OPEN_DOOR

    def __post_init__(self) -> None:
        if not any(i.role.can_prefill for i in self.instances) or not any(i.role.can_decode for i in self.instances):
            raise CannotPlan("a deployment needs an instance that prefills and one that decodes")
        for name in (name for path in self._paths() for name in path):
            if not self.links.get(name, 0.0) > 0:
                raise CannotPlan(f"link {name!r} is used but has no bandwidth; give it in links")

    def _paths(self) -> list[tuple[str, ...]]:
        return [*self.routes.values(), *(i.egress for i in self.instances), *(i.ingress for i in self.instances)]

    def path(self, source: int, destination: int) -> tuple[str, ...]:
        """Links that KV from one instance to another passes."""
        route = self.routes.get((source, destination))
        return route if route is not None else self.instances[source].egress + self.instances[destination].ingress


def instance(
    role: Role, model: LatencyModel, limits: InstanceConfig, *, prefix_cache: bool = False, kv_tokens: int = 0
) -> InstanceSpec:
    """An instance with the pool its model reports, and the engine constants the model carries, if it does."""
    traits = model.constants if isinstance(model, OfEngine) else None
    tokens = kv_tokens or model.kv_capacity_tokens
    if tokens <= 0:
        raise CannotPlan(f"{model.name} does not tell how much KV fits; give the tokens of KV of an instance")
    return InstanceSpec(
        role=role,
        model=model,
        config=replace(limits, prefix_cache=prefix_cache),
        kv_tokens=tokens,
        pull_stall_s=traits.pull_stall_s if traits is not None else 0.0,
        pipeline_overlap=traits.pipeline_overlap if traits is not None else 1.0,
    )


def on_ports(
    instances: list[InstanceSpec], bandwidth: float, latency_s: float = 0.0, cluster: ClusterConfig = OPEN_DOOR
) -> Deployment:
    """Instances on one switch: each sends and receives at ``bandwidth`` bytes a second, shared by its moves."""
    if not 0 < bandwidth < math.inf:
        raise CannotPlan(f"KV cannot move at {bandwidth:g} bytes a second; give a bandwidth above 0")
    links = {f"{way}{i}": bandwidth for i in range(len(instances)) for way in ("out", "in")}
    ported = (replace(s, egress=(f"out{i}",), ingress=(f"in{i}",)) for i, s in enumerate(instances))
    return Deployment(tuple(ported), links, link_latency_s=latency_s, cluster=cluster)
