"""What a run is made of, as data: the cluster, the clients, the faults and their rates.

A plan says everything: ``draw`` makes one from a seed, ``shrink`` cuts one down, ``save`` keeps one in a file.
The numbers that the world draws while it runs come from streams of their own, one for each link and instance, keyed by
the plan's ``seed`` and the names involved: cutting one client or fault leaves the luck of the others as it was.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, fields
from pathlib import Path

import orjson

from distserve.core.types import ModelSpec, Request, Role
from distserve.observe.codec import decode, encode, register
from distserve.sched.config import ClusterConfig, GatewayConfig, InstanceConfig
from tests.faults.truth import Truth


@dataclass(frozen=True)
class Rates:
    """How hostile the world is, until ``faults_end``. Probabilities are per message, stage or step."""

    duplicate: float = 0.0
    drop: float = 0.0  # only messages that their sender repeats or does without
    drop_abandon: float = 0.0  # Abandon and Abandoned alone
    slow: float = 0.0  # a message is held up for up to seconds
    flip: float = 0.0  # a bit of a stage's bytes
    truncate: float = 0.0  # a stage's bytes end early
    lose_stage: float = 0.0
    lose_ack: float = 0.0  # stored, yet the source is told that it failed
    twice: float = 0.0  # a stage arrives twice, the second time into staging that others may use by then
    late: float = 0.0  # a stage takes longer than a lease, and completes into staging that others may use by then
    step_fails: float = 0.0

    def only(self, name: str) -> Rates:
        """All but one at zero."""
        return Rates(**{name: getattr(self, name)})

    @property
    def nonzero(self) -> tuple[str, ...]:
        return tuple(f.name for f in fields(self) if getattr(self, f.name))


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong at a time."""

    at: float
    kind: str  # crash | cut (crash between two effects) | stall (of the machine alone) | freeze (heartbeats too)
    #            | break (of a stream) | partition | leave (for good, after draining for duration_s)
    target: str
    other: str = ""  # of a break or partition; empty: everybody
    duration_s: float = 0.0
    one_way: bool = False
    after: int = 1  # of a cut: effects of the step that are still performed


@dataclass(frozen=True)
class Client:
    """One request, the gateway it goes to, and when its client leaves: never, after a time, or at a phase."""

    at: float
    gateway: str
    number: int
    request: Request
    stop_at: int | None  # the output index at which EOS is sampled
    cancel_after: float | None = None
    cancel_on: str = ""  # a phase of its sequence, stream or move, as ``coverage`` names it

    def truth(self) -> Truth:
        return Truth.of(self.number, self.request, self.stop_at)


@dataclass(frozen=True)
class Node:
    """One instance of the plan."""

    name: str
    role: Role
    spec: ModelSpec
    starts_at: float = 0.0


@dataclass(frozen=True)
class Plan:
    """See the module. Times in virtual seconds."""

    seed: int
    profile: str
    instances: tuple[Node, ...]
    gateways: tuple[str, ...]
    clients: tuple[Client, ...]
    faults: tuple[Fault, ...]
    rates: Rates
    faults_end: float
    instance_config: InstanceConfig
    cluster_config: ClusterConfig
    gateway_config: GatewayConfig
    step_s: float  # a step takes about this long
    hop_s: float  # a message takes about this long
    stage_s: float  # a stage takes about this long
    inline_steps: bool  # an instance takes no event while it steps, as the live shell does
    tight: bool = False  # admission limits are low enough to be met
    skewed: bool = True  # each process has a clock of its own
    gives_up: bool = False  # steps that nobody waits for end early, as live, and now and then another

    @property
    def names(self) -> tuple[str, ...]:
        return (*(node.name for node in self.instances), *self.gateways, "c")

    def stream_of(self, *names: str) -> random.Random:
        """A stream of numbers that depends on the seed and these names alone."""
        return random.Random(":".join((str(self.seed), *names)))

    def offset(self, name: str) -> float:
        """How far a process's own clock is ahead."""
        return self.stream_of("clock", name).uniform(0, 1e5) if self.skewed else 0.0

    def describe(self) -> str:
        roles = "".join(f" {n.name}={n.role}({n.spec.pool_blocks}×{n.spec.block_size})" for n in self.instances)
        return (
            f"seed {self.seed}: {self.profile},{roles}, {len(self.gateways)} gateways, {len(self.clients)} requests, "
            f"{len(self.faults)} faults, rates {', '.join(self.rates.nonzero) or 'none'}, "
            f"inline={self.inline_steps}, tight={self.tight}, {self.instance_config.steps_in_flight} steps in flight"
            f"{', following' if self.instance_config.follow_up else ''}"
        )


@dataclass(frozen=True)
class Case:
    """A plan that once broke a property, with what it found."""

    what: str
    broken: str  # the property
    plan: Plan
    breakage: str = ""  # the deliberate bug (``breakages``) that stands for the one found, where there is one
    notes: tuple[str, ...] = field(default=())


register(Rates, Fault, Client, Node, Plan, Case, InstanceConfig, ClusterConfig, GatewayConfig)


def save(case: Case, path: Path) -> None:
    """Write a case as readable JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(orjson.dumps(encode(case)["Case"], option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))


def load(path: Path) -> Case:
    """Read what ``save`` wrote. Raises ``UndecodableError`` where a name or type is no more what it was."""
    case = decode("Case", orjson.loads(path.read_bytes()))
    assert isinstance(case, Case)
    return case
