"""A gateway backend without a cluster, for tests of front ends: answers are a pure function of (request, position).

Owns the seam's rules (contiguous indices, cancel recorded once, duplicate ids refused, coalescing), so that what passes
here meets the shell's behaviour. A script may delay, fail or hold an answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace

from distserve.core.effects import Account
from distserve.core.types import (
    Code,
    Endpoint,
    FinishReason,
    InstanceRef,
    Load,
    Member,
    ModelSpec,
    Request,
    Role,
    Timings,
    Token,
)
from distserve.gateway.backend import (
    CompleteEvent,
    InstanceView,
    KvReport,
    RequestFailed,
    RequestView,
    StreamEvent,
    TokensEvent,
)

SPEC = ModelSpec(
    name="tiny",
    fingerprint="0123456789abcdef0123",
    vocab_size=512,
    max_model_len=256,
    eos_token_ids=(2,),
    layers=2,
    kv_heads=2,
    head_dim=16,
    kv_dtype="float32",
    block_size=16,
    pool_blocks=64,
)
TIMINGS = Timings(
    gateway_s=0.001,
    dispatch_s=0.002,
    queue_s=0.003,
    prefill_s=0.004,
    reserve_s=0.0005,
    transfer_s=0.0006,
    decode_queue_s=0.0007,
    kv_bytes_moved=4096,
    cached_tokens=3,
)


@dataclass(slots=True)
class Script:
    """What the cluster will do. ``tokens`` is what every request is answered with, then ``filler`` for ever."""

    tokens: Sequence[int] = ()
    filler: int = 65
    each: Callable[[Request, int], int] | None = None  # instead: (request, position) → token
    batch: int = 1  # tokens an event
    refuse: RequestFailed | None = None  # at submit
    fail_at: int = -1  # raise ``failure`` before this position
    failure: RequestFailed = field(default_factory=lambda: RequestFailed(Code.UNAVAILABLE, "The instance died.", 2.0))
    hold_at: int = -1  # wait for ``go`` before this position
    finish: FinishReason | None = None  # instead of LENGTH or STOP

    def token(self, request: Request, position: int) -> int:
        if self.each is not None:
            return self.each(request, position)
        return self.tokens[position] if position < len(self.tokens) else self.filler


class FakeBackend:
    """Implements ``Backend``. ``closed`` records, by request id, how streams that were left early were closed."""

    def __init__(self, script: Script | None = None, spec: ModelSpec = SPEC) -> None:
        self.script = script or Script()
        self.spec: ModelSpec | None = spec
        self.is_ready = True
        self.submitted: list[Request] = []
        self.live: dict[str, FakeStream] = {}
        self.closed: dict[str, FinishReason] = {}
        self.refused = 0
        self.go = asyncio.Event()
        self._changed = asyncio.Event()

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until this holds; looks whenever a request comes, is refused or leaves."""
        while not holds():
            await asyncio.wait_for(self._changed.wait(), timeout=20)

    def changed(self) -> None:
        """Have those who wait look."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def submit(self, request: Request, tokenize_s: float) -> FakeStream:
        if self.script.refuse is not None:
            self.refused += 1
            self.changed()
            raise self.script.refuse
        if request.id in self.live:
            raise RequestFailed(Code.ALREADY_EXISTS, f"A request '{request.id}' is running; choose another id.")
        self.submitted.append(request)
        stream = self.live[request.id] = FakeStream(self, request)
        self.changed()
        return stream

    def members(self) -> Sequence[Member]:
        if self.spec is None:
            return ()
        return (
            Member(Endpoint(InstanceRef("p0", 1), "127.0.0.1:1"), Role.PREFILL, self.spec, "0.1.0"),
            Member(Endpoint(InstanceRef("d0", 2), "127.0.0.1:2"), Role.DECODE, self.spec, "0.1.0"),
        )

    def ready(self) -> bool:
        return self.is_ready

    def max_request_tokens(self, model: str) -> int:
        return self.spec.max_sequence_tokens if self.spec is not None and self.spec.name == model else 0

    async def instances(self) -> Sequence[InstanceView]:
        return [InstanceView(member, Load(running=1, kv_total=64), True, "ready", 42) for member in self.members()]

    async def where(self, request_id: str) -> RequestView | None:
        if request_id not in self.live:
            return None
        return RequestView(request_id, "decoding", "d0#2", 65537, 1.5, "a step", 598.5, self.live[request_id].made)

    async def cancel(self, request_id: str) -> bool:
        if (stream := self.live.get(request_id)) is None:
            return False
        stream.cancelled.set()
        return True

    async def kv_check(self) -> Sequence[KvReport]:
        return [KvReport("p0#1", 64, {"free": 60, "owned": 4}, 1, "", False)]


class FakeStream:
    """Implements ``RequestStream``."""

    def __init__(self, backend: FakeBackend, request: Request) -> None:
        self._backend = backend
        self._script = replace(backend.script)
        self.request = request
        self.made = 0
        self.cancelled = asyncio.Event()
        self._events = self._run()

    @property
    def request_id(self) -> str:
        return self.request.id

    def __aiter__(self) -> AsyncIterator[StreamEvent]:
        return self._events

    async def aclose(self, finish: FinishReason = FinishReason.CANCELLED) -> Account | None:
        if self._backend.live.pop(self.request.id, None) is not None:
            self._backend.closed[self.request.id] = finish
            self._backend.changed()
        return self._account() if self.made else None

    async def _run(self) -> AsyncIterator[StreamEvent]:
        finish: FinishReason | None = None
        while finish is None:
            tokens: list[Token] = []
            first = self.made
            while finish is None and len(tokens) < self._script.batch:
                if self.made == self._script.hold_at:
                    if tokens:
                        yield TokensEvent(first, tuple(tokens))
                        first, tokens = self.made, []
                    await self._held()
                finish = self._step(tokens)
            if tokens:
                yield TokensEvent(first, tuple(tokens))
            await asyncio.sleep(0)
        self._backend.live.pop(self.request.id, None)
        yield CompleteEvent(finish, self._account())

    def _step(self, tokens: list[Token]) -> FinishReason | None:
        """Make one token; returns why the answer ends, if it does."""
        if self.cancelled.is_set():
            return FinishReason.CANCELLED
        if self.made == self._script.fail_at:
            self._backend.live.pop(self.request.id, None)
            raise self._script.failure
        token_id = self._script.token(self.request, self.made)
        alternatives = self.request.sampling.logprobs
        top = tuple((token_id + i, -0.5 - i) for i in range(max(alternatives, 0)))
        tokens.append(Token(token_id, -0.5 if alternatives >= 0 else None, top))
        self.made += 1
        if token_id in self.request.stopping.stop_token_ids:
            return self._script.finish or FinishReason.STOP
        if self.made == self.request.stopping.max_tokens:
            return self._script.finish or FinishReason.LENGTH
        return None

    async def _held(self) -> None:
        go, cancel = asyncio.ensure_future(self._backend.go.wait()), asyncio.ensure_future(self.cancelled.wait())
        await asyncio.wait((go, cancel), return_when=asyncio.FIRST_COMPLETED)
        go.cancel()
        cancel.cancel()

    def _account(self) -> Account:
        return Account("p0#1", "d0#2", 1, len(self.request.prompt_token_ids), self.made, 0.010, 0.5, TIMINGS)
