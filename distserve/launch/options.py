"""What ``distserve serve`` is started with, and the processes that follow from it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from distserve.core.types import Role
from distserve.gateway.limits import Limits
from distserve.sched.config import ClusterConfig, GatewayConfig, InstanceConfig
from distserve.wire.security import SecurityOptions, TlsFiles
from distserve_kernels.cores import share_cores, usable_cores

DTYPES = ("float32", "bfloat16", "float16")
KV_DTYPES = ("auto", *DTYPES, "fp8_e4m3")
KERNELS = ("auto", "native", "torch", "triton")
CUDA_GRAPHS = ("auto", "off")
TRANSFERS = ("auto", "shm", "gloo", "nccl", "ipc")
LEVELS = ("debug", "info", "warning", "error")
_MOST_INSTANCES = 64  # of one role on one machine; beyond, a typing error is likelier than a wish
_MOST_RANKS = 64


class BadOptions(ValueError):
    """Options that do not fit together; the text is for the user."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """A whole cluster on one machine. Every default here is meant to be right for a laptop."""

    model: str
    model_name: str | None = None
    tokenizer: str | None = None
    prefill: int = 0
    decode: int = 0
    mixed: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    kernels: str = "auto"
    cuda_graphs: str = "auto"
    steps_in_flight: int | None = None
    threads_per_rank: int | None = None
    pin: bool = True
    tp: int = 1
    pp: int = 1
    prefill_tp: int | None = None
    prefill_pp: int | None = None
    decode_tp: int | None = None
    decode_pp: int | None = None
    rank_timeout_s: float = 120.0
    kv_cache_dtype: str = "auto"
    kv_tokens: int | None = None
    kv_memory_fraction: float | None = None
    block_size: int = 16
    max_model_len: int | None = None
    transfer: str = "auto"
    host: str = "127.0.0.1"
    http_port: int | None = 8000
    grpc_port: int | None = 50051
    controller_port: int = 0
    api_keys: Path | None = None
    open_metrics: bool = False
    public_tls_dir: Path | None = None
    default_timeout_s: float = 600.0
    unread_limit_s: float = 60.0
    canary: bool = True
    canary_timeout_s: float = 60.0
    start_timeout_s: float = 600.0
    grace_s: float = 10.0
    restart: bool = True
    step_timeout_s: float | None = 300.0
    print_ready: bool = False
    journal: Path | None = None
    log_level: str = "info"
    parent_fd: int | None = None  # see distserve.wire.life
    instance: InstanceConfig = field(default_factory=InstanceConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    gateway: GatewayConfig = field(default_factory=GatewayConfig)
    limits: Limits = field(default_factory=Limits)
    security: SecurityOptions = field(default_factory=SecurityOptions)

    @property
    def name(self) -> str:
        """What clients call the model."""
        return self.model_name or served_name(self.model)

    @property
    def instances(self) -> tuple[tuple[str, Role], ...]:
        """(id, role) of every instance; one prefill and one decode when none was asked for."""
        counts = {Role.PREFILL: self.prefill, Role.DECODE: self.decode, Role.MIXED: self.mixed}
        if not any(counts.values()):
            counts = {Role.PREFILL: 1, Role.DECODE: 1}
        return tuple((f"{role.value}-{n}", role) for role, count in counts.items() for n in range(count))

    def layout(self, role: Role) -> tuple[int, int]:
        """(tp, pp) of the instances of a role."""
        own = {Role.PREFILL: (self.prefill_tp, self.prefill_pp), Role.DECODE: (self.decode_tp, self.decode_pp)}
        tp, pp = own.get(role, (None, None))
        return self.tp if tp is None else tp, self.pp if pp is None else pp

    @property
    def threads(self) -> int:
        """Threads of one rank's forward pass: an equal share of the cores unless told."""
        if self.threads_per_rank is not None:
            return self.threads_per_rank
        layouts = [self.layout(role) for _, role in self.instances]
        return max(1, len(usable_cores()) // sum(tp * pp for tp, pp in layouts))

    @property
    def cores(self) -> dict[str, tuple[int, ...]]:
        """Cores of its own for each instance, by id, and so for each of its ranks; none where they do not suffice, or
        were not wanted.
        """
        ranks = {name: math.prod(self.layout(role)) for name, role in self.instances}
        needs = [self.threads] * sum(ranks.values())
        pinned = self.pin and self.device == "cpu"
        given = iter(share_cores(usable_cores(), needs) if pinned else [()] * len(needs))
        return {name: tuple(core for own in islice(given, count) for core in own) for name, count in ranks.items()}

    def check(self) -> None:
        """Raise ``BadOptions`` for what can be known before anything is started."""
        for name in ("prefill", "decode", "mixed"):
            if not 0 <= (count := getattr(self, name)) <= _MOST_INSTANCES:
                raise BadOptions(f"--{name} {count}: between 0 and {_MOST_INSTANCES} instances can be started")
        roles = [role for _, role in self.instances]
        if not any(r.can_prefill for r in roles):
            raise BadOptions("no instance could read a prompt: add --prefill 1 or --mixed 1")
        if not any(r.can_decode for r in roles):
            raise BadOptions("no instance could write an answer: add --decode 1 or --mixed 1")
        self._check_ports()
        self._check_security()
        for name in ("tp", "pp", "prefill_tp", "prefill_pp", "decode_tp", "decode_pp"):
            if (ranks := getattr(self, name)) is not None and not 1 <= ranks <= _MOST_RANKS:
                raise BadOptions(f"--{name.replace('_', '-')} {ranks}: between 1 and {_MOST_RANKS}")
        for name, least in (("kv_tokens", 1), ("block_size", 1), ("threads_per_rank", 1), ("max_model_len", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise BadOptions(f"--{name.replace('_', '-')} {value}: at least {least} is needed")
        if self.kv_memory_fraction is not None and not 0 < self.kv_memory_fraction <= 1:
            raise BadOptions(f"--kv-memory-fraction {self.kv_memory_fraction:g}: a part of 1 is needed, such as 0.5")
        if self.kv_tokens is not None and self.kv_tokens < self.block_size:
            raise BadOptions(f"--kv-tokens {self.kv_tokens} holds not one block of {self.block_size} tokens")
        if self.transfer in ("nccl", "ipc") and self.device == "cpu":
            raise BadOptions(f"--transfer {self.transfer} needs --device cuda; on a CPU choose auto, shm or gloo")

    @property
    def public_tls(self) -> TlsFiles | None:
        """The certificate shown to clients; None: plain HTTP and gRPC. Raises ``Unsafe``."""
        return TlsFiles.of(self.public_tls_dir) if self.public_tls_dir is not None else self.security.tls

    def _check_security(self) -> None:
        """Raise ``Unsafe`` if a port would be open to a network, or the certificates are no good for their use."""
        self.security.check_clients(self.host, has_keys=self.api_keys is not None)
        _ = self.public_tls
        if self.controller_port:
            self.security.check_control(self.host)

    def _check_ports(self) -> None:
        if self.http_port is None and self.grpc_port is None:
            raise BadOptions("both --http-port and --grpc-port are off: nobody could ask anything")
        named = {"http": self.http_port, "grpc": self.grpc_port, "controller": self.controller_port}
        for name, port in named.items():
            if port is not None and not 0 <= port < 65_536:
                raise BadOptions(f"--{name}-port {port}: a port is between 0 (any) and 65535")
        fixed = [p for p in named.values() if p]
        if len(set(fixed)) < len(fixed):
            raise BadOptions(f"two of --http-port, --grpc-port and --controller-port are the same: {fixed}")


def served_name(model: str) -> str:
    """What clients call a model that was given no name: the alias, or the last part of its path."""
    return Path(model.removeprefix("random:").rstrip("/").removesuffix("/config.json")).name or model
