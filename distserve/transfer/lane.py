"""What carries the payload of a link: staging slots at both ends, used in turn. Knows no ticket and no frame.

A lane has slots of one size. Piece number n of the link is staged in slot n % slots at both ends. The source fills a
slot and pushes it; it may fill it again once the destination has said, on the channel, that it is done with that
piece. Staging belongs to one lane of one generation and is never given to another: whatever arrives late lands in
memory nobody reads.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Lane(Protocol):
    """Either end of a lane."""

    slots: list[Tensor]  # flat uint8, all of one size

    def push(self, slot: int, nbytes: int) -> None:
        """Source: start handing over the first ``nbytes`` of a slot. LaneFailed if the lane is broken."""

    def expect(self, slot: int, nbytes: int) -> None:
        """Destination: a piece of ``nbytes`` was announced for this slot; let it come. LaneFailed."""

    def take(self, slot: int, timeout_s: float) -> None:
        """Destination: wait until the expected piece is in the slot. Stalled or LaneFailed."""

    def free(self, slot: int) -> None:
        """Destination: what was in the slot is used; another piece may come into it. LaneFailed."""

    def close(self) -> None:
        """Release what the lane holds."""
