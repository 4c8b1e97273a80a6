"""What a controller process is started with. Plain values; the command line and ``serve`` build one of these."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from distserve.sched.config import ClusterConfig
from distserve.wire.security import SecurityOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerOptions:
    """The one controller. ``ready_fd`` and ``parent_fd`` are inherited descriptors, see ``distserve.wire.life``."""

    host: str = "127.0.0.1"  # to bind
    port: int = 0  # 0: any
    ops_port: int | None = None  # HTTP port of /metrics, /livez and /readyz; 0: any; None: off
    machine: ClusterConfig = field(default_factory=ClusterConfig)  # lease, admission, dispatch, see there
    journal: Path | None = None  # JSON lines of every event with its effects
    security: SecurityOptions = field(default_factory=SecurityOptions)
    grace_s: float = 2.0  # after SIGTERM
    ready_fd: int | None = None
    parent_fd: int | None = None
    log_level: str = "info"

    def check(self) -> None:
        """Raise ``ValueError`` for what can be known before anything is started; the text is for the user."""
        self.security.check_control(self.host)
