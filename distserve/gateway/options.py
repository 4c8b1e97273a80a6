"""What a gateway process is started with. Plain values; the command line and ``serve`` build one of these."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from distserve.sched.config import GatewayConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayOptions:
    """One gateway. ``ready_fd`` and ``parent_fd`` are inherited descriptors, see ``distserve.wire.life``."""

    id: str = "gateway"
    model: str  # directory (or GGUF file) the tokenizer and chat template are read from
    model_name: str  # what clients call it
    controller: str = ""  # host:port of the controller's gRPC; empty only when it lives in this process
    host: str = "127.0.0.1"  # to bind
    http_port: int | None = 8000  # 0: any; None: no HTTP
    grpc_port: int | None = 50051  # 0: any; None: no gRPC
    api_keys: tuple[str, ...] = ()  # empty: no authentication
    default_timeout_s: float = 600.0  # of a request whose client set none
    machine: GatewayConfig = field(default_factory=GatewayConfig)  # stream limit, retries, patience, see there
    unread_limit_s: float = 60.0  # a client that takes nothing for so long is cut off
    canary: bool = True  # readiness by a real request; False: ready once a path of members is connected
    canary_timeout_s: float = 60.0
    journal: Path | None = None  # JSON lines of every event with its effects
    grace_s: float = 10.0  # after SIGTERM: how long running requests may take to finish
    ready_fd: int | None = None
    parent_fd: int | None = None
    log_level: str = "info"
