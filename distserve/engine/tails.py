"""Which half-full blocks this engine did not fill itself, so that what lies behind their tokens is not known.

Attention reads whole blocks and masks what is beyond a sequence; a NaN there passes any mask. A block begun here is
cleared when it is begun. One that came over a link, or back from the host, holds behind its tokens what an earlier
owner left. An engine knows no requests; it remembers what its last step wrote, and takes every other half-full block
for a strange one.
"""

from __future__ import annotations

from distserve.core.types import StepPlan


class OpenTails:
    """The last block of every sequence of the last step. One thread; one ``turn`` a step, then its parts in order."""

    def __init__(self, block_size: int) -> None:
        self._size = block_size
        self._before: dict[str, tuple[int, int]] = {}  # request → where it ended, and in which block
        self._now: dict[str, tuple[int, int]] = {}

    def turn(self) -> None:
        """A step begins."""
        self._before, self._now = self._now, {}

    def strange(self, plan: StepPlan) -> list[tuple[int, int]]:
        """(block, offset) of each half-full block that ``plan`` goes on filling from this offset, not begun here."""
        found: list[tuple[int, int]] = []
        for item in plan.items:
            end = item.start + len(item.token_ids)
            offset = end % self._size
            if not offset:
                continue
            block = item.blocks[end // self._size]
            known = self._now.get(item.request_id) or self._before.get(item.request_id)
            if item.start > end - offset and known != (item.start, block):
                found.append((block, item.start % self._size))
            self._now[item.request_id] = (end, block)
        return found
