"""Steps on a device, launched ahead of what the host knows: step k+1 is on its way while k runs, and takes the tokens
it follows from where k leaves them. The host waits only for the event behind a step's sampled ids.

``wait`` returns when the device is done with the whole step: then its KV is final for whoever else reads the pool, on
any stream. Owns the order of the steps, their events and the page-locked memory that ids come back in. One thread and
its current stream submit and wait. On a CPU the same code runs step by step, for tests.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distserve.core.types import StepPlan, Token
from distserve.engine.chosen import ChosenIds, TakesChosen
from distserve.engine.device_sampler import DeviceSampler
from distserve.engine.forward import Forward
from distserve.engine.sampler import Choose, Draw
from distserve.engine.stepping import Chosen, StepOutput
from distserve.engine.stopping import StepGivenUp
from distserve_kernels.streams import settle

_LEAST_IDS = 256


def device_steps(
    forward: Forward, draw: Draw | None, choose: Choose, device: torch.device, depth: int
) -> DeviceSteps | None:
    """What runs steps on ``device``; None for a CPU's forward passes, but for those that a GPU runs."""
    chosen = forward.chosen if isinstance(forward, TakesChosen) else None
    if device.type != "cuda" and chosen is None:
        return None
    return DeviceSteps(forward, DeviceSampler(device, draw), choose, device, depth, chosen)


@dataclass(slots=True)
class _Return:
    """Where one step's ids come back: page-locked memory, and the event that says they and all before them are done."""

    memory: Tensor  # int64
    done: torch.cuda.Event | None


@dataclass(slots=True, eq=False)
class _Step:
    """A step that was submitted and is not waited for yet."""

    plan: StepPlan
    submitted: float
    back: _Return | None = None  # what to wait for; None: nothing was launched, or it is done
    ids: Tensor | None = None  # where they come, a view of ``back``
    tokens: list[Token] = field(default_factory=list)  # known already
    error: BaseException | None = None

    def finish(self) -> None:
        """Wait until the device is done with it. Raises the device's error."""
        back, self.back = self.back, None
        if back is not None and back.done is not None:
            back.done.synchronize()
        if self.ids is not None:
            self.tokens = [Token(int(id)) for id in self.ids.tolist()]
            self.ids = None

    def output(self, forward_s: float) -> StepOutput:
        asking = (item.request_id for item in self.plan.items if item.sample)
        return StepOutput(tuple(zip(asking, self.tokens, strict=True)) if self.tokens else (), forward_s)


class DeviceSteps:
    """``stepping.Stepping`` over a forward pass on ``device``.

    ``chosen`` is what the forward pass takes followers' ids from; None: it takes none, so that each step is computed
    to its end when it is submitted. Steps with rows that ask for more than their id are, too: ``choose`` serves them.
    """

    def __init__(
        self,
        forward: Forward,
        sampler: DeviceSampler,
        choose: Choose,
        device: torch.device,
        depth: int,
        chosen: ChosenIds | None,
    ) -> None:
        self.depth = depth
        self._forward, self._sampler, self._choose = forward, sampler, choose
        self._device = device
        self._on_device = chosen
        if chosen is not None:
            chosen.keep(depth)
        self._on_host = Chosen(depth)
        self._outstanding: deque[_Step] = deque()
        self._broken = False  # a step did not end; True until no step is outstanding
        self._returns = [self._new_return(_LEAST_IDS) for _ in range(depth)]
        self._launched = 0
        self._ended = 0.0  # when the last step was done

    def submit(self, plan: StepPlan) -> None:
        """Launch a step behind those that run. What goes wrong is told when it is waited for."""
        if len(self._outstanding) >= self.depth:
            raise RuntimeError(f"step {plan.number} was submitted while {self.depth} steps are outstanding")
        step = _Step(plan, time.perf_counter())
        self._outstanding.append(step)
        if self._broken:
            step.error = StepGivenUp(f"step {plan.number} was to come after one that did not end")
            return
        try:
            with torch.inference_mode():
                self._launch(step)
        except Exception as error:  # of any kind: the step's, told in its turn
            step.error = error
            self._break()
            with contextlib.suppress(Exception):  # what it launched still writes into its blocks
                settle(self._device)

    def wait(self) -> StepOutput:
        """As ``instance.ports.Engine``."""
        if not self._outstanding:
            raise RuntimeError("no step is outstanding")
        step = self._outstanding.popleft()
        try:
            return self._end(step)
        except BaseException:
            self._break()
            for behind in self._outstanding:
                behind.error = behind.error or StepGivenUp(f"step {behind.plan.number} came after one that did not end")
            raise
        finally:
            self._ended = time.perf_counter()
            if not self._outstanding:
                self._broken = False

    def close(self) -> None:
        """Wait for what was launched, so that nothing writes into the pool any more. Idempotent."""
        outstanding, self._outstanding = self._outstanding, deque()
        for step in outstanding:
            with contextlib.suppress(Exception):
                step.finish()
        self._on_host.forget()
        if self._on_device is not None:
            self._on_device.forget()

    def _launch(self, step: _Step) -> None:
        plan = step.plan
        if not plan.items:
            return
        known = plan if self._on_device is not None else self._on_host.fill_in(plan)
        logits = self._forward(known)
        sampling = [item for item in known.items if item.sample]
        ids = self._sampler(logits, sampling) if logits is not None else None
        if logits is not None and ids is None:
            step.tokens = self._choose(logits, sampling)
        self._send_back(step, ids)
        if self._on_device is None:
            step.finish()
            self._on_host.note(step.output(0.0))
            return
        if step.tokens:
            ids = torch.tensor([token.id for token in step.tokens]).to(self._device, non_blocking=True)
        self._on_device.note(ids, (item.request_id for item in sampling) if ids is not None else ())

    def _send_back(self, step: _Step, ids: Tensor | None) -> None:
        """Let the step's ids come to the host behind it, and mark its end in the stream."""
        turn = self._launched % self.depth
        self._launched += 1
        count = 0 if ids is None else len(ids)
        if self._returns[turn].memory.numel() < count:
            self._returns[turn] = self._new_return(2 * count)
        back = self._returns[turn]
        if ids is not None:
            step.ids = back.memory[:count]
            step.ids.copy_(ids, non_blocking=True)
        if back.done is not None:
            back.done.record()
        step.back = back

    def _end(self, step: _Step) -> StepOutput:
        if step.error is not None:
            with contextlib.suppress(Exception):  # the reason is known, and what was launched must be over
                step.finish()
            raise step.error
        step.finish()
        return step.output(time.perf_counter() - max(step.submitted, self._ended))

    def _break(self) -> None:
        self._broken = True
        self._on_host.forget()
        if self._on_device is not None:
            self._on_device.forget()

    def _new_return(self, ids: int) -> _Return:
        on_gpu = self._device.type == "cuda"
        memory = torch.empty(ids, dtype=torch.int64, pin_memory=on_gpu)
        return _Return(memory, torch.cuda.Event() if on_gpu else None)
