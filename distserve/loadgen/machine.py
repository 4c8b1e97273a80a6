"""Where a measurement was made: versions, hardware, and how busy the machine was. Reads /proc where there is one."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from distserve import __version__

_PROC = Path("/proc")
_TICKS = os.sysconf("SC_CLK_TCK")
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_tile")


def versions() -> dict[str, str]:
    """Ours, Python's, the system's, and those of the libraries that decide speed, as far as they are installed."""
    found = {"distserve": __version__, "python": platform.python_version(), "system": platform.platform(terse=True)}
    for name in ("torch", "transformers", "grpcio"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def hardware() -> dict[str, Any]:
    """Processor, cores this process may use, memory, and the vector units that matter to a model."""
    cpu = _cpu_info()
    return {
        "cpu": cpu.get("model name", platform.processor() or platform.machine()),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "units": [flag for flag in _FLAGS if flag in cpu.get("flags", "").split()],
    }


def _cpu_info() -> dict[str, str]:
    try:
        lines = (_PROC / "cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in reversed(lines))
    return {name.strip(): value.strip() for name, _, value in pairs}


def tree_cpu_s(roots: Sequence[int]) -> float:
    """CPU seconds used so far by these processes and all below them, ended children included."""
    children: dict[int, list[int]] = {}
    used: dict[int, float] = {}
    for entry in _PROC.iterdir() if _PROC.is_dir() else ():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue  # it ended meanwhile
            children.setdefault(int(fields[1]), []).append(int(entry.name))
            used[int(entry.name)] = sum(map(int, fields[11:15])) / _TICKS
    todo, total, seen = list(roots), 0.0, set()
    while todo:
        pid = todo.pop()
        if pid not in seen:
            seen.add(pid)
            total += used.get(pid, 0.0)
            todo += children.get(pid, [])
    return total


def _busy_s() -> float:
    """CPU seconds that anything on this machine has used since it started."""
    try:
        first = (_PROC / "stat").read_text().split("\n", 1)[0]
    except OSError:
        return 0.0
    ticks = [int(x) for x in first.split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / _TICKS


@dataclass(slots=True)
class CpuWatch:
    """What share of the cores the server, this client and all others used between its making and ``stop``."""

    server_pids: tuple[int, ...] = ()
    _at: float = 0.0
    _before: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def __post_init__(self) -> None:
        self._at, self._before = time.perf_counter(), self._now()

    def stop(self) -> dict[str, float]:
        """Cores in use, on average: of the server (0 if its pids are not known), the client, and all others."""
        wall = max(time.perf_counter() - self._at, 1e-9)
        busy, server, client = (b - a for a, b in zip(self._before, self._now(), strict=True))
        shares = {"server": server, "client": client, "others": max(0.0, busy - server - client)}
        return {name: round(seconds / wall, 3) for name, seconds in shares.items()}

    def _now(self) -> tuple[float, float, float]:
        mine = resource.getrusage(resource.RUSAGE_SELF)
        return _busy_s(), tree_cpu_s(self.server_pids), mine.ru_utime + mine.ru_stime
