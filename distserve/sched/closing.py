"""Abandonments under way: who was told to let go of what, until they say they did (abort is acknowledged)."""

from __future__ import annotations

from dataclasses import dataclass

from distserve.core.effects import Effect, Send
from distserve.core.events import Abandon
from distserve.core.types import GatewayRef, InstanceRef
from distserve.sched.config import GatewayConfig


@dataclass(slots=True)
class _Telling:
    epoch: int
    repeat_at: float
    until: float


class Closing:
    """One gateway's unacknowledged ``Abandon`` messages; repeated until answered, lost with the holder, or given up."""

    def __init__(self, me: GatewayRef, config: GatewayConfig) -> None:
        self.me = me
        self.config = config
        self.given_up = 0
        self._open: dict[tuple[InstanceRef, str], _Telling] = {}

    def __len__(self) -> int:
        return len(self._open)

    def open(self, ref: InstanceRef, request_id: str, epoch: int, now: float) -> list[Effect]:
        """Tell a holder to let go of everything up to ``epoch``. Told again only after a pause."""
        known = self._open.get((ref, request_id))
        if known is not None and known.epoch >= epoch:
            return []
        repeat_at, until = now + self.config.abandon_repeat_s, now + self.config.abandon_timeout_s
        self._open[ref, request_id] = _Telling(epoch, repeat_at, until)
        return [Send(ref, Abandon(self.me, request_id, epoch))]

    def acknowledged(self, ref: InstanceRef, request_id: str, epoch: int) -> None:
        known = self._open.get((ref, request_id))
        if known is not None and epoch >= known.epoch:
            del self._open[ref, request_id]

    def forget(self, ref: InstanceRef) -> None:
        """A life that is gone holds nothing."""
        for key in [k for k in self._open if k[0] == ref]:
            del self._open[key]

    def next_deadline(self) -> float | None:
        return min((t.repeat_at for t in self._open.values()), default=None)

    def tick(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for (ref, request_id), telling in list(self._open.items()):
            if now >= telling.until:
                del self._open[ref, request_id]
                self.given_up += 1
            elif now >= telling.repeat_at:
                telling.repeat_at = now + self.config.abandon_repeat_s
                effects.append(Send(ref, Abandon(self.me, request_id, telling.epoch)))
        return effects
