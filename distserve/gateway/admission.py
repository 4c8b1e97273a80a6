"""How many answers each client has under way. Owns the counts; knows nothing of what is answered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from distserve.core.types import Code
from distserve.gateway.auth import Caller
from distserve.gateway.backend import RequestFailed


class Admission:
    """See the module. Lives on one asyncio loop."""

    def __init__(self, max_client_streams: int) -> None:
        """0: no limit, but for keys that have one of their own."""
        self._most = max_client_streams
        self._streams: Counter[str] = Counter()

    def enter(self, caller: Caller, count: int) -> Callable[[], None]:
        """Let ``count`` answers begin; call what is returned, once or more, when they have ended.

        Raises ``RequestFailed`` RESOURCE_EXHAUSTED.
        """
        client, most = caller.client, caller.max_streams or self._most
        if most and self._streams[client] + count > most:
            raise RequestFailed(
                Code.RESOURCE_EXHAUSTED,
                f"The client ({client}) has {self._streams[client]} answers under way and may have {most} at once; "
                "wait for some to end.",
                1.0,
            )
        self._streams[client] += count
        left = [count]

        def leave() -> None:
            self._streams[client] -= left[0]
            left[0] = 0
            if self._streams[client] == 0:
                del self._streams[client]

        return leave

    def under_way(self, client: str) -> int:
        """How many answers a client (``Caller.client``) has under way."""
        return self._streams[client]
