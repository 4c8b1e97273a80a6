"""The steps of one instance: plan the next forward passes, take in what they made, in order.

Up to ``steps_in_flight`` are outstanding; ``ahead`` says whom a step takes that is planned behind others. A sequence
that is dropped meanwhile keeps its blocks until the last step that it is in has ended. When a step does not end, those
behind it count for nothing, whatever they computed; nothing is planned until they have ended, too.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from distserve.core.effects import Effect, RunStep, Send
from distserve.core.events import SequenceOutput, StepAbandoned, StepDone, StepFailed, TokensMade
from distserve.core.types import Code, FinishReason, GatewayRef, InstanceRef, StepPlan, Timings, Token
from distserve.sched.ahead import Ahead
from distserve.sched.awaiting import Awaiting
from distserve.sched.departures import Departures
from distserve.sched.lifecycle import Phase
from distserve.sched.residents import Residents
from distserve.sched.sequence import Sequence


@dataclass(slots=True)
class Planned:
    """One sequence's part in an outstanding step."""

    sequence: Sequence
    count: int
    sample: bool


@dataclass(slots=True)
class Outstanding:
    """A step that was asked for and not yet answered. ``void``: one before it did not end."""

    number: int
    parts: list[Planned]
    void: bool = False


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a step's duration depends on. Contexts include the tokens the step computes."""

    chunks: tuple[tuple[int, int], ...]  # prompt work: (tokens to compute, tokens computed before)
    decodes: int
    decode_context: int


