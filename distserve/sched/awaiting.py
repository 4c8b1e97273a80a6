"""Who waits for the outstanding steps: what an instance's shell may ask while they run and the machine rests.

The machine hears of a cancel only between two steps. Whoever takes messages in meanwhile asks this object about each of
them; once nobody is left, the oldest step may be given up, and the machine is told so after it has heard of the cancels
themselves. A hint, no decision: a step given up by mistake is planned again. As giving a step up ends all behind it, it
counts whoever waits for any of them.
"""

from __future__ import annotations

from distserve.core.events import Abandon, GatewayAttached, GatewayLost, InstanceEvent
from distserve.core.types import GatewayRef


class Awaiting:
    """The sequences that are still here of step ``number`` and those behind it: request id → (gateway, epoch).

    Takes the dict over.
    """

    __slots__ = ("_here", "number")

    def __init__(self, number: int, here: dict[str, tuple[GatewayRef, int]]) -> None:
        self.number = number
        self._here = here

    @property
    def nobody(self) -> bool:
        """Whether the steps are for nobody."""
        return not self._here

    def hear(self, event: InstanceEvent) -> bool:
        """Take note of what a message means for the steps; True when with it the last one left."""
        if not self._here:
            return False
        match event:
            case Abandon(gateway, request_id, epoch):
                known = self._here.get(request_id)
                if known is None or known[0] != gateway or known[1] > epoch:
                    return False
                del self._here[request_id]
            case GatewayLost(gateway) | GatewayAttached(gateway):  # attached anew, it has forgotten what it had here
                self._here = {i: known for i, known in self._here.items() if known[0] != gateway}
            case _:
                return False
        return not self._here
