"""What an end of a link says of itself, and the names of the ways on which payload travels. Values only."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch

from distserve.core.types import InstanceRef
from distserve.kv.shard import KvCut
from distserve.transfer.layout import Layout
from distserve.v1 import transfer_pb2 as pb


class LaneKind(StrEnum):
    """How payload travels; ``AUTO`` lets the pair choose."""

    AUTO = "auto"
    SHM = "shm"
    GLOO = "gloo"
    NCCL = "nccl"
    IPC = "ipc"

    @property
    def on_device(self) -> bool:
        """Whether its staging is a GPU's memory at both ends."""
        return self in (LaneKind.NCCL, LaneKind.IPC)


WIRE: dict[LaneKind, pb.TransferLaneKind] = {
    LaneKind.AUTO: pb.TRANSFER_LANE_KIND_AUTO,
    LaneKind.SHM: pb.TRANSFER_LANE_KIND_SHM,
    LaneKind.GLOO: pb.TRANSFER_LANE_KIND_GLOO,
    LaneKind.NCCL: pb.TRANSFER_LANE_KIND_NCCL,
    LaneKind.IPC: pb.TRANSFER_LANE_KIND_IPC,
}
KINDS = {wire: kind for kind, wire in WIRE.items()}


@dataclass(frozen=True, slots=True)
class Identity:
    """What one end says of itself."""

    ref: InstanceRef
    fingerprint: str
    layout: Layout  # of the whole instance
    kind: LaneKind
    device: torch.device  # of the pool
    cut: KvCut
    rank: int
