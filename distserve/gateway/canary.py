"""Readiness by deed: a tiny request that must go through prefill, hand-off and decode before the gateway calls itself
ready. Sent again whenever the ways through the cluster change; nothing runs between changes.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterable
from typing import Protocol

from distserve.core.effects import Account
from distserve.core.types import InstanceRef, Member, ModelSpec, Request, Sampling, Stopping
from distserve.gateway.backend import CompleteEvent, RequestFailed, RequestStream
from distserve.wire.channels import Backoff

log = logging.getLogger(__name__)
TENANT = "distserve-canary"
PROMPT_TOKENS, OUTPUT_TOKENS = 8, 2
FAILURES = 2
"""So many in a row end a readiness that was; one may be of an instance that died under it."""


class Submitter(Protocol):
    """The gateway, as far as a canary needs it."""

    async def submit(self, request: Request, tokenize_s: float) -> RequestStream: ...


class Canary:
    """See the module. ``run`` is its one task; ``paths`` gives the members that are connected now."""

    def __init__(
        self,
        gateway: Submitter,
        paths: Callable[[], Iterable[Member]],
        on_change: Callable[[bool], None],
        *,
        timeout_s: float,
        seed: int,
    ) -> None:
        self._gateway = gateway
        self._paths = paths
        self._on_change = on_change
        self._timeout_s = timeout_s
        self._random = random.Random(seed)
        self._changed = asyncio.Event()
        self._sent = 0
        self._passed = False

    def paths_changed(self) -> None:
        """A member came or went, or a stream to one did."""
        self._set(self._passed and self._standing() is not None)
        self._changed.set()

    def ready(self) -> bool:
        """Whether a canary went through, and a way through still stands."""
        return self._passed

    async def run(self) -> None:
        """Send canaries after changes, until cancelled."""
        backoff = Backoff(self._random.randrange(1 << 30))
        tested: frozenset[InstanceRef] = frozenset()
        failures = 0
        while True:
            await self._changed.wait()
            self._changed.clear()
            now = frozenset(member.ref for member in self._paths())
            spec = self._standing()
            if spec is None or (self._passed and now <= tested):
                continue  # no way yet, or fewer members than the last canary that passed could choose from
            problem = await self._send(spec)
            if problem:
                log.warning("the canary did not come through: %s", problem)
                failures += 1
                self._set(self._passed and failures < FAILURES)
                await asyncio.sleep(backoff.pause_s())
                self._changed.set()
                continue
            backoff.reset()
            failures = 0
            tested = now
            self._set(self._standing() is not None)

    def _set(self, passed: bool) -> None:
        if passed != self._passed:
            self._passed = passed
            self._on_change(passed)

    def _standing(self) -> ModelSpec | None:
        """The model that a request could be served with now; None if there is no whole way through."""
        members = list(self._paths())
        for prefill in members:
            if prefill.role.can_prefill:
                for decode in members:
                    if decode.role.can_decode and decode.spec.name == prefill.spec.name:
                        return prefill.spec
        return None

    async def _send(self, spec: ModelSpec) -> str:
        """One request through the cluster. Returns what is wrong with how it went; empty when nothing is."""
        try:
            async with asyncio.timeout(self._timeout_s + 1.0):
                stream = await self._gateway.submit(self._request(spec), 0.0)
                try:
                    return await _judge(stream)
                finally:
                    await stream.aclose()
        except RequestFailed as error:
            return error.message
        except TimeoutError:
            return f"no answer within {self._timeout_s:g} s"

    def _request(self, spec: ModelSpec) -> Request:
        """Greedy, of tokens drawn anew each time so that no prefix cache spares the hand-off."""
        self._sent += 1
        length = max(1, min(PROMPT_TOKENS, spec.max_sequence_tokens - OUTPUT_TOKENS))
        return Request(
            id=f"canary-{self._sent}",
            model=spec.name,
            prompt_token_ids=tuple(self._random.randrange(spec.vocab_size) for _ in range(length)),
            sampling=Sampling(temperature=0.0),
            stopping=Stopping(max_tokens=OUTPUT_TOKENS, min_tokens=OUTPUT_TOKENS),
            timeout_s=self._timeout_s,
            tenant=TENANT,
        )


async def _judge(stream: RequestStream) -> str:
    tokens = 0
    async for event in stream:
        if isinstance(event, CompleteEvent):
            return _verdict(tokens, event.account)
        tokens += len(event.tokens)
    return "its stream ended without an end"


def _verdict(tokens: int, account: Account) -> str:
    if tokens != OUTPUT_TOKENS:
        return f"{tokens} tokens came instead of {OUTPUT_TOKENS}"
    if account.attempts != 1:
        return f"it took {account.attempts} attempts"
    moved = account.prefill_instance != account.decode_instance
    if moved and account.timings.kv_bytes_moved == 0:
        return f"no KV moved from {account.prefill_instance} to {account.decode_instance}"
    return ""
