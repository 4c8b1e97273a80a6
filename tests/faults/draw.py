"""From a seed to a plan: everything that a seed runs, drawn before it starts.

What a seed means changes whenever this module does. So a seed is good for finding, and what it found is kept as its
shrunk plan (``found/``), which does not change.
"""

from __future__ import annotations

import random
from dataclasses import replace

from distserve.core.types import ModelSpec, Request, Role, Sampling, Stopping
from distserve.sched.batching import BatchPolicy
from distserve.sched.config import ClusterConfig, GatewayConfig, InstanceConfig
from tests.faults.coverage import CANCEL_POINTS
from tests.faults.plan import Client, Fault, Node, Plan, Rates
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

PROFILES = ("calm", "noise", "breaks", "crash", "partition", "stall", "data", "forget", "churn", "storm")

KINDS: dict[str, tuple[str, ...]] = {
    "breaks": ("break",),
    "forget": ("break",),
    "crash": ("crash", "crash", "cut"),
    "partition": ("partition",),
    "stall": ("stall", "freeze"),
    "churn": ("crash", "cut", "break"),
    "storm": ("break", "crash", "cut", "partition", "stall", "freeze"),
}
"""Profile → the kinds of faults that strike in it; the others have hostile rates alone."""


def draw(seed: int, profile: str | None = None, topology: str | None = None) -> Plan:
    """Everything that seed ``seed`` runs."""
    rng = random.Random(seed)
    profile = profile or rng.choice(PROFILES)
    topology = topology or rng.choice(list(TOPOLOGIES))
    span = rng.choice([2.0, 8.0, 25.0])
    nodes = _nodes(rng, TOPOLOGIES[topology], late_until=span if profile == "churn" else 0.0)
    gateways = tuple(f"g{n}" for n in range(rng.choice([1, 1, 2, 3])))
    clients = _clients(rng, gateways, nodes, span)
    faults_end = span + rng.uniform(0, 15)
    tight = rng.random() < 0.15
    in_flight, follow_up = _in_flight(random.Random(f"{seed}:outstanding"))
    if follow_up:
        clients = tuple(_penalized(c) if c.number % 5 == 3 else c for c in clients)
    return Plan(
        seed=seed,
        profile=profile,
        instances=nodes,
        gateways=gateways,
        clients=clients,
        faults=_faults(rng, profile, nodes, gateways, faults_end),
        rates=_rates(rng, profile),
        faults_end=faults_end,
        instance_config=replace(_instance_config(rng, tight), steps_in_flight=in_flight, follow_up=follow_up),
        cluster_config=replace(_cluster_config(rng, tight), overflow_prefill_tokens=_overflow(seed)),
        gateway_config=GatewayConfig(max_streams=rng.choice([3, 4096])) if tight else GatewayConfig(),
        step_s=rng.choice([0.005, 0.02, 0.15, 0.15]),
        hop_s=rng.choice([0.0005, 0.005, 0.05]),
        stage_s=rng.choice([0.002, 0.02, 0.2, 1.0]),
        inline_steps=rng.random() < 0.5,
        tight=tight,
        gives_up=random.Random(f"{seed}:gives up").random() < 0.7,
    )


def _in_flight(rng: random.Random) -> tuple[int, bool]:
    """Steps in flight, and whether they follow one another."""
    return rng.choice([(1, False), (1, False), (2, False), (3, False), (2, True), (2, True), (3, True)])


def _penalized(client: Client) -> Client:
    """The same with penalties, for which a token must be known before the next is planned."""
    return replace(client, request=replace(client.request, sampling=Sampling(0.0, presence_penalty=0.5)))


