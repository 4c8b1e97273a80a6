"""What one seed runs: the cluster, the clients, the faults and their rates, all drawn before it starts."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

from distserve.core.types import ModelSpec, Request, Role, Sampling, Stopping
from distserve.sched.config import ClusterConfig, GatewayConfig, InstanceConfig
from tests.faults.truth import EOS, Truth

TOPOLOGIES: dict[str, tuple[Role, ...]] = {
    "1P1D": (Role.PREFILL, Role.DECODE),
    "2P2D": (Role.PREFILL, Role.PREFILL, Role.DECODE, Role.DECODE),
    "1P2D": (Role.PREFILL, Role.DECODE, Role.DECODE),
    "2P1D": (Role.PREFILL, Role.PREFILL, Role.DECODE),
    "2M": (Role.MIXED, Role.MIXED),
    "1P1M": (Role.PREFILL, Role.MIXED),
    "1P1D1M": (Role.PREFILL, Role.DECODE, Role.MIXED),
}

PROFILES = ("calm", "noise", "breaks", "crash", "partition", "stall", "data", "forget", "storm")

KINDS: dict[str, tuple[str, ...]] = {
    "breaks": ("break",),
    "forget": ("break",),
    "crash": ("crash",),
    "partition": ("partition",),
    "stall": ("stall", "freeze"),
    "storm": ("break", "crash", "partition", "stall", "freeze"),
}
"""Profile → the kinds of faults that strike in it; the others have hostile rates alone."""


@dataclass(frozen=True)
class Rates:
    """How hostile the world is, until ``faults_end``. Probabilities are per message, stage or step."""

    duplicate: float = 0.0
    drop: float = 0.0  # only messages that their sender repeats or does without
    drop_abandon: float = 0.0  # Abandon and Abandoned alone
    slow: float = 0.0  # a message is held up for up to seconds
    corrupt: float = 0.0
    lose_stage: float = 0.0
    lose_ack: float = 0.0  # stored, yet the source is told that it failed
    twice: float = 0.0  # a stage arrives twice
    late: float = 0.0  # a stage takes longer than a lease
    step_fails: float = 0.0


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong at a time."""

    at: float
    kind: str  # crash | stall (of the machine alone) | freeze (heartbeats too) | break | partition
    target: str
    other: str = ""  # of a break or partition; empty: everybody
    duration_s: float = 0.0
    one_way: bool = False


@dataclass(frozen=True)
class Client:
    """One request, the gateway it goes to, and when its client leaves."""

    at: float
    gateway: str
    truth: Truth
    cancel_after: float | None


@dataclass(frozen=True)
class Plan:
    seed: int
    profile: str
    topology: str
    specs: dict[str, ModelSpec]  # by instance id
    roles: dict[str, Role]
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
    offsets: dict[str, float] = field(default_factory=dict)  # each process has a clock of its own

    def describe(self) -> str:
        return (
            f"seed {self.seed}: {self.profile}, {self.topology}, {len(self.gateways)} gateways, "
            f"{len(self.clients)} requests, {len(self.faults)} faults, pools "
            f"{[(s.pool_blocks, s.block_size) for s in self.specs.values()]}, inline={self.inline_steps}"
        )


def draw(seed: int, profile: str | None = None, topology: str | None = None) -> Plan:
    """Everything that seed ``seed`` runs."""
    rng = random.Random(seed)
    profile = profile or rng.choice(PROFILES)
    topology = topology or rng.choice(list(TOPOLOGIES))
    roles = {f"i{n}": role for n, role in enumerate(TOPOLOGIES[topology])}
    specs = _specs(rng, roles)
    gateways = tuple(f"g{n}" for n in range(rng.choice([1, 1, 2, 3])))
    span = rng.choice([2.0, 8.0, 25.0])
    clients = _clients(rng, gateways, specs, span)
    faults_end = span + rng.uniform(0, 15)
    names = [*roles, *gateways, "c"]
    return Plan(
        seed=seed,
        profile=profile,
        topology=topology,
        specs=specs,
        roles=roles,
        gateways=gateways,
        clients=clients,
        faults=_faults(rng, profile, list(roles), list(gateways), faults_end),
        rates=_rates(rng, profile),
        faults_end=faults_end,
        instance_config=_instance_config(rng),
        cluster_config=ClusterConfig(local_prefill_tokens=rng.choice([0, 0, 0, 12])),
        gateway_config=GatewayConfig(),
        step_s=rng.choice([0.005, 0.02, 0.15, 0.15]),
        hop_s=rng.choice([0.0005, 0.005, 0.05]),
        stage_s=rng.choice([0.002, 0.02, 0.2, 1.0]),
        inline_steps=rng.random() < 0.5,
        offsets={name: rng.uniform(0, 1e5) for name in names},
    )