class Steps:
    """Belongs to ``InstanceState``. ``terse``: plans name no items, for a shell that computes no tokens and asks
    ``shape`` instead."""

    def __init__(self, me: InstanceRef, residents: Residents, departures: Departures, *, terse: bool = False) -> None:
        self.me = me
        self.residents = residents
        self.departures = departures
        self.count = 0
        self.ignored = 0
        self._terse = terse
        self._in_flight = residents.config.steps_in_flight
        self._ahead = Ahead(residents)
        self._outstanding: deque[Outstanding] = deque()  # oldest first
        self._left = -1  # steps until one of them ends by length; -1: not reckoned yet
        self._settled = True  # planning took room; False: it gave some back, so the next event may let somebody in

    @property
    def running(self) -> bool:
        return bool(self._outstanding)

    def shape(self) -> StepShape:
        """Of the one outstanding step, as planned; to be asked before the machine hears of anything else."""
        chunks: list[tuple[int, int]] = []
        decodes = context = 0
        for planned in self._outstanding[0].parts if self._outstanding else ():
            sequence = planned.sequence
            if sequence.decoding:
                decodes += 1
                context += sequence.computed + 1
            else:
                chunks.append((planned.count, sequence.computed))
        return StepShape(tuple(chunks), decodes, context)

    def awaiting(self) -> Awaiting:
        """Who waits for the outstanding steps now.

        Giving one up ends all behind it, so nobody may wait for any of them before the oldest is given up.
        """
        parts = (part.sequence for step in self._outstanding for part in step.parts)
        here = {s.id: (s.gateway, s.epoch) for s in parts if s.phase is not Phase.ENDED}
        return Awaiting(self._outstanding[0].number if self._outstanding else self.count, here)

    def sampling(self) -> tuple[str, ...]:
        """Request ids of the oldest outstanding step that will sample a token, in item order."""
        parts = self._outstanding[0].parts if self._outstanding else ()
        return tuple(part.sequence.id for part in parts if part.sample)

    def _finish(self, sequence: Sequence) -> list[Effect]:
        effects = self.departures.end_for(sequence, "finished")
        self.residents.drop(sequence)
        return effects

    def next(self, now: float) -> list[Effect]:
        """The steps that can be asked for now."""
        asked: list[Effect] = []
        while len(self._outstanding) < self._in_flight and self.residents.running:
            if (step := self._plan(now)) is None:
                break
            asked.append(RunStep(step))
        return asked

    def _plan(self, now: float) -> StepPlan | None:
        if self._outstanding and self._outstanding[0].void:
            return None
        preemptions = self.residents.preemptions
        first = not self._outstanding
        chosen = self.residents.choose() if self._in_flight == 1 else self._ahead.choose(first=first)
        self._settled = preemptions == self.residents.preemptions
        if not chosen:
            return None
        self.count = number = self.count + 1
        items = () if self._terse else tuple([self.residents.item(s, n) for s, n in chosen])
        parts = []
        for sequence, count in chosen:
            if sequence.started_at is None:
                sequence.started_at = now
            sequence.last_step = number
            sequence.ahead += count
            sample = sequence.planned == len(sequence.tokens) + sequence.unknown
            sequence.unknown += sample
            parts.append(Planned(sequence, count, sample))
        self._outstanding.append(Outstanding(number, parts))
        self._left = -1
        return StepPlan(number, items)

    def _answered(self, number: int) -> Outstanding | None:
        """The oldest step, which is no more outstanding, if it is the one of this number."""
        if not self._outstanding or number != self._outstanding[0].number:
            self.ignored += 1
            return None
        self.residents.end_step(number)
        return self._outstanding.popleft()

    def done(self, event: StepDone, now: float) -> list[Effect]:
        step = self._answered(event.number)
        if step is None or step.void:
            return []
        tokens = dict(event.tokens)
        outputs: dict[GatewayRef, list[SequenceOutput]] = {}
        after: list[Effect] = []
        for part in step.parts:
            sequence = part.sequence
            if sequence.phase is Phase.ENDED:
                continue
            sequence.computed += part.count
            sequence.ahead -= part.count
            sequence.unknown -= part.sample
            if not part.sample:
                after += self.departures.pump(sequence, now)
            elif (token := tokens.get(sequence.id)) is None:
                message = "the engine returned no token for it"
                after += self.departures.end_for(sequence, message)
                after += self.residents.fail(sequence, Code.INTERNAL, message, retriable=True)
            else:
                outputs.setdefault(sequence.gateway, []).append(self._take(sequence, token, now))
                after += self._advance(sequence, now)
        # Tokens first: the first token leaves before its KV moves.
        return [Send(g, TokensMade(self.me, tuple(o))) for g, o in outputs.items()] + after

    def _take(self, sequence: Sequence, token: Token, now: float) -> SequenceOutput:
        index = sequence.output_len
        finish = sequence.append(token)
        timings = None if sequence.timed else self._timings(sequence, now)
        sequence.timed = True
        if sequence.first_token_at is None:
            sequence.first_token_at = now
        sequence.recent = (token,)
        return SequenceOutput(sequence.id, sequence.epoch, index, (token,), finish, timings)

    def _timings(self, sequence: Sequence, now: float) -> Timings:
        """The parts this instance measured, told with its first token."""
        started = sequence.started_at if sequence.started_at is not None else now
        if sequence.owned_at is None:
            return Timings(
                queue_s=started - sequence.arrived, prefill_s=now - started, cached_tokens=sequence.cached_tokens
            )
        return Timings(
            reserve_s=sequence.reserve_s,
            decode_queue_s=started - sequence.owned_at,
            decode_step_s=now - started,
            kv_bytes_moved=sequence.kv_bytes,
        )

    def _advance(self, sequence: Sequence, now: float) -> list[Effect]:
        """After a sampled token: end, hand off, or go on."""
        if sequence.finish is not None:
            return self._finish(sequence)
        if sequence.phase is Phase.PREFILL:
            leaves = self.residents.leaves(sequence)
            self.residents.prefilled(sequence, leaves=leaves)
            return self.departures.pump(sequence, now) if leaves else []
        return []

    # ── many steps at once ───────────────────────────────────────────────────────────────────────────────────────────

    def alike(self) -> int:
        """How many steps, the outstanding one first, are sure to compute one next token of the same sequences each.

        0 when the outstanding step is of another kind. Nobody ends before the last of them (unless a sampled token
        stops a sequence), nobody joins or gives way: whoever waits now waits still, since decoding only takes room.
        An event other than their ``StepDone`` makes the answer void.
        """
        residents = self.residents
        if not self._outstanding or self._in_flight > 1 or residents.zombies:
            return 0
        if self._left < 0:
            self._left = self._steps_left()
        if self._left < 2:
            return self._left
        alone = self._settled and len(self._outstanding[0].parts) == len(residents.running)
        return self._within_pool(self._left) if alone else 1

    def _steps_left(self) -> int:
        """Until the first of the outstanding step's sequences ends by length; 0 unless all of them decode."""
        left = 0
        for part in self._outstanding[0].parts:
            sequence = part.sequence
            if not sequence.decoding:
                return 0
            most = sequence.length_limit - len(sequence.tokens)
            if most < left or not left:
                left = most
        return left

    def _within_pool(self, steps: int) -> int:
        """The most of ``steps`` for which the pool holds the blocks that the batch grows into."""
        block, available = self.residents.spec.block_size, self.residents.ledger.available
        parts = self._outstanding[0].parts
        if len(parts) * (steps // block + 1) <= available:
            return steps
        phases = [part.sequence.computed % block for part in parts]
        low, high = 1, steps
        while low < high:
            middle = (low + high + 1) // 2
            if sum((phase + middle - 1) // block for phase in phases) <= available:
                low = middle
            else:
                high = middle - 1
        return low

    def fast_forward(
        self, steps: int, token: Token, first_done: float, now: float
    ) -> tuple[list[Sequence], list[Effect]]:
        """Take in ``steps`` steps that ``alike`` allows, the first done at ``first_done``, the last now.

        The machine is then as after that many ``StepDone`` events in which every sequence sampled ``token``, which must
        stop none. Returns the sequences that ended, and the effects but for the messages to gateways: the caller has
        none, and reads the tokens off the ended sequences. While fewer steps are taken than are alike, the next one is
        outstanding at once, unchanged, without an effect.
        """
        step = self._outstanding[0]
        planned = step.parts
        goes_on = steps < self.alike()
        self._grow_through(planned, steps + 1 if goes_on else steps)
        if goes_on:
            self._left -= steps
            self.count += steps
            step.number = self.count
        else:
            self.count += steps - 1
            self._outstanding.clear()
            self.residents.end_step(self.count)
            for part in planned:
                part.sequence.ahead = part.sequence.unknown = 0
        self._append(planned, steps, token, first_done)
        if goes_on:
            return [], []
        ended = [part.sequence for part in planned if len(part.sequence.tokens) >= part.sequence.length_limit]
        effects: list[Effect] = []
        for sequence in ended:
            sequence.finish = FinishReason.LENGTH
            effects += self._finish(sequence)
        return ended, effects

    def _append(self, planned: list[Planned], steps: int, token: Token, first_done: float) -> None:
        more, recent = [token.id] * steps, (token,)
        for part in planned:
            sequence = part.sequence
            sequence.computed += steps
            sequence.tokens += more
            sequence.recent = recent
            if not sequence.timed:
                sequence.timed = True
                if sequence.first_token_at is None:
                    sequence.first_token_at = first_done

    def _grow_through(self, planned: list[Planned], steps: int) -> None:
        """Secure the blocks of all but the first of these steps, in the order in which the steps would have."""
        block = self.residents.spec.block_size
        crossings: list[tuple[int, int]] = []
        for place, part in enumerate(planned):
            first = block - part.sequence.computed % block
            while first < steps:
                crossings.append((first, place))
                first += block
        for k, place in sorted(crossings):
            sequence = planned[place].sequence
            if not self.residents.ledger.grow(sequence.owner, sequence.computed + k + 1):
                raise AssertionError(f"{sequence.id}: {steps} steps were said to fit the pool, step {k + 1} does not")

    # ── steps that did not end ───────────────────────────────────────────────────────────────────────────────────────

    def failed(self, event: StepFailed) -> list[Effect]:
        """No token of the step exists: every sequence in it is given up to its gateway, to be tried elsewhere."""
        step = self._answered(event.number)
        if step is None or step.void:
            return []
        effects: list[Effect] = []
        for part in step.parts:
            sequence = part.sequence
            if sequence.phase is not Phase.ENDED:
                effects += self.departures.end_for(sequence, "step failed")
                message = f"a forward pass on {self.me} failed: {event.message}"
                effects += self.residents.fail(sequence, Code.INTERNAL, message, retriable=True, culprit=self.me)
        self._void()
        return effects

    def abandoned(self, event: StepAbandoned) -> list[Effect]:
        """Nothing of the step was computed: who left it meanwhile frees its blocks, who is still here is planned again.

        What the step may have written lies past every ``computed``, where nobody reads it and the next step writes.
        """
        step = self._answered(event.number)
        if step is not None and not step.void:
            self._take_back(step)
            self._void()
        return []

    def _void(self) -> None:
        """A step did not end. Those behind it do not count: they would have gone on from what it did not make."""
        for step in self._outstanding:
            step.void = True
            self._take_back(step)

    def _take_back(self, step: Outstanding) -> None:
        """As if the step had not been planned; its sequences' blocks are still written until it is answered."""
        for part in step.parts:
            part.sequence.ahead = part.sequence.unknown = 0
