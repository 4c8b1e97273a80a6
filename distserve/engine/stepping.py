"""How steps are computed one after the other: in ``wait``'s own thread, or ahead of it in a thread of the engine.

Owns the order, the tokens that later steps follow, and what becomes of the steps behind one that did not end. Knows
neither how a step is computed nor who asks for it. One thread submits and waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from distserve.core.types import StepItem, StepPlan, Token
from distserve.engine.stopping import StepGivenUp


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step chose: (request id, token) for each item that samples, in item order."""

    tokens: tuple[tuple[str, Token], ...]
    forward_s: float  # the whole step, sampling included


Compute = Callable[[StepPlan], StepOutput]
"""Run a step whose tokens are all known. Raises StepGivenUp, or the step's error."""


class Stepping(Protocol):
    """``submit`` and ``wait`` of an engine: see ``instance.ports.Engine``, which says what they promise."""

    @property
    def depth(self) -> int:
        """Steps that may be submitted and not yet waited for."""
        ...

    def submit(self, plan: StepPlan) -> None: ...

    def wait(self) -> StepOutput: ...

    def close(self) -> None:
        """End what computes; what is outstanding is computed first. Idempotent."""
        ...


class InTurn:
    """One step at a time, computed by whoever waits for it. No item may follow: there is no step before it."""

    depth = 1

    def __init__(self, compute: Compute) -> None:
        self._compute = compute
        self._plan: StepPlan | None = None

    def submit(self, plan: StepPlan) -> None:
        if self._plan is not None:
            raise RuntimeError(f"step {plan.number} was submitted while step {self._plan.number} is outstanding")
        self._plan = plan

    def wait(self) -> StepOutput:
        plan, self._plan = self._plan, None
        if plan is None:
            raise RuntimeError("no step is outstanding")
        return self._compute(plan)

    def close(self) -> None:
        """Nothing to end."""


class Ahead:
    """Up to ``depth`` steps, computed in order by one thread, which has torch's settings of the thread that loaded."""

    def __init__(self, compute: Compute, depth: int) -> None:
        self.depth = depth
        self._compute = compute
        self._chosen = Chosen(depth)
        self._outstanding: deque[Future[StepOutput]] = deque()
        self._broken = False  # a step did not end; True until no step is outstanding
        threads = torch.get_num_threads()
        self._thread = ThreadPoolExecutor(1, "engine", initializer=torch.set_num_threads, initargs=(threads,))

    def submit(self, plan: StepPlan) -> None:
        if len(self._outstanding) >= self.depth:
            raise RuntimeError(f"step {plan.number} was submitted while {self.depth} steps are outstanding")
        self._outstanding.append(self._thread.submit(self._run, plan))

    def wait(self) -> StepOutput:
        if not self._outstanding:
            raise RuntimeError("no step is outstanding")
        try:
            return self._outstanding.popleft().result()
        finally:
            if not self._outstanding:
                self._broken = False

    def close(self) -> None:
        self._thread.shutdown()

    def _run(self, plan: StepPlan) -> StepOutput:
        """In the engine's thread."""
        if self._broken:
            raise StepGivenUp(f"step {plan.number} was to come after one that did not end")
        try:
            output = self._compute(self._chosen.fill_in(plan))
        except BaseException:
            self._broken = True
            self._chosen.forget()
            raise
        self._chosen.note(output)
        return output


class Chosen:
    """The tokens of the last ``steps`` steps, for the items that follow them."""

    def __init__(self, steps: int) -> None:
        self._steps: deque[dict[str, int]] = deque(maxlen=steps)  # newest first

    def note(self, output: StepOutput) -> None:
        """A step is done."""
        self._steps.appendleft({request_id: token.id for request_id, token in output.tokens})

    def forget(self) -> None:
        """A step did not end: nothing may follow what came before it."""
        self._steps.clear()

    def fill_in(self, plan: StepPlan) -> StepPlan:
        """``plan`` with all its tokens known. Raises StepGivenUp when one has not been chosen."""
        if not any(item.follows for item in plan.items):
            return plan
        return replace(plan, items=tuple(self._known(plan, item) if item.follows else item for item in plan.items))

    def _known(self, plan: StepPlan, item: StepItem) -> StepItem:
        for tokens in self._steps:
            if (token := tokens.get(item.request_id)) is not None:
                return replace(item, token_ids=(token,))
        raise StepGivenUp(f"step {plan.number} follows one that chose no token for {item.request_id}")
