"""Runs sequences on a bare engine: the least that stands in for a scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from distserve.core.types import Sampling, StepItem, StepPlan, Token
from distserve.engine.runner import Engine

GREEDY = Sampling(temperature=0.0)


@dataclass
class Running:
    """One sequence: its tokens so far, its block table, and how far its KV reaches."""

    id: str
    prompt: tuple[int, ...]
    blocks: tuple[int, ...]
    sampling: Sampling = GREEDY
    computed: int = 0
    output: list[Token] = field(default_factory=list)

    @property
    def output_ids(self) -> list[int]:
        return [token.id for token in self.output]

    def item(self, chunk: int = 1 << 30) -> StepItem:
        """The next step of this sequence: at most ``chunk`` of the tokens whose KV is missing."""
        known = (*self.prompt, *self.output_ids)
        ids = known[self.computed : self.computed + chunk]
        return StepItem(
            request_id=self.id,
            start=self.computed,
            token_ids=ids,
            blocks=self.blocks,
            sample=self.computed + len(ids) == len(known),
            output_index=len(self.output),
            sampling=self.sampling,
            prompt=self.prompt if self.sampling.needs_history else (),
            output=tuple(self.output_ids) if self.sampling.needs_history else (),
        )


def step(engine: Engine, sequences: Sequence[Running], chunk: int = 1 << 30) -> None:
    """One step of all ``sequences`` together."""
    items = tuple(s.item(chunk) for s in sequences)
    chosen = dict(engine.run(StepPlan(1, items)).tokens)
    for sequence, item in zip(sequences, items, strict=True):
        sequence.computed += len(item.token_ids)
        assert (sequence.id in chosen) == item.sample
        if item.sample:
            sequence.output.append(chosen[sequence.id])


def run(engine: Engine, sequences: Sequence[Running], tokens: int, chunk: int = 1 << 30) -> None:
    """Steps of all sequences that still want tokens, until each has ``tokens``."""
    while going := [s for s in sequences if len(s.output) < tokens]:
        step(engine, going, chunk)


def complete(
    engine: Engine,
    prompt: Sequence[int],
    tokens: int,
    blocks: Sequence[int] | None = None,
    sampling: Sampling = GREEDY,
    chunk: int = 1 << 30,
) -> list[Token]:
    """One sequence alone, from its first token."""
    held = tuple(blocks) if blocks is not None else tuple(range(engine.spec.pool_blocks))
    sequence = Running("only", tuple(prompt), held, sampling)
    run(engine, [sequence], tokens, chunk)
    return sequence.output


def ids(tokens: Sequence[Token]) -> list[int]:
    return [token.id for token in tokens]
