"""The engine of an instance of several ranks, as the step loop sees it: one plan in, its tokens out."""

from __future__ import annotations

import time

from distserve.core.types import ModelSpec, StepPlan
from distserve.engine.pool import KvPool
from distserve.engine.runner import StepOutput
from distserve.engine.shard import ShardEngine
from distserve.instance.ranks.crew import Crew


class RankedEngine:
    """Rank 0's own share and its crew. One thread calls ``run``; ``pool`` is rank 0's own."""

    def __init__(self, own: ShardEngine, crew: Crew) -> None:
        self._own = own
        self._crew = crew

    @property
    def spec(self) -> ModelSpec:
        return self._own.spec

    @property
    def pool(self) -> KvPool:
        return self._own.pool

    @property
    def weight_bytes(self) -> int:
        return self._own.weight_bytes

    def run(self, plan: StepPlan) -> StepOutput:
        """Run a step on all ranks; when it returns, its KV is in all pools. Raises when a rank failed: then the
        instance cannot go on, and the crew's ``lost`` has been told.
        """
        began = time.perf_counter()
        if not plan.items:
            return StepOutput((), 0.0)
        self._crew.start(plan)
        try:
            tokens = self._own.run(plan)
        except Exception as error:
            self._crew.fall(f"rank 0 failed in step {plan.number}: {error}")
            raise
        if not self._own.samples:
            tokens = self._crew.tokens(plan.number)
        sampling = [item.request_id for item in plan.items if item.sample]
        return StepOutput(tuple(zip(sampling, tokens, strict=True)), time.perf_counter() - began)

    def give_up(self, number: int) -> None:
        """Every step runs to its end: ranks must stay in step, and would have to agree on the layer to stop at."""
