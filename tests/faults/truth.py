"""What must come out: every request's tokens, and what each KV position must hold.

A token is a pure function of (request, index), so a wrong, lost, repeated or foreign one shows. The KV of a position is
one number that stands for its token and all tokens before it, so KV that is stale, foreign or overwritten shows too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distserve.core.types import Request
from tests.faults.properties import Property, Violation

EOS = 2
EMPTY = 0  # a slot whose bytes mean nothing
IN_STEP = -1  # a slot that the running step is writing
BEYOND = 3  # what is sampled, and computed, behind a request's last token

_MASK = (1 << 62) - 1


def extend_chain(before: int, token: int) -> int:
    """The content of the KV position of ``token`` after a position that holds ``before``."""
    return (hash((before, token)) & _MASK) | 1


@dataclass(frozen=True)
class Truth:
    """One request and the only right answer to it."""

    number: int
    request: Request
    output: tuple[int, ...]  # all of it, the stop token included
    chain: tuple[int, ...]  # KV content of position 0, 1, … of prompt + output

    @classmethod
    def of(cls, number: int, request: Request, stop_at: int | None) -> Truth:
        """``stop_at``: the output index at which EOS is sampled, if before ``max_tokens``."""
        length = request.stopping.max_tokens
        output = [1000 + (hash((number, i, 77)) % 30000) for i in range(length)]
        if stop_at is not None and stop_at < length:
            output[stop_at:] = [EOS]
        chain, before = [], EMPTY
        for token in (*request.prompt_token_ids, *output):
            before = extend_chain(before, token)
            chain.append(before)
        return cls(number, request, tuple(output), tuple(chain))

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt_token_ids)

    def tokens(self, start: int, end: int) -> tuple[int, ...]:
        """Tokens ``[start, end)`` of prompt + output."""
        return (self.request.prompt_token_ids + self.output)[start:end]


class Pool:
    """The content of one life of one instance's KV pool."""

    def __init__(self, blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self._slots = [[EMPTY] * block_size for _ in range(blocks)]

    def read(self, table: Sequence[int], start: int, end: int) -> list[int]:
        """Content of positions ``[start, end)``."""
        values: list[int] = []
        size = self.block_size
        for index in range(start // size, -(-end // size)):
            low, high = max(start - index * size, 0), min(end - index * size, size)
            values += self._slots[table[index]][low:high]
        return values

    def write(self, table: Sequence[int], start: int, values: Sequence[int]) -> None:
        for i, value in enumerate(values):
            index, offset = divmod(start + i, self.block_size)
            self._slots[table[index]][offset] = value

    def must_hold(self, what: str, table: Sequence[int], start: int, end: int, chain: Sequence[int]) -> None:
        """Raises unless positions ``[start, end)`` hold exactly their part of ``chain``."""
        held = self.read(table, start, end)
        if held != list(chain[start:end]):
            position = next(start + i for i in range(end - start) if held[i] != chain[start + i])
            content = {EMPTY: "nothing", IN_STEP: "what a step has not finished writing"}
            found = content.get(held[position - start], "other KV")
            block = table[position // self.block_size]
            raise Violation(Property.KV, f"{what}: position {position} (block {block}) holds {found}")
