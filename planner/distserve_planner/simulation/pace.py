"""How long the steps of one instance take: its latency model, its pipeline, and sums of like decode steps.

Knows no requests and no machine.

Pipelines. An instance's machine has one step outstanding, so several batches in flight are modelled here. Prompts on a
prefill instance: a new batch enters when the first stage is free, what a batch made comes out of the last stage.
Decodes: the running set goes round in as many parts as there are stages, so one token for everybody takes ``stages``
stage times of a part; ``overlap`` tells how much of that an engine reaches, the rest being one batch that goes round
alone. A step with prompts on an instance that also decodes passes all stages before the next one starts: no overlap is
assumed there.
"""

from __future__ import annotations

import math

from distserve.sched.steps import StepShape
from distserve_planner.latency.base import LatencyModel, LinearDecode

RUN = 128
"""The most decode steps added up at once: an event that comes between makes the rest of the sum void."""


class Pace:
    """Of one instance; remembers when each stage of its pipeline is free."""

    def __init__(self, model: LatencyModel, overlap: float, *, pipelined_prompts: bool) -> None:
        self._model = model
        self._line = model if isinstance(model, LinearDecode) else None
        self._stages = model.stages
        self._overlap = overlap if self._stages > 1 else 0.0
        self._lines: dict[int, tuple[float, float, float]] = {}  # batch → line that holds for every context
        self._free = [0.0] * self._stages if pipelined_prompts and self._stages > 1 else []

    def step(self, shape: StepShape, now: float) -> tuple[float, float]:
        """(when the machine may plan again, when what the step made is out) for a step that starts now."""
        if not shape.chunks:
            end = now + self.decode_s(shape.decodes, shape.decode_context)
            return end, end
        stage = self._model.step_s(shape.chunks, shape.decodes, shape.decode_context)
        if not self._free or shape.decodes:
            end = now + stage * self._stages
            return end, end
        at = now
        for i, free in enumerate(self._free):
            at = self._free[i] = max(at, free) + stage
        return self._free[0], at

    def decode_s(self, batch: int, context: int) -> float:
        """One token for each of ``batch`` sequences."""
        if (line := self._lines.get(batch) or self._segment(batch, context)) is not None:
            intercept, slope, _ = line
            return intercept + slope * context
        whole = self._model.decode_s(batch, context) * self._stages
        if not self._overlap:
            return whole
        part = self._model.decode_s(-(-batch // self._stages), -(-context // self._stages)) * self._stages
        return (1 - self._overlap) * whole + self._overlap * part

    def _segment(self, batch: int, context: int) -> tuple[float, float, float] | None:
        if self._line is None:
            return None
        line = self._whole_line(self._line, batch, context)
        if line[2] == math.inf:
            self._lines[batch] = line
        return line

    def _whole_line(self, model: LinearDecode, batch: int, context: int) -> tuple[float, float, float]:
        stages = self._stages
        if stages == 1:
            return model.decode_line(batch, context)
        a, b, until = model.decode_line(batch, context)
        if not self._overlap:
            return a * stages, b * stages, until
        part_a, part_b, part_until = model.decode_line(-(-batch // stages), context // stages)
        alone, together = (1 - self._overlap) * stages, self._overlap
        intercept = alone * a + together * stages * part_a
        return intercept, alone * b + together * part_b, min(until, part_until * stages)

    def ends(self, batch: int, context: int, steps: int, first_end: float) -> list[float]:
        """When each of ``steps`` decode steps of the same sequences ends; the first ends at ``first_end`` with a total
        context of ``context``. Adds up exactly as step by step, and may give fewer than asked."""
        ends = [first_end]
        at, most = first_end, min(steps, RUN)
        line = self._lines.get(batch)
        if line is not None:
            intercept, slope, _ = line
            for _ in range(most - 1):
                context += batch
                at += intercept + slope * context
                ends.append(at)
            return ends
        while len(ends) < most:
            context += batch
            if line is None or context >= line[2]:
                line = self._segment(batch, context)
            at += line[0] + line[1] * context if line is not None else self.decode_s(batch, context)
            ends.append(at)
        return ends