def _specs(rng: random.Random, roles: dict[str, Role]) -> dict[str, ModelSpec]:
    tokens = rng.choice([96, 160, 400])
    size = rng.choice([4, 8, 16])
    specs = {}
    for name in roles:
        if rng.random() < 0.3:
            size = rng.choice([4, 8, 16])  # block size is local to an instance
        specs[name] = ModelSpec("m", "f1", 32000, 300, (EOS,), 2, 2, 8, "float32", size, tokens // size)
    return specs


def _instance_config(rng: random.Random) -> InstanceConfig:
    return InstanceConfig(
        max_batch_tokens=rng.choice([32, 128, 2048]),
        max_mixed_tokens=rng.choice([16, 64, 512]),
        prefill_chunk=rng.choice([8, 32, 512]),
        max_sequences=rng.choice([2, 4, 64]),
        prefix_cache=rng.random() < 0.8,
        reserve_timeout_s=rng.choice([5.0, 60.0]),
        commit_timeout_s=rng.choice([3.0, 10.0]),
        lease_s=rng.choice([6.0, 10.0]),
    )


def _clients(
    rng: random.Random, gateways: tuple[str, ...], specs: dict[str, ModelSpec], span: float
) -> tuple[Client, ...]:
    room = min(s.max_sequence_tokens for s in specs.values())
    shared = [rng.randrange(100, 900) for _ in range(room)]
    earlier: list[Truth] = []
    clients = []
    cancels = rng.choice([0.0, 0.1, 0.4])
    outgrow = rng.random() < 0.25  # short prompts that grow long together, until the pool is full
    for number in range(rng.choice([4, 12, 24])):
        most = rng.choice([40, 70]) if outgrow else rng.choice([1, 4, 12, 30])
        prompt = _prompt(rng, min(20, room - most) if outgrow else room - most, shared, earlier)
        request = Request(
            id=f"r{number}",
            model="m",
            prompt_token_ids=tuple(prompt),
            sampling=Sampling(temperature=0.0, seed=number),
            stopping=Stopping(most, min(most, rng.choice([0, 0, 2])), (EOS,)),
            timeout_s=rng.choice([30.0, 120.0, 120.0]),
        )
        stop_at = rng.randrange(max(1, request.stopping.min_tokens), 100 if outgrow else 40)
        truth = Truth.of(number, request, stop_at)
        earlier.append(truth)
        cancel = rng.choice([0.0, rng.uniform(0, 0.2), rng.uniform(0, 5)]) if rng.random() < cancels else None
        clients.append(Client(rng.uniform(0.2, span), rng.choice(gateways), truth, cancel))
    return tuple(clients)


def _prompt(rng: random.Random, room: int, shared: list[int], earlier: list[Truth]) -> list[int]:
    length = min(room, rng.choice([1, 5, 20, 60, room]))
    kind = rng.random()
    if kind < 0.4:
        start = shared[: rng.randint(0, length)]
    elif kind < 0.6 and earlier:
        before = rng.choice(earlier)  # the next turn of a conversation
        start = list(before.tokens(0, before.prompt_len + len(before.output)))[:length]
    elif kind < 0.7 and earlier:
        return list(rng.choice(earlier).request.prompt_token_ids)[: max(1, room)]
    else:
        start = []
    return start + [rng.randrange(1000, 2000) for _ in range(max(1, length) - len(start))]


def _rates(rng: random.Random, profile: str) -> Rates:
    noise = Rates(duplicate=0.08, drop=0.05, slow=0.03)
    if profile == "calm":
        return Rates()
    if profile in ("breaks", "crash", "partition", "stall"):
        return rng.choice([Rates(), replace(noise, drop=0.0), noise])
    if profile == "noise":
        return rng.choice([noise, Rates(duplicate=0.4), Rates(drop=0.3), Rates(slow=0.3)])
    if profile == "forget":  # old attempts live on because nobody hears that they are over
        return Rates(drop_abandon=rng.choice([0.5, 0.9]), drop=rng.choice([0.0, 0.1]), lose_ack=rng.choice([0.0, 0.3]))
    data = Rates(corrupt=0.1, lose_stage=0.1, lose_ack=0.1, twice=0.1, late=0.05)
    if profile == "data":
        heavy = Rates(lose_ack=0.5), Rates(corrupt=0.4), Rates(twice=0.5), Rates(late=0.4), Rates(lose_stage=0.4)
        return rng.choice([data, data, *heavy, Rates(step_fails=0.05)])
    return replace(data, duplicate=0.08, drop=0.05, slow=0.03, step_fails=rng.choice([0.0, 0.01]))


def _faults(
    rng: random.Random, profile: str, instances: list[str], gateways: list[str], end: float
) -> tuple[Fault, ...]:
    kinds = KINDS.get(profile, ())
    if not kinds:
        return ()
    names = [*instances, *instances, *gateways, "c"]
    faults = []
    for _ in range(rng.choice([1, 2, 6])):
        kind, target = rng.choice(kinds), rng.choice(names)
        others = [n for n in names if n != target]
        faults.append(
            Fault(
                at=rng.uniform(0.3, end),
                kind=kind,
                target=target,
                other=rng.choice(["", *others]) if kind == "partition" else rng.choice(others),
                duration_s=rng.choice([rng.uniform(0.05, 1), rng.uniform(1, 5), rng.uniform(5, 20)]),
                one_way=rng.random() < 0.4,
            )
        )
    return tuple(sorted(faults, key=lambda f: f.at))
