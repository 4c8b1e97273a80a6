"""How the ranks of one instance exchange tensors: process groups of ``torch.distributed``, made directly over a store,
with no default and no global group, so that one process could hold several.

gloo between CPUs, NCCL between GPUs, behind the same calls. Every call waits at most ``timeout_s``; gloo cannot abort
what is under way, so a rank that fails here is of no more use and its process should end.

Not tried: NCCL needs as many GPUs as ranks.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distserve.kv.shard import Parallel

_TAG = 2


class LaneGroup:
    """The lanes of one stage (``models.shard.Lanes``)."""

    def __init__(self, group: Any, size: int, timeout_s: float) -> None:
        """``timeout_s``: the longest wait for another lane, which the group knows."""
        self._group, self._size, self.timeout_s = group, size, timeout_s

    def sum_(self, x: Tensor) -> Tensor:
        """The sum over all lanes, in place; ``x`` must be contiguous."""
        self._group.allreduce([x]).wait()
        return x

    def gather(self, x: Tensor) -> Tensor:
        """[rows, n] of each lane → [rows, size * n], in the order of the lanes."""
        parts = [torch.empty_like(x) for _ in range(self._size)]
        self._group.allgather([parts], [x.contiguous()]).wait()
        return torch.cat(parts, 1)


class PipeGroup:
    """The stages that this rank's lane runs through: takes from the one before, hands to the one after."""

    def __init__(self, group: Any, stage: int, size: int) -> None:
        self._group, self._stage, self._size = group, stage, size
        self._sent: list[tuple[Any, Tensor]] = []  # kept until they have left

    def gather(self, x: Tensor) -> Tensor:
        """[n] of each stage → [stages, n]."""
        parts = [torch.empty_like(x) for _ in range(self._size)]
        self._group.allgather([parts], [x.contiguous()]).wait()
        return torch.stack(parts)

    def receive(self, into: Tensor) -> Tensor:
        """Wait for what the stage before hands over; fills and returns ``into``."""
        self._group.recv([into], self._stage - 1, _TAG).wait()
        return into

    def send(self, x: Tensor) -> None:
        """Begin to hand ``x`` to the stage after; it must not be written any more."""
        x = x.contiguous()
        self._sent.append((self._group.send([x], self._stage + 1, _TAG), x))

    def flush(self) -> None:
        """Wait until all that was handed over has left."""
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()


def open_groups(
    store: dist.Store, parallel: Parallel, rank: int, *, interface: str, device: torch.device, timeout_s: float
) -> tuple[LaneGroup | None, PipeGroup | None]:
    """The groups of a rank; every rank of the instance must call this at about the same time. RuntimeError else.

    ``interface`` is this rank's own address towards the others.
    """
    stage, lane = parallel.stage(rank), parallel.lane(rank)
    make = _nccl if device.type == "cuda" else _gloo
    lanes = pipe = None
    if parallel.tp > 1:
        group = make(dist.PrefixStore(f"lanes/{stage}", store), lane, parallel.tp, interface, timeout_s)
        lanes = LaneGroup(group, parallel.tp, timeout_s)
    if parallel.pp > 1:
        group = make(dist.PrefixStore(f"pipe/{lane}", store), stage, parallel.pp, interface, timeout_s)
        pipe = PipeGroup(group, stage, parallel.pp)
    return lanes, pipe


def _gloo(store: dist.Store, rank: int, size: int, interface: str, timeout_s: float) -> Any:
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # missing in torch's stubs
    options._timeout = timedelta(seconds=timeout_s)
    options._threads = 2
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=interface)]
    return dist.ProcessGroupGloo(store, rank, size, options)


def _nccl(store: dist.Store, rank: int, size: int, interface: str, timeout_s: float) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=timeout_s)
    return dist.ProcessGroupNCCL(store, rank, size, options)
