"""What every latency model answers, and how it declines: what the simulator and the search are written against.

A model is of one instance shape: one model, one accelerator, one tensor-parallel and pipeline-parallel degree. It knows
no scheduling. All times are seconds, all lengths tokens.

Pipelines: a step passes ``stages`` stages one after the other; ``step_s`` and ``decode_s`` give the time of the
*slowest stage* with its share of hand-over, so a lone step takes ``stages`` times as long, and with several batches in
flight one step can be issued every ``step_s``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable


class OutOfRange(ValueError):
    """The model has no data for what was asked. ``nearest`` says in a few words what it does cover."""

    def __init__(self, message: str, nearest: str) -> None:
        super().__init__(f"{message}; the nearest covered: {nearest}")
        self.nearest = nearest


class LatencyModel(Protocol):
    """Step times of one instance shape. Refuses what it was not measured for unless built to extrapolate."""

    @property
    def name(self) -> str:
        """Where the numbers come from, e.g. ``distserve:a100-80g opt-13b tp=2 pp=1``."""
        ...

    @property
    def stages(self) -> int:
        """Pipeline stages a step passes."""
        ...

    @property
    def kv_bytes_per_token(self) -> float:
        """KV bytes of one token, all layers and heads: what a hand-off must move per token."""
        ...

    @property
    def kv_capacity_tokens(self) -> int:
        """Tokens of KV that fit the instance beside its weights; 0 where the source does not tell."""
        ...

    @property
    def uncertainty(self) -> float:
        """Relative standard error of a step time, 0.05 = 5 %, from the model's own residuals or a stated judgement."""
        ...

    def step_s(self, chunks: Sequence[tuple[int, int]], decodes: int, decode_context: int) -> float:
        """One stage's time for a step of prompt ``chunks``, (new tokens, tokens of that sequence computed before),
        beside ``decodes`` sequences of one new token each; their contexts, the new token included, sum to
        ``decode_context``.

        At least one chunk. Raises OutOfRange.
        """
        ...

    def decode_s(self, batch: int, context: int) -> float:
        """One stage's time for a step of ``batch`` decodes whose contexts (the new token included) sum to ``context``.

        Raises OutOfRange.
        """
        ...


@runtime_checkable
class LinearDecode(Protocol):
    """A model whose decode step is piecewise linear in the context: the simulator adds steps up without a call."""

    def decode_line(self, batch: int, context: int) -> tuple[float, float, float]:
        """(intercept, slope, until): ``decode_s(batch, c) == intercept + slope * c`` for ``context <= c < until``."""
        ...


class EngineTraits(Protocol):
    """What of an engine shows between its steps, beyond a step's own time."""

    @property
    def pull_stall_s(self) -> float:
        """Per KV token of a sequence that joins by a hand-off: how long the step it joins is held up."""
        ...

    @property
    def pipeline_overlap(self) -> float:
        """The share of a pipeline's ideal overlap that decode steps reach, 0 to 1."""
        ...


@runtime_checkable
class OfEngine(Protocol):
    """A model measured on a known engine."""

    @property
    def constants(self) -> EngineTraits: ...
