"""Which steps are measured: a fixed design over lengths, batches and contexts, within a model and a pool.

Knows no engine.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_LENGTHS = (16, 32, 64, 128, 256, 384, 512, 1024, 2048)
_BATCHES = ((32, 4), (64, 4), (128, 4), (256, 4), (64, 16))  # (tokens, prompts)
_CONTINUED = ((64, 512), (256, 256), (512, 512), (512, 1536), (128, 2048), (512, 3584))  # (new, before)
_CHUNKS = ((16, 0), (64, 0), (192, 128), (256, 0), (448, 512))  # beside decodes
_BESIDE = ((1, 256), (8, 256), (48, 512))  # (decodes, context of each)
_DECODES = (1, 2, 4, 8, 16, 32, 48, 64)
_CONTEXTS = (64, 256, 1024, 4096)
MOVED_TOKENS = (16, 64, 256, 1024, 2048)


@dataclass(frozen=True, slots=True)
class Shape:
    """One step: prompt ``chunks`` of (new tokens, tokens before) beside decodes of ``context`` tokens each, the new
    one included."""

    chunks: tuple[tuple[int, int], ...] = ()
    decodes: int = 0
    context: int = 0

    @property
    def kv_tokens(self) -> int:
        """What its sequences hold after it."""
        return sum(new + before for new, before in self.chunks) + self.decodes * self.context

    @property
    def longest(self) -> int:
        return max([self.context, *(new + before for new, before in self.chunks)])

    @property
    def rows(self) -> int:
        return sum(new for new, _ in self.chunks) + self.decodes


def design(max_len: int, kv_tokens: int, block_size: int, seed: int = 0) -> list[Shape]:
    """All shapes that fit, in an order without drift: short and long in turns."""
    room = kv_tokens - 200 * block_size  # every sequence may leave part of a block unused
    fitting = [s for s in _all() if s.longest < max_len and s.kv_tokens <= room]
    random.Random(seed).shuffle(fitting)
    return fitting


def _all() -> Iterator[Shape]:
    yield from (Shape(((n, 0),)) for n in _LENGTHS)
    yield from (Shape(((n, 0),) * count) for n, count in _BATCHES)
    yield from (Shape(((new, before),)) for new, before in _CONTINUED)
    yield from (Shape((chunk,), count, context) for chunk in _CHUNKS for count, context in _BESIDE)
    yield from (Shape((), batch, context) for batch in _DECODES for context in _CONTEXTS)


def sample_of(shapes: Sequence[Shape]) -> list[Shape]:
    """A few of each kind, for what is measured a second time beside busy instances."""
    prompts = [s for s in shapes if s.chunks in (((64, 0),), ((256, 0),), ((512, 0),)) and not s.decodes]
    decodes = [s for s in shapes if not s.chunks and s.decodes in (1, 2, 4, 8, 16) and s.context == 256]
    mixed = [s for s in shapes if s.chunks == ((256, 0),) and s.decodes == 8]
    return [*prompts, *decodes, *mixed]
