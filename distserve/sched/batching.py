"""Which tokens to compute next: functions from a view of the running set to the chunks of one step.

Sequences merely *owe* tokens (vLLM's insight): a prompt chunk, a recomputed prompt and a next token are the same thing.
The roles differ in limits, not in code: token-budgeted prefill batches are what happens when nobody decodes, chunked
prefill mixed with decode is what happens when somebody does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol, TypeVar


class Owing(Protocol):
    """What a policy sees of a running sequence."""

    @property
    def owed(self) -> int:
        """Tokens known but not yet computed; at least 1 in the running set."""
        ...

    @property
    def decoding(self) -> bool:
        """True when the one owed token is the last sampled one."""
        ...


S = TypeVar("S", bound=Owing)


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """Token limits of one step."""

    max_tokens: int  # when nobody decodes
    max_tokens_beside_decodes: int
    chunk: int  # the most of one prompt


class BatchPolicy(StrEnum):
    """Which function below forms the batches of an instance."""

    CHUNKED = "chunked"
    WHOLE_PROMPTS = "whole-prompts"
    PROMPTS_FIRST = "prompts-first"


def first_come_first_served(running: Iterable[S], limits: BatchLimits) -> list[tuple[S, int]]:
    """All next tokens first, then prompt chunks in order of arrival while the budget lasts (continuous batching).

    Returns (sequence, tokens to compute) in the order given. Decodes are never held back by prompts.
    """
    running = list(running)
    chosen = [(s, 1) for s in running if s.decoding]
    budget = limits.max_tokens_beside_decodes - len(chosen) if chosen else limits.max_tokens
    for sequence in running:
        if budget <= 0:
            break
        if sequence.decoding:
            continue
        count = min(sequence.owed, limits.chunk, budget)
        chosen.append((sequence, count))
        budget -= count
    return chosen


def whole_prompts(running: Iterable[S], limits: BatchLimits) -> list[tuple[S, int]]:
    """All next tokens, and prompts in order of arrival, none of them cut: DistServe's batching (its §4.3, L_m apart).

    A prompt longer than the whole budget runs as the only one.
    """
    running = list(running)
    chosen = [(s, 1) for s in running if s.decoding]
    budget = limits.max_tokens_beside_decodes - len(chosen) if chosen else limits.max_tokens
    return chosen + _uncut(running, budget)


def prompts_first(running: Iterable[S], limits: BatchLimits) -> list[tuple[S, int]]:
    """Uncut prompts alone while there are any, next tokens alone otherwise: vLLM's batching of 2023."""
    running = list(running)
    return _uncut(running, limits.max_tokens) or [(s, 1) for s in running if s.decoding]


def _uncut(running: list[S], budget: int) -> list[tuple[S, int]]:
    chosen: list[tuple[S, int]] = []
    for sequence in running:
        if sequence.decoding:
            continue
        if chosen and sequence.owed > budget:
            break
        chosen.append((sequence, sequence.owed))
        budget -= sequence.owed
    return chosen


POLICIES: dict[BatchPolicy, Callable[[Iterable[Any], BatchLimits], list[tuple[Any, int]]]] = {
    BatchPolicy.CHUNKED: first_come_first_served,
    BatchPolicy.WHOLE_PROMPTS: whole_prompts,
    BatchPolicy.PROMPTS_FIRST: prompts_first,
}