def _nodes(rng: random.Random, roles: tuple[Role, ...], late_until: float) -> tuple[Node, ...]:
    tokens = rng.choice([96, 160, 400])
    size = rng.choice([4, 8, 16])
    nodes = []
    for number, role in enumerate(roles):
        if rng.random() < 0.3:
            size = rng.choice([4, 8, 16])  # block size is local to an instance
        spec = ModelSpec("m", "f1", 32000, 300, (EOS,), 2, 2, 8, "float32", size, tokens // size)
        late = late_until and rng.random() < 0.4
        nodes.append(Node(f"i{number}", role, spec, rng.uniform(0, late_until) if late else rng.uniform(0, 0.2)))
    return tuple(nodes)


def _instance_config(rng: random.Random, tight: bool) -> InstanceConfig:
    return InstanceConfig(
        max_batch_tokens=rng.choice([32, 128, 2048]),
        max_mixed_tokens=rng.choice([16, 64, 512]),
        prefill_chunk=rng.choice([8, 32, 512]),
        max_sequences=rng.choice([2, 4, 64]),
        max_waiting=rng.choice([1, 2, 1024]) if tight else 1024,
        batching=rng.choice([BatchPolicy.CHUNKED, BatchPolicy.CHUNKED, *BatchPolicy]),
        prefix_cache=rng.random() < 0.8,
        reserve_timeout_s=rng.choice([5.0, 60.0]),
        commit_timeout_s=rng.choice([3.0, 10.0]),
        lease_s=rng.choice([6.0, 10.0]),
    )


def _cluster_config(rng: random.Random, tight: bool) -> ClusterConfig:
    local = rng.choice([0, 0, 0, 12])
    if not tight:
        return ClusterConfig(local_prefill_tokens=local)
    return ClusterConfig(
        local_prefill_tokens=local,
        max_open_requests=rng.choice([3, 2048]),
        max_queued_tokens=rng.choice([80, 262_144]),
    )


def _overflow(seed: int) -> int:
    return random.Random(f"{seed}:overflow").choice([0, 0, 1, 30])


def _clients(rng: random.Random, gateways: tuple[str, ...], nodes: tuple[Node, ...], span: float) -> tuple[Client, ...]:
    room = min(n.spec.max_sequence_tokens for n in nodes)
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
        client = Client(rng.uniform(0.2, span), rng.choice(gateways), number, request, stop_at)
        earlier.append(client.truth())
        if rng.random() < cancels:
            client = _leaving(rng, client)
        clients.append(client)
    return tuple(clients)


def _leaving(rng: random.Random, client: Client) -> Client:
    """Its client leaves at once, soon, later, or just when its request reaches some phase."""
    after = rng.choice([None, None, 0.0, rng.uniform(0, 0.2), rng.uniform(0, 5)])
    if after is None:
        return replace(client, cancel_on=rng.choice(CANCEL_POINTS))
    return replace(client, cancel_after=after)


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
    if profile in ("breaks", "crash", "partition", "stall", "churn"):
        return rng.choice([Rates(), replace(noise, drop=0.0), noise])
    if profile == "noise":
        return rng.choice([noise, Rates(duplicate=0.4), Rates(drop=0.3), Rates(slow=0.3)])
    if profile == "forget":  # old attempts live on because nobody hears that they are over
        return Rates(drop_abandon=rng.choice([0.5, 0.9]), drop=rng.choice([0.0, 0.1]), lose_ack=rng.choice([0.0, 0.3]))
    data = Rates(flip=0.05, truncate=0.05, lose_stage=0.1, lose_ack=0.1, twice=0.1, late=0.05)
    if profile == "data":
        heavy = [Rates(lose_ack=0.5), Rates(flip=0.4), Rates(truncate=0.4), Rates(lose_stage=0.4)]
        reuse = [Rates(twice=0.5), Rates(late=0.4)]
        return rng.choice([data, data, *heavy, *reuse, Rates(step_fails=0.05)])
    return replace(data, duplicate=0.08, drop=0.05, slow=0.03, step_fails=rng.choice([0.0, 0.01]))


def _faults(
    rng: random.Random, profile: str, nodes: tuple[Node, ...], gateways: tuple[str, ...], end: float
) -> tuple[Fault, ...]:
    kinds = KINDS.get(profile, ())
    if not kinds:
        return ()
    instances = [n.name for n in nodes]
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
                after=rng.choice([1, 1, 2, 3]),
            )
        )
    if profile == "churn":
        faults += _leaves(rng, nodes, end)
    return tuple(sorted(faults, key=lambda f: f.at))


def _leaves(rng: random.Random, nodes: tuple[Node, ...], end: float) -> list[Fault]:
    """Instances that leave for good, as long as the others can still serve."""
    staying = list(nodes)
    leaves = []
    for node in rng.sample(nodes, len(nodes)):
        rest = [n for n in staying if n is not node]
        if any(n.role.can_prefill for n in rest) and any(n.role.can_decode for n in rest):
            staying = rest
            at = rng.uniform(node.starts_at + 0.3, max(end, node.starts_at + 1))
            leaves.append(Fault(at, "leave", node.name, duration_s=rng.choice([0.0, rng.uniform(0.5, 4)])))
    return leaves[: rng.choice([1, 2])]
