"""What an instance process is started with. Plain values; the command line and ``serve`` build one of these."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from distserve.core.types import Role
from distserve.sched.config import InstanceConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceOptions:
    """One instance: which model, in which role, reachable where, for how long it may take to stop.

    ``ready_fd`` and ``parent_fd`` are inherited descriptors, see ``distserve.wire.life``. A port of 0 takes any.
    """

    id: str
    model: str  # a Hugging Face directory, a GGUF file, or random:<config.json>
    model_name: str  # what clients call it
    controller: str  # host:port of the controller's gRPC
    role: Role = Role.MIXED
    dtype: str = "float32"  # "float32" | "bfloat16" | "float16"
    device: str = "cpu"
    threads: int = 1  # of the forward pass
    kv_tokens: int = 65_536  # size of the KV pool, in tokens
    block_size: int = 16  # tokens a block
    max_model_len: int | None = None  # None: what the model's configuration says
    transfer: str = "auto"  # "auto" | "shm" | "gloo" | "nccl"
    host: str = "127.0.0.1"  # to bind
    port: int = 0
    ops_port: int | None = None  # HTTP port of /metrics, /livez and /readyz; 0: any; None: off
    advertise_host: str = ""  # what others dial; empty: ``host``, or our side of the way to the controller
    machine: InstanceConfig = field(default_factory=InstanceConfig)  # limits and deadlines, see there
    journal: Path | None = None  # JSON lines of every event with its effects
    grace_s: float = 10.0  # after SIGTERM: how long running requests may take to finish
    ready_fd: int | None = None
    parent_fd: int | None = None
    log_level: str = "info"
