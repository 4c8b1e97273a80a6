"""One sequence: a request's state on the instance that owns it."""

from __future__ import annotations

from distserve.core.types import Endpoint, FinishReason, GatewayRef, Request, Token
from distserve.sched.lifecycle import PHASE_MOVES, Phase


class Sequence:
    """Tokens so far, how many of them are computed, and the marks its timings are read from.

    ``tokens`` is prompt and output in one list; positions ``< computed`` have their KV in the sequence's blocks.
    Outstanding steps compute the next ``ahead`` positions, and sample ``unknown`` tokens behind those of the list.
    Belongs to ``InstanceState``; nothing else changes it.

        tokens    [ prompt .................. | output ... ] ? ?      ? sampled by outstanding steps: ``unknown``
        KV        [ computed ......... | ahead ............. ]        ``planned`` = both together
    """

    __slots__ = (
        "ahead",
        "arrived",
        "cached_tokens",
        "computed",
        "deadline",
        "decode",
        "decoding",
        "epoch",
        "finish",
        "first_token_at",
        "gateway",
        "kv_bytes",
        "last_step",
        "length_limit",
        "order",
        "owned_at",
        "phase",
        "preemptions",
        "prompt_len",
        "recent",
        "request",
        "reserve_s",
        "started_at",
        "timed",
        "tokens",
        "unknown",
    )

    def __init__(
        self,
        request: Request,
        gateway: GatewayRef,
        epoch: int,
        output: tuple[int, ...],
        decode: Endpoint,
        *,
        now: float,
        timeout_s: float,
        order: int,
    ) -> None:
        self.request = request
        self.gateway = gateway
        self.epoch = epoch
        self.decode = decode
        self.prompt_len = len(request.prompt_token_ids)
        self.tokens = [*request.prompt_token_ids, *output]
        self.computed = 0
        self.ahead = 0
        self.unknown = 0
        self.last_step = 0  # the newest step that it was planned in
        self.length_limit = self.prompt_len + request.stopping.max_tokens  # tokens at which it ends
        self.phase = Phase.WAITING
        self.decoding = False  # in phase DECODE: owes the one token sampled last
        self.arrived = now
        self.deadline = now + timeout_s
        self.order = order
        self.started_at: float | None = None  # first planned in a step here
        self.first_token_at: float | None = None
        self.owned_at: float | None = None  # when it came in by a move
        self.reserve_s = 0.0
        self.kv_bytes = 0
        self.cached_tokens = 0
        self.preemptions = 0
        self.timed = False
        self.recent: tuple[Token, ...] = ()
        self.finish: FinishReason | None = None

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def owner(self) -> str:
        """Its name in the block ledger."""
        return f"s:{self.request.id}"

    @property
    def owed(self) -> int:
        return len(self.tokens) - self.computed

    @property
    def planned(self) -> int:
        """Positions whose KV is there, or written by outstanding steps."""
        return self.computed + self.ahead

    @property
    def output_len(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def output(self) -> tuple[int, ...]:
        return tuple(self.tokens[self.prompt_len :])

    def enter(self, phase: Phase) -> None:
        """Change phase; an illegal move is a bug of the machine, not of its input."""
        if phase not in PHASE_MOVES[self.phase]:
            raise AssertionError(f"{self.id}: no move from {self.phase} to {phase}")
        self.phase = phase
        self.decoding = phase is Phase.DECODE

    def append(self, token: Token) -> FinishReason | None:
        """Take a sampled token; returns why the sequence ends with it, if it does."""
        self.tokens.append(token.id)
        stopping = self.request.stopping
        if token.id in stopping.stop_token_ids and self.output_len > stopping.min_tokens:
            self.finish = FinishReason.STOP
        elif len(self.tokens) >= self.length_limit:
            self.finish = FinishReason.LENGTH
        return self.finish

    def banned(self) -> tuple[int, ...]:
        """Tokens that may not be sampled next, behind the unknown ones: stops, until ``min_tokens`` are out."""
        stopping = self.request.stopping
        return stopping.stop_token_ids if self.output_len + self.unknown < stopping.min_tokens else ()
