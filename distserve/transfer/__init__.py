"""The KV data plane: moves the KV of sequences between the pools of two instances (DESIGN §5)."""

from distserve.transfer.config import FaultInjector, TransferConfig
from distserve.transfer.events import MoverEvent, Reason, StageCorrupt, StageFailed, StageSent, StageStored
from distserve.transfer.mover import Mover

__all__ = [
    "FaultInjector",
    "Mover",
    "MoverEvent",
    "Reason",
    "StageCorrupt",
    "StageFailed",
    "StageSent",
    "StageStored",
    "TransferConfig",
]
