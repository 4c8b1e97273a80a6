"""How the lanes of a stage come to share memory: one makes it, the others open it, and all say whether that went well.

A message between two processes of a machine takes longer than what is computed between two sums of a decode step.
The memory is an anonymous file that the others open through /proc: it has no name, so nothing of it is left behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import secrets
import stat

import torch

from distserve.engine.collectives import LaneGroup
from distserve.models.shard import Lanes
from distserve_kernels.native.lanes import SharedLanes, lanes_bytes


class GroupedLanes:
    """Through memory what memory can do, by messages what is of another dtype."""

    def __init__(self, shared: SharedLanes, group: LaneGroup) -> None:
        self.shared = shared
        self._group = group

    def sum_(self, x: torch.Tensor) -> torch.Tensor:
        return (self.shared if x.dtype in (torch.float32, torch.bfloat16) else self._group).sum_(x)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        return self.shared.gather(x)


def share_memory(group: LaneGroup, lane: int, size: int, library: ctypes.CDLL | None) -> Lanes:
    """The lanes of ``group`` over memory, or by messages where they are not on one machine or one has no ``library``.

    All lanes must call this. RuntimeError when one does not.
    """
    nbytes = 0 if library is None else lanes_bytes(library, size)
    token = secrets.randbits(62)
    with contextlib.ExitStack() as held:
        own = _create(nbytes, token, held) if lane == 0 and nbytes else -1
        pid, fd, proof = group.gather(torch.tensor([[os.getpid(), own, token]]))[0, :3].tolist()
        memory = _open(f"/proc/{pid}/fd/{fd}" if lane else f"/proc/self/fd/{own}", nbytes, proof)
        all_have = bool(group.gather(torch.tensor([[memory is not None]])).all())
    if not all_have or memory is None or library is None:
        return group
    return GroupedLanes(SharedLanes(library, memory, lane, size, group.timeout_s), group)


def _create(nbytes: int, proof: int, held: contextlib.ExitStack) -> int:
    """Fresh memory that begins with ``proof``: its descriptor, which ``held`` closes; -1 when there is none."""
    try:
        fd = os.memfd_create("distserve-lanes", os.MFD_CLOEXEC)
        held.callback(os.close, fd)
        os.ftruncate(fd, nbytes)
        os.pwrite(fd, proof.to_bytes(8, "little"), 0)
    except (OSError, AttributeError):  # an old kernel, or a system without such files
        return -1
    return fd


def _open(path: str, nbytes: int, proof: int) -> mmap.mmap | None:
    """Map it; None when it cannot be reached from here, or is another's."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return None
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or not nbytes or found.st_size != nbytes:
            return None
        return mmap.mmap(fd, nbytes) if os.pread(fd, 8, 0) == proof.to_bytes(8, "little") else None
    except (OSError, ValueError):
        return None
    finally:
        os.close(fd)
