"""Who watches the traffic: lengths, arrivals and shared prefixes of the requests that pass, never a word of them.

Sees the gateway's machine as an observer does and costs nothing while nobody watches. Prompts leave as chains of small
numbers, counted by first appearance within one watch: two prompts share the leading numbers they have in common.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from distserve.core.effects import Account, Complete, Fail
from distserve.core.events import Submitted
from distserve.core.types import Code, Request
from distserve.gateway.backend import RequestFailed
from distserve.gateway.canary import TENANT
from distserve.kv.prefix import PREFIX_RUN, chain_hashes

BACKLOG = 100_000
"""Records a watcher may lag behind before it is cut off."""

CHAINS = 2_000_000
"""Prefix blocks one watch tells apart; prompts that would need more come without theirs."""


@dataclass(frozen=True, slots=True)
class TrafficRecord:
    """One request that has ended. ``arrival_s`` counts from the start of the watch; ``prefix_blocks`` has one number
    for each started run of ``PREFIX_RUN`` prompt tokens. ``outcome``: a finish reason, or the code it failed with.
    """

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    prefix_blocks: tuple[int, ...]
    client: int
    slo_class: str
    outcome: str
    ttft_s: float
    total_s: float


class Watch:
    """One watcher's view. Iterate it: it ends when every request that arrived within ``duration_s`` has ended."""

    def __init__(self, duration_s: float) -> None:
        self._open: dict[str, tuple[float, Request]] = {}
        self._records: asyncio.Queue[TrafficRecord | None] = asyncio.Queue(BACKLOG)
        self._closed = False
        self._overrun = False
        self._numbers: dict[object, int] = {}
        self._clients: dict[str, int] = {}
        loop = asyncio.get_running_loop()
        self._began = loop.time()
        self._timer = loop.call_later(duration_s, self._close)

    def write(self, now: float, event: Any, effects: Sequence[Any]) -> None:
        if isinstance(event, Submitted) and not self._closed and event.request.tenant != TENANT:
            self._open.setdefault(event.request.id, (now, event.request))
        if not self._open:
            return
        for effect in effects:
            match effect:
                case Complete(request_id, finish, account):
                    self._end(request_id, finish.value, account)
                case Fail(request_id, code):
                    self._end(request_id, code.value, None)

    def end(self) -> None:
        """Watch no more; the iteration ends after what is queued."""
        self._timer.cancel()
        self._open.clear()
        self._close()

    async def __aiter__(self) -> AsyncIterator[TrafficRecord]:
        """Raises ``RequestFailed`` for a watcher that lagged too far behind."""
        while (record := await self._records.get()) is not None:
            yield record
            if self._overrun:
                raise RequestFailed(Code.RESOURCE_EXHAUSTED, "The watcher reads too slowly; watch again.")

    def _close(self) -> None:
        self._closed = True
        self._finish_if_done()

    def _finish_if_done(self) -> None:
        if self._closed and not self._open:
            self._put(None)

    def _end(self, request_id: str, outcome: str, account: Account | None) -> None:
        if (arrived := self._open.pop(request_id, None)) is None:
            return
        at, request = arrived
        record = TrafficRecord(
            arrival_s=max(0.0, at - self._began),
            prompt_tokens=len(request.prompt_token_ids),
            output_tokens=account.output_tokens if account is not None else 0,
            prefix_blocks=self._prefix(request.prompt_token_ids),
            client=self._clients.setdefault(request.tenant, len(self._clients)),
            slo_class=request.slo_class,
            outcome=outcome,
            ttft_s=account.ttft_s if account is not None else 0.0,
            total_s=account.total_s if account is not None else 0.0,
        )
        self._put(record)
        self._finish_if_done()

    def _prefix(self, tokens: Sequence[int]) -> tuple[int, ...]:
        chain = chain_hashes(tokens, PREFIX_RUN)
        keys: list[object] = list(chain)
        if rest := tuple(tokens[len(chain) * PREFIX_RUN :]):
            keys.append((chain[-1] if chain else 0, rest))
        if len(self._numbers) + len(keys) > CHAINS:
            return ()
        return tuple(self._numbers.setdefault(key, len(self._numbers)) for key in keys)

    def _put(self, record: TrafficRecord | None) -> None:
        try:
            self._records.put_nowait(record)
        except asyncio.QueueFull:
            self._overrun = True


class Traffic:
    """Observer of the gateway's machine; hands what passes to whoever watches now. Lives on the gateway's loop."""

    def __init__(self) -> None:
        self._watches: set[Watch] = set()

    def write(self, now: float, event: Any, effects: Sequence[Any]) -> None:
        for watch in self._watches:
            watch.write(now, event, effects)

    @contextmanager
    def watch(self, duration_s: float) -> Iterator[Watch]:
        """Watch for so long. Its requests that are still open when the block ends are forgotten."""
        watch = Watch(duration_s)
        self._watches.add(watch)
        try:
            yield watch
        finally:
            self._watches.discard(watch)
            watch.end()
