"""Settings of a mover, and the seam where tests and chaos runs reach into it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from distserve.core.types import Ticket


class FaultInjector:
    """What may be made to go wrong on purpose at the source of a link. This one does nothing; subclass it."""

    def on_piece(self, ticket: Ticket, index: int) -> None:
        """Called before piece ``index`` is gathered. May wait (a stall) or raise ``LaneFailed`` (a dropped link)."""

    def on_staged(self, ticket: Ticket, index: int, staged: Any) -> None:
        """Called with the staged bytes of piece ``index``, after the checksum was taken. May change them."""

    def piece_bytes(self, ticket: Ticket, index: int, nbytes: int) -> int:
        """How many of the ``nbytes`` of piece ``index`` to put on the wire. Fewer truncates it."""
        return nbytes


@dataclass(frozen=True, slots=True)
class TransferConfig:
    """Settings of one mover. Durations in seconds, sizes in bytes."""

    bind_host: str = "127.0.0.1"
    port: int = 0  # 0: any free one
    advertise_host: str = ""  # what ``Mover.address`` says; empty: bind_host
    slice_bytes: int = 1536 << 10  # what one checksum covers, at most; small, to stay in a core's caches
    shm_piece_bytes: int = 1536 << 10  # payload of a piece, about: whole blocks, or whole rows of a larger block
    shm_slots: int = 4  # pieces in flight over shared memory; few, so that they stay in the cache
    gloo_piece_bytes: int = 768 << 10  # as above, over gloo; small: gathered, then sent out of the cache
    group_slots: int = 4  # pieces in flight over gloo
    device_piece_bytes: int = 32 << 20  # over CUDA IPC or NCCL; large, for each costs launches and waits on both sides
    device_slots: int = 3  # of a GPU's memory at either end, outside of the pool
    checksum: bool = True  # off only to measure what it costs: a destination that has it on takes no stage without
    handshake_s: float = 15.0  # to dial, agree and open a lane; where no name server answers, 5 s are lost
    stall_s: float = 5.0  # without progress within a stage: the link is dropped
    stage_s: float = 60.0  # from send_stage to its event, waiting its turn included
    idle_s: float = 300.0  # a link unused for so long is closed
    cores: tuple[int, ...] = ()  # that the mover's threads keep to; none: any
    keys: tuple[bytes, ...] = field(default=(), repr=False)  # of the cluster secret; a peer must know one
    max_links: int = 256  # links that may come in; more are refused
    faults: FaultInjector = field(default_factory=FaultInjector)
