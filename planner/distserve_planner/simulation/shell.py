"""One simulated instance: the production machine, with a latency model where the engine would be.

Performs the machine's effects on the virtual clock. Decides nothing. Many decode steps without a decision between them
are one jump (``InstanceState.fast_forward``): the machine is brought up to date when an event arrives for it, or when
one of its sequences is due to end.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from typing import Protocol

from distserve.core.effects import AbortSend, CloseTicket, Effect, OpenTicket, RunStep, Send, SendStage
from distserve.core.events import CommitAsked, Committed, InstanceEvent, StepDone
from distserve.core.types import GatewayRef, Member, Token
from distserve.sched.instance import InstanceState
from distserve.sched.sequence import Sequence
from distserve_planner.simulation.deployment import InstanceSpec
from distserve_planner.simulation.pace import Pace

TOKEN = Token(0)
StepWatch = Callable[[int, float, float, int, int], None]
"""Told of every step planned: instance, start, end, prompt tokens, decodes. Only without jumps is every step told."""


class Surroundings(Protocol):
    """What an instance's shell needs of the world around it."""

    def send(self, source: int, effect: Send, now: float) -> None: ...
    def stage(self, source: int, effect: SendStage, now: float) -> None: ...
    def abort(self, move_id: str, now: float) -> None: ...
    def ended(self, instance: int, sequence: Sequence, now: float) -> None: ...
    def wake_at(self, instance: int, at: float) -> None: ...
    def after(self, at: float, instance: int, effects: list[Effect]) -> None: ...


class SimulatedInstance:
    """See the module. ``jumps=False``: every step is an event of its own, the truth that jumps are tested against."""

    def __init__(
        self,
        index: int,
        member: Member,
        spec: InstanceSpec,
        world: Surroundings,
        *,
        jumps: bool,
        seed: int,
        watch: StepWatch | None = None,
    ) -> None:
        self.index = index
        self.state = InstanceState(member, spec.config, seed, terse=True)
        self.busy_s = 0.0
        self.kv_peak = 0
        self._spec = spec
        self._world = world
        self._jumps = jumps
        self._watch = watch
        self._pace = Pace(spec.model, spec.pipeline_overlap, pipelined_prompts=not member.role.can_decode)
        self._ends: list[float] = []  # of the outstanding step, and of those after it that are alike
        self._out_at = 0.0  # when what the outstanding step makes leaves the pipeline
        self._lag_until = 0.0  # when what the last finished step made has left it
        self._began = 0.0
        self._stall = 0.0
        self._moved: dict[str, int] = {}  # move coming in → KV tokens stored so far

    # ── events ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def handle(self, event: InstanceEvent, now: float) -> None:
        """Take in an event that arrives now; steps that ended by now come first."""
        if self._ends and self._ends[0] <= now:
            self.run_to(now)
        self._perform(self.state.handle(event, now), now)
        if len(self._ends) > 1 and (sure := self.state.steps.alike()) < len(self._ends):
            del self._ends[max(1, sure) :]
            self._world.wake_at(self.index, self._ends[-1])

    def stored(self, move_id: str, tokens: int) -> None:
        """KV that came in for a move, to be paid for when the sequence joins."""
        self._moved[move_id] = self._moved.get(move_id, 0) + tokens

    def run_to(self, now: float) -> None:
        """Finish the steps that end by now."""
        while self._ends and self._ends[0] <= now:
            if len(self._ends) == 1 and not (self._jumps and self.state.steps.alike()):
                self._finish_step()
            else:
                self._jump(bisect_right(self._ends, now))

    def _finish_step(self) -> None:
        end, out_at = self._ends[0], self._out_at
        self._ends = []
        self.busy_s += end - self._began
        self._note_peak()
        steps = self.state.steps
        tokens = tuple((name, TOKEN) for name in steps.sampling())
        self._lag_until = out_at
        self._perform(self.state.handle(StepDone(steps.count, tokens, end - self._began), end), end, out_at)

    def _jump(self, steps: int) -> None:
        first, end = self._ends[0], self._ends[steps - 1]
        del self._ends[:steps]
        self.busy_s += end - self._began
        self._began = end
        self._note_peak()
        ended, effects = self.state.fast_forward(steps, TOKEN, first, end)
        for sequence in ended:
            self._world.ended(self.index, sequence, end)
        if effects:
            self._perform(effects, end)
        if not self._ends and self.state.steps.running:  # the same batch goes on beyond what was added up
            self._plan_ends(end, 0.0)

    def _note_peak(self) -> None:
        ledger = self.state.residents.ledger
        self.kv_peak = max(self.kv_peak, ledger.total - ledger.available)

    # ── effects ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _perform(self, effects: list[Effect], now: float, out_at: float | None = None) -> None:
        """In order; what leaves the instance waits until the pipeline has let it out (``out_at``)."""
        leave_at = max(now, self._lag_until) if out_at is None else out_at
        later: list[Effect] = []
        for effect in effects:
            match effect:
                case RunStep():
                    self._begin(now)
                case OpenTicket() | CloseTicket():
                    pass
                case _ if leave_at > now and _carries_work(effect):
                    later.append(effect)
                case _:
                    self.release(effect, now)
        if later:
            self._world.after(leave_at, self.index, later)

    def release(self, effect: Effect, now: float) -> None:
        """Let one effect out into the world."""
        match effect:
            case Send(_, Committed(move_id)):
                self._stall += self._spec.pull_stall_s * self._moved.pop(move_id, 0)
                self._world.send(self.index, effect, now)
            case Send():
                self._world.send(self.index, effect, now)
            case SendStage():
                self._world.stage(self.index, effect, now)
            case AbortSend(move_id):
                self._world.abort(move_id, now)
            case _:
                raise TypeError(f"an instance does not perform {effect}")

    def _begin(self, now: float) -> None:
        stall, self._stall = self._stall, 0.0
        self._began = now
        self._plan_ends(now, stall)

    def _plan_ends(self, now: float, stall: float) -> None:
        shape = self.state.steps.shape()
        end, out_at = self._pace.step(shape, now)
        end, self._out_at = end + stall, out_at + stall
        alike = self.state.steps.alike() if self._jumps and not shape.chunks else 0
        if alike > 1:
            self._ends = self._pace.ends(shape.decodes, shape.decode_context, alike, end)
        else:
            self._ends = [end]
        if self._watch is not None:
            self._watch(self.index, now, self._ends[-1], sum(n for n, _ in shape.chunks), shape.decodes)
        self._world.wake_at(self.index, self._ends[-1])


def _carries_work(effect: Effect) -> bool:
    """Whether an effect tells of tokens or KV that a pipeline may still be computing."""
    if isinstance(effect, Send):
        return isinstance(effect.to, GatewayRef) or isinstance(effect.event, CommitAsked)
    return isinstance(effect, SendStage)
