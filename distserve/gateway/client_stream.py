"""One request's answer, between the gateway's machine and whoever reads it.

What the reader has not taken is kept as one run of tokens (bounded by the request's own ``max_tokens``), so a slow
reader costs no messages and stalls nobody; for how long it may be slow is the shell's concern.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from distserve.core.effects import Account, Complete, Deliver, Fail
from distserve.core.types import FinishReason, Token
from distserve.gateway.backend import CompleteEvent, RequestFailed, StreamEvent, TokensEvent

Cancel = Callable[[FinishReason], None]


class ClientStream:
    """A ``RequestStream``. ``cancel`` ends the request at the machine, which answers with ``Complete`` at once."""

    def __init__(self, request_id: str, cancel: Cancel, clock: Callable[[], float]) -> None:
        self._request_id = request_id
        self._cancel = cancel
        self._clock = clock
        self._first_index = 0
        self._tokens: list[Token] = []
        self._end: CompleteEvent | RequestFailed | None = None
        self._news = asyncio.Event()
        self._over = False  # the reader was told the end, or gave up
        self._unread_since: float | None = None

    # ── the reader's side ────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def request_id(self) -> str:
        """The id the client knows it by."""
        return self._request_id

    def __aiter__(self) -> AsyncIterator[StreamEvent]:
        return self

    async def __anext__(self) -> StreamEvent:
        if self._over:
            raise StopAsyncIteration
        await self._news.wait()
        if self._tokens:
            event = TokensEvent(self._first_index, tuple(self._tokens))
            self._first_index += len(self._tokens)
            self._tokens.clear()
            self._unread_since = None
            if self._end is None:
                self._news.clear()
            return event
        self._over = True
        if isinstance(self._end, RequestFailed):
            raise self._end
        assert self._end is not None
        return self._end

    async def aclose(self, finish: FinishReason = FinishReason.CANCELLED) -> Account | None:
        """End the request now. Idempotent; returns the account, None if the request failed."""
        self._over = True
        if self._end is None:
            self._cancel(finish)
        return self._end.account if isinstance(self._end, CompleteEvent) else None

    # ── the shell's side ─────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def unread_since(self) -> float | None:
        """Since when the reader has left something untaken; None while it keeps up."""
        return self._unread_since

    @property
    def failure(self) -> RequestFailed | None:
        """How it failed, if it did."""
        return self._end if isinstance(self._end, RequestFailed) else None

    def take(self, effect: Deliver | Complete | Fail) -> None:
        """What the machine says of this request."""
        match effect:
            case Deliver(_, _, tokens):
                self._tokens.extend(tokens)
                if self._unread_since is None:
                    self._unread_since = self._clock()
            case Complete(_, finish, account):
                self._end = CompleteEvent(finish, account)
            case Fail(_, code, message, retry_after_s):
                self._end = RequestFailed(code, message, retry_after_s)
        self._news.set()

    def cut_off(self, failure: RequestFailed) -> None:
        """End it for a reason of the shell's: what was not read is dropped."""
        if self._end is None:
            self._cancel(FinishReason.CANCELLED)
        self._tokens.clear()
        self._end = failure
        self._news.set()
