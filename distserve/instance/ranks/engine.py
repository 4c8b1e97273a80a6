"""The engine of an instance of several ranks, as the step loop sees it: plans in, their tokens out.

Every rank runs all steps in the order in which they were submitted, each as soon as it is told and, in a later stage,
has what the stage before hands over. With several steps outstanding the first stage is ahead of the last. Why nothing
is torn by that:

- A step's tokens come from the last stage, which had all earlier stages' output of it, all lanes' sums with it: when
  they are here, every rank has written the step's KV and has read all that the step reads. So ``wait`` may be taken for
  "this step touches nothing any more", at every rank, and what is told to the data planes then (over the same links as
  steps, but not behind them) finds final KV. What runs ahead writes other positions.
- Blocks are given away only when no outstanding step names them (``sched.residents``): not to another sequence, not to
  a move that arrives. Blocks of a sequence that was dropped wait for the last step that it is in.
- Steps in flight are of disjoint sequences, or chunks of one prompt in order, so no stage needs a token that another
  has yet to choose. ``--steps-in-flight`` sees to it that no item follows another here.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

from distserve.core.types import ModelSpec, StepPlan, Token
from distserve.engine.pool import KvPool
from distserve.engine.runner import StepOutput
from distserve.engine.shard import ShardEngine
from distserve.instance.ranks.crew import Crew


@dataclass(slots=True)
class _Submitted:
    """A step that all ranks were told of: what our own share came to."""

    plan: StepPlan
    began: float
    tokens: list[Token] | None  # None: another rank samples
    error: Exception | None = None


class RankedEngine:
    """Rank 0's own share and its crew. One thread calls ``submit`` and ``wait``; ``pool`` is rank 0's own."""

    def __init__(self, own: ShardEngine, crew: Crew, depth: int = 1) -> None:
        self.depth = depth
        self._own = own
        self._crew = crew
        self._outstanding: deque[_Submitted] = deque()
        self._ended = 0.0  # when the last step did

    @property
    def spec(self) -> ModelSpec:
        return self._own.spec

    @property
    def pool(self) -> KvPool:
        return self._own.pool

    @property
    def weight_bytes(self) -> int:
        return self._own.weight_bytes

    def submit(self, plan: StepPlan) -> None:
        """Tell every rank of a step and run our own part of it, which does not wait for the other stages."""
        if len(self._outstanding) >= self.depth:
            raise RuntimeError(f"step {plan.number} was submitted while {self.depth} steps are outstanding")
        step = _Submitted(plan, time.perf_counter(), [])
        self._outstanding.append(step)
        if not plan.items:
            return
        try:
            self._crew.start(plan)
            own = self._own.run(plan)
            step.tokens = own if self._own.samples else None
        except Exception as error:  # whatever it is, ``wait`` raises it
            step.error = error
            self._crew.fall(f"rank 0 failed in step {plan.number}: {error}")

    def wait(self) -> StepOutput:
        """The oldest step's tokens, when its KV is in all pools. Raises when a rank failed: then the instance cannot go
        on, and the crew's ``lost`` has been told.
        """
        step = self._outstanding.popleft()
        if step.error is not None:
            raise step.error
        tokens = step.tokens if step.tokens is not None else self._crew.tokens(step.plan.number)
        began, self._ended = max(step.began, self._ended), time.perf_counter()
        sampling = [item.request_id for item in step.plan.items if item.sample]
        return StepOutput(tuple(zip(sampling, tokens, strict=True)), self._ended - began)

    def give_up(self, number: int) -> None:
        """Every step runs to its end: ranks must stay in step, and would have to agree on the layer to stop at."""

    def close(self) -> None:
        """Nothing to end: the crew is the data plane's to close."""
