"""The seam between the gateway's front ends (HTTP, gRPC) and its shell (machine, connections).

Front ends turn a client's words into a ``Request`` and a stream of ``StreamEvent`` into a client's answer; they know
nothing of instances. The shell owns the machine and knows nothing of HTTP.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from distserve.core.effects import Account
from distserve.core.types import Code, FinishReason, Load, Member, Request, Token


class RequestFailed(Exception):
    """A request ends with an error the client is told; ``code`` picks the status in the one table."""

    def __init__(self, code: Code, message: str, retry_after_s: float = 0.0, param: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s
        self.param = param


@dataclass(frozen=True, slots=True)
class TokensEvent:
    """New tokens, contiguous from ``first_index``; several steps' worth when the reader lagged."""

    first_index: int
    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class CompleteEvent:
    """The last event of a stream that ends well."""

    finish: FinishReason
    account: Account


StreamEvent = TokensEvent | CompleteEvent


class RequestStream(Protocol):
    """One request's answer. Iterate to the end, or ``close``; leaving early cancels the request everywhere.

    Iteration raises ``RequestFailed`` when the request ends with an error. Tokens the reader has not taken are
    coalesced into one event; a reader that takes nothing for the configured time is cut off (request cancelled).
    """

    @property
    def request_id(self) -> str: ...

    def __aiter__(self) -> AsyncIterator[StreamEvent]: ...

    async def aclose(self, finish: FinishReason = FinishReason.CANCELLED) -> Account | None:
        """End the request now (client gone, or a stop string matched: ``finish=STOP``). Idempotent.

        Returns the account of what was done so far, when the request had started.
        """
        ...


@dataclass(frozen=True, slots=True)
class InstanceView:
    """An instance as an operator sees it."""

    member: Member
    load: Load | None
    connected: bool
    state: str  # "ready" | "lost" | …
    pid: int = 0


@dataclass(frozen=True, slots=True)
class RequestView:
    """Where a request is (DESIGN §8)."""

    request_id: str
    phase: str
    owner: str
    epoch: int
    age_s: float
    waits_for: str
    deadline_in_s: float
    output_tokens: int


@dataclass(frozen=True, slots=True)
class KvReport:
    """One instance's ledger: blocks by state, and what is wrong with it, if anything is."""

    instance: str
    total: int
    by_state: dict[str, int]
    holders: int  # live sequences and moves
    problem: str  # empty when every block is accounted for
    idle_and_clean: bool  # nothing held and every block free (or cached and evictable)


class Backend(Protocol):
    """What a front end may ask of the gateway."""

    async def submit(self, request: Request, tokenize_s: float) -> RequestStream:
        """Admit a request. Raises ``RequestFailed`` (duplicate id, shutting down, stream limit)."""
        ...

    def members(self) -> Sequence[Member]:
        """Members known now (the model's limits are read from them)."""
        ...

    def ready(self) -> bool:
        """Whether a canary went through prefill, hand-off and decode, and the path still stands."""
        ...

    def max_request_tokens(self, model: str) -> int:
        """The longest prompt + output any decode-able member can hold; 0 if no member serves the model."""
        ...

    async def instances(self) -> Sequence[InstanceView]: ...

    async def where(self, request_id: str) -> RequestView | None: ...

    async def cancel(self, request_id: str) -> bool: ...

    async def kv_check(self) -> Sequence[KvReport]: ...
