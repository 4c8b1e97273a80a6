"""What a gateway process is started with. Plain values; the command line and ``serve`` build one of these."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from distserve.gateway.limits import Limits
from distserve.sched.config import GatewayConfig
from distserve.wire.security import SecurityOptions, TlsFiles


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
    api_keys: Path | None = None  # file of hashed keys; None: no authentication
    open_metrics: bool = False  # /metrics without a key
    public_tls_dir: Path | None = None  # certificate for clients, if it is not the one for the other parts
    limits: Limits = field(default_factory=Limits)  # of what a client may send, see there
    security: SecurityOptions = field(default_factory=SecurityOptions)
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

    @property
    def public_tls(self) -> TlsFiles | None:
        """The certificate shown to clients; None: plain HTTP and gRPC."""
        return TlsFiles.of(self.public_tls_dir) if self.public_tls_dir is not None else self.security.tls

    def check(self) -> None:
        """Raise ``ValueError`` for what can be known before anything is started; the text is for the user."""
        self.security.check_clients(self.host, has_keys=self.api_keys is not None)
