"""What an instance process is started with. Plain values; the command line and ``serve`` build one of these."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from distserve.core.types import Role
from distserve.sched.config import InstanceConfig
from distserve.wire.security import SecurityOptions
from distserve_kernels.cores import usable_cores


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
    kernels: str = "auto"  # "auto" | "native" | "torch" | "triton"
    cuda_graphs: str = "auto"  # "auto" | "off"
    steps_in_flight: int | None = None  # planned before the last is done; None: by device and stages
    threads: int = 1  # of the forward pass
    cores: tuple[int, ...] = ()  # that steps and KV copies keep to; none: any
    kv_cache_dtype: str = "auto"  # of KV: "auto" (``dtype``) | "float32" | "bfloat16" | "float16" | "fp8_e4m3"
    kv_tokens: int | None = None  # size of the KV pool, in tokens; None: what fits
    kv_memory_fraction: float | None = None  # of free memory, for a pool that is as large as fits; None: by device
    memory_bytes: int | None = None  # of the host, for weights and KV; None: all that is free
    memory_share: float = 1.0  # of each GPU, where instances share them
    block_size: int = 16  # tokens a block
    max_model_len: int | None = None  # None: what the model's configuration says
    tp: int = 1  # ranks that share each layer's heads
    pp: int = 1  # stages of layers, each of ``tp`` ranks
    rank_timeout_s: float = 120.0  # the longest wait of one rank for another
    transfer: str = "auto"  # "auto" | "shm" | "gloo" | "nccl" | "ipc"
    host: str = "127.0.0.1"  # to bind
    port: int = 0
    ops_port: int | None = None  # HTTP port of /metrics, /livez and /readyz; 0: any; None: off
    advertise_host: str = ""  # what others dial; empty: ``host``, or our side of the way to the controller
    advertise: str = ""  # HOST:PORT that others dial for gRPC, where a translated port leads here; empty: our own
    data_port: int = 0  # of the KV data plane
    advertise_data: str = ""  # as ``advertise``, for the KV data plane
    step_timeout_s: float | None = 300.0  # a step that takes longer ends the process; None: no limit
    machine: InstanceConfig = field(default_factory=InstanceConfig)  # limits and deadlines, see there
    security: SecurityOptions = field(default_factory=SecurityOptions)
    journal: Path | None = None  # JSON lines of every event with its effects
    grace_s: float = 10.0  # after SIGTERM: how long running requests may take to finish
    ready_fd: int | None = None
    parent_fd: int | None = None
    log_level: str = "info"

    def check(self) -> None:
        """Raise ``ValueError`` for what can be known before anything is started; the text is for the user."""
        self.security.check_control(self.host)
        for flag, address in (("--advertise", self.advertise), ("--advertise-data", self.advertise_data)):
            host, _, port = address.rpartition(":")
            if address and not (host and port.isdigit() and 0 < int(port) < 65_536):
                raise ValueError(f"{flag} {address}: HOST:PORT is needed, as others dial it")
        in_flight = 1 if self.steps_in_flight is None else self.steps_in_flight
        for flag, count in (("--tp", self.tp), ("--pp", self.pp), ("--steps-in-flight", in_flight)):
            if count < 1:
                raise ValueError(f"{flag} {count}: at least 1 is needed")
        if in_flight > 1 and self.tp > 1 and self.pp == 1:
            raise ValueError(
                f"--steps-in-flight {in_flight}: ranks of one stage run one step at a time; leave it out, or add --pp"
            )
        if strange := set(self.cores) - set(usable_cores()):
            raise ValueError(
                f"--cores {','.join(map(str, self.cores))}: this process may not run on {min(strange)}, but on "
                f"{','.join(map(str, usable_cores()))}"
            )
        if self.tp * self.pp > 1 and self.advertise_data:
            raise ValueError("--advertise-data names one address, but every rank has its own: leave it out")
        if self.kv_memory_fraction is not None and not 0 < self.kv_memory_fraction <= 1:
            raise ValueError(f"--kv-memory-fraction {self.kv_memory_fraction:g}: a part of 1 is needed, such as 0.5")
        if not 0 < self.memory_share <= 1:
            raise ValueError(f"--memory-share {self.memory_share:g}: a part of 1 is needed, such as 0.5")
        if self.rank_timeout_s <= 0:
            raise ValueError(f"--rank-timeout {self.rank_timeout_s:g}: more than 0 is needed")
        if self.step_timeout_s is not None and self.step_timeout_s <= 0:
            raise ValueError(f"--step-timeout {self.step_timeout_s:g}: more than 0 is needed, or none for no limit")
