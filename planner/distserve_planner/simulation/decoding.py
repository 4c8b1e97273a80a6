"""Sequences that decode together, by counts.

None of them is touched while it decodes: all advance together, so one counter of their common steps tells each one's
length, a calendar tells who ends when, and a table by remainder tells how many need a block at which step.
"""

from __future__ import annotations

import heapq
from operator import attrgetter

BY_ORDER = attrgetter("order")


class Counted:
    """A request on one instance. ``order``: its place in that instance's line. Lengths in tokens."""

    __slots__ = (
        "computed",
        "decoding",
        "destination",
        "ends_at",
        "granted",
        "index",
        "length",
        "limit",
        "order",
        "prefilled",
        "remainder",
        "reserved",
        "sent",
    )

    def __init__(self, index: int, length: int, limit: int, order: int, destination: int) -> None:
        self.index = index
        self.length = length  # tokens known
        self.limit = limit  # tokens at which it ends
        self.order = order
        self.destination = destination  # instance it leaves for; -1: stays
        self.computed = 0  # while it does not decode
        self.decoding = False
        self.ends_at = 0  # the clock of the decoding ones after its last step
        self.remainder = 0  # (computed - clock) mod block size, while it decodes
        self.granted = self.prefilled = self.reserved = False
        self.sent = 0  # KV tokens handed to the links

    @property
    def owed(self) -> int:
        return self.length - self.computed


class Decoding:
    """The decoding sequences of one instance. ``clock`` counts the steps they took part in."""

    __slots__ = ("_block", "_calendar", "_due", "clock", "computed", "crossing", "members")

    def __init__(self, block: int) -> None:
        self.members: dict[int, Counted] = {}  # by request
        self.clock = 0
        self.computed = 0  # sum over the members
        self.crossing = [0] * block  # members by remainder
        self._block = block
        self._calendar: dict[int, list[Counted]] = {}  # clock → who ends with it
        self._due: list[int] = []  # heap of the calendar's pages

    def begin(self, sequence: Counted, late: bool) -> None:
        """It has one token to compute and ``limit - length`` to make; ``late``: no part in the outstanding step."""
        computed = sequence.length - 1
        clock = self.clock + late
        ends_at = clock + sequence.limit - sequence.length
        sequence.decoding = True
        sequence.ends_at = ends_at
        sequence.remainder = (computed - clock) % self._block
        self.members[sequence.index] = sequence
        self.computed += computed
        self.crossing[sequence.remainder] += 1
        page = self._calendar.get(ends_at)
        if page is None:
            self._calendar[ends_at] = [sequence]
            heapq.heappush(self._due, ends_at)
        else:
            page.append(sequence)

    def take_out(self, sequence: Counted) -> int:
        """Before its time; returns the tokens it has computed."""
        self._calendar[sequence.ends_at].remove(sequence)
        return self._end(sequence)

    def take_due(self) -> list[tuple[Counted, int]]:
        """Those whose last token the clock's last step made, in order, with the tokens each has computed."""
        page = self._calendar.get(self.clock)
        if not page:
            return []
        self._calendar[self.clock] = []
        if len(page) > 1:
            page.sort(key=BY_ORDER)
        return [(sequence, self._end(sequence)) for sequence in page]

    def _end(self, sequence: Counted) -> int:
        computed = sequence.limit - 1 - (sequence.ends_at - self.clock)
        del self.members[sequence.index]
        self.computed -= computed
        self.crossing[sequence.remainder] -= 1
        sequence.decoding = False
        return computed

    def left(self) -> int:
        """Steps until the first member ends; there must be one."""
        calendar, due = self._calendar, self._due
        while not calendar[due[0]]:
            del calendar[heapq.heappop(due)]
        return due[0] - self.clock

    def need(self, plans: int, rows: int) -> int:
        """Blocks that the next ``plans`` plans secure for ``rows`` members, nobody joining or leaving."""
        rounds, rest = divmod(plans, self._block)
        crossing, clock, block = self.crossing, self.clock, self._block
        blocks = rounds * rows
        for k in range(1, rest + 1):
            blocks += crossing[-(clock + k) % block]
        return blocks

    def need_now(self) -> int:
        """Blocks that the plan of the next step secures."""
        return self.crossing[-self.clock % self._block]

    def needing(self) -> list[Counted]:
        """Who these blocks are for, in order."""
        in_need = -self.clock % self._block
        return sorted((s for s in self.members.values() if s.remainder == in_need), key=BY_ORDER)

    def steps_within(self, free: int, rows: int, steps: int) -> int:
        """The most of ``steps`` for which ``free`` blocks do; the first one's are secured already."""
        rounds = free // rows
        sure, left = 1 + rounds * self._block, free - rounds * rows
        while sure < steps and (left := left - self.crossing[-(self.clock + sure) % self._block]) >= 0:
            sure += 1
        return min(sure, steps)
