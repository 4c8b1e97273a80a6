"""One client stream at the gateway: what was asked, what was delivered, where it is being served."""

from __future__ import annotations

from enum import StrEnum

from distserve.core.effects import Account
from distserve.core.types import Code, Endpoint, InstanceRef, Request, Timings, Token, attempt_of, first_epoch


class StreamPhase(StrEnum):
    """Of a stream. Ended ones are forgotten."""

    DISPATCHING = "dispatching"  # the controller was asked for a place
    WAITING = "waiting"  # no instance to serve it now; asks again
    PREFILL = "prefill"  # submitted; no token of this attempt yet
    DECODE = "decode"  # tokens are coming


class Stream:
    """Belongs to ``GatewayState``; nothing else changes it."""

    __slots__ = (
        "arrived",
        "attempt",
        "avoid",
        "cached_tokens",
        "deadline",
        "decode",
        "delivered",
        "dispatch_s",
        "dispatched_at",
        "epoch",
        "first_token_at",
        "hashes",
        "last_error",
        "owner",
        "patience_until",
        "phase",
        "prefill",
        "prefilled_by",
        "request",
        "second_token_at",
        "seen",
        "tokenize_s",
        "wake_at",
    )

    def __init__(self, request: Request, hashes: tuple[int, ...], tokenize_s: float, now: float, patience_s: float):
        self.request = request
        self.hashes = hashes
        self.tokenize_s = tokenize_s
        self.arrived = now
        self.deadline = now + request.timeout_s
        self.patience_until = now + patience_s
        self.attempt = 0
        self.epoch = 0  # the highest seen of the current attempt
        self.phase = StreamPhase.WAITING
        self.wake_at = now
        self.prefill: Endpoint | None = None
        self.decode: Endpoint | None = None
        self.owner: InstanceRef | None = None
        self.prefilled_by = ""  # who made the first token
        self.avoid: tuple[InstanceRef, ...] = ()
        self.delivered: list[int] = []
        self.dispatched_at = now
        self.dispatch_s = 0.0
        self.first_token_at: float | None = None
        self.second_token_at: float | None = None
        self.seen = Timings()
        self.cached_tokens = 0
        self.last_error: tuple[Code, str] | None = None

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def running(self) -> bool:
        return self.phase in (StreamPhase.PREFILL, StreamPhase.DECODE)

    @property
    def bound(self) -> int:
        """The highest epoch that any holder of the current attempt can reach."""
        return first_epoch(self.attempt + 1) - 1

    def holders(self) -> tuple[InstanceRef, ...]:
        """Every life that may hold something for the current attempt."""
        refs = [e.ref for e in (self.prefill, self.decode) if e is not None]
        return tuple(dict.fromkeys([*refs, *([self.owner] if self.owner is not None else [])]))

    def next_attempt(self, now: float) -> None:
        self.attempt += 1
        self.epoch = first_epoch(self.attempt)
        self.phase = StreamPhase.DISPATCHING
        self.dispatched_at = now
        self.prefill = self.decode = self.owner = None

    def is_current(self, epoch: int) -> bool:
        return attempt_of(epoch) == self.attempt and epoch >= self.epoch

    def is_former(self, epoch: int) -> bool:
        """Of the current attempt, from before the sequence changed its owner."""
        return attempt_of(epoch) == self.attempt and epoch < self.epoch

    def take(
        self, source: InstanceRef, epoch: int, first: int, tokens: tuple[Token, ...], now: float
    ) -> tuple[Token, ...]:
        """Accept what is new of tokens from the highest epoch; returns it. The caller has excluded a gap."""
        self.epoch, self.owner = epoch, source
        fresh = tokens[max(0, len(self.delivered) - first) :]
        if fresh:
            had = len(self.delivered)
            self.delivered.extend(t.id for t in fresh)
            if had == 0:
                self.first_token_at = now
                self.prefilled_by = str(self.prefill.ref if self.prefill is not None else source)
            if had <= 1 < len(self.delivered):
                self.second_token_at = now
        return fresh

    def measure(self, timings: Timings) -> None:
        """Keep the parts that instances report: the prefill's once, the decode's once."""
        seen = self.seen
        prefill_known = seen.queue_s + seen.prefill_s > 0
        decode_known = seen.decode_step_s > 0
        self.seen = Timings(
            queue_s=seen.queue_s if prefill_known else timings.queue_s,
            prefill_s=seen.prefill_s if prefill_known else timings.prefill_s,
            cached_tokens=seen.cached_tokens if prefill_known else timings.cached_tokens,
            reserve_s=seen.reserve_s if decode_known else timings.reserve_s,
            decode_queue_s=seen.decode_queue_s if decode_known else timings.decode_queue_s,
            decode_step_s=seen.decode_step_s if decode_known else timings.decode_step_s,
            kv_bytes_moved=seen.kv_bytes_moved + timings.kv_bytes_moved,
        )

    def account(self, now: float) -> Account:
        """How it was served. The gateway's and the transfer's parts are what its clock saw beyond the others'."""
        seen = self.seen
        ttft = self.first_token_at - self.arrived if self.first_token_at is not None else now - self.arrived
        ttft += self.tokenize_s
        first = self.first_token_at is not None
        gap = 0.0
        if first and self.second_token_at is not None and seen.kv_bytes_moved:
            gap = self.second_token_at - (self.first_token_at or 0.0)
        timings = Timings(
            gateway_s=max(0.0, ttft - self.dispatch_s - seen.queue_s - seen.prefill_s) if first else 0.0,
            dispatch_s=self.dispatch_s,
            queue_s=seen.queue_s,
            prefill_s=seen.prefill_s,
            reserve_s=seen.reserve_s,
            transfer_s=max(0.0, gap - seen.reserve_s - seen.decode_queue_s - seen.decode_step_s) if gap else 0.0,
            decode_queue_s=seen.decode_queue_s,
            decode_step_s=seen.decode_step_s,
            kv_bytes_moved=seen.kv_bytes_moved,
            cached_tokens=seen.cached_tokens,
        )
        return Account(
            prefill_instance=self.prefilled_by,
            decode_instance=str(self.owner) if self.owner is not None else "",
            attempts=self.attempt,
            prompt_tokens=len(self.request.prompt_token_ids),
            output_tokens=len(self.delivered),
            ttft_s=ttft if first else 0.0,
            total_s=now - self.arrived + self.tokenize_s,
            timings=timings,
        )
