"""One instance by counts: what the machine decides, with numbers in place of block tables and token lists.

For sweeps of thousands of runs. The rules are the machine's: batches come from the production batching policies;
admission, grants, preemption and jumps follow ``InstanceState`` decision by decision, and a test holds every outcome of
the two equal, to the last bit. Whatever is rare and intricate (``NotCounted``) is left to the machine itself.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from typing import Protocol

from distserve.sched.batching import POLICIES, BatchLimits
from distserve.sched.steps import StepShape
from distserve_planner.simulation.decoding import BY_ORDER, Counted, Decoding
from distserve_planner.simulation.deployment import InstanceSpec
from distserve_planner.simulation.pace import Pace
from distserve_planner.simulation.shell import StepWatch

Action = tuple[int, Counted, int, int]
"""What leaves an instance: (kind, sequence, start, end)."""
FIRST, STAGE, COMMIT = range(3)
Chunks = list[tuple[Counted, int]]
_NONE: Chunks = []


class NotCounted(Exception):
    """This run comes to a corner that only the machine covers."""


class _Row:
    """Stands for any decoding sequence before a batching policy."""

    decoding = True
    owed = 1


class MoveIn:
    """A move at its destination."""

    __slots__ = ("commit", "order", "sequence", "source", "stored", "total")

    def __init__(self, sequence: Counted, source: int, order: int) -> None:
        self.sequence = sequence
        self.source = source
        self.order = order
        self.total = sequence.length
        self.stored = 0
        self.commit = False


class Around(Protocol):
    """What a counted instance needs of the world."""

    def ask(self, source: int, sequence: Counted, now: float) -> None: ...
    def grant(self, move: MoveIn) -> None: ...
    def stage(self, source: int, sequence: Counted, start: int, end: int, now: float) -> None: ...
    def commit(self, sequence: Counted) -> None: ...
    def committed(self, move: MoveIn, now: float) -> None: ...
    def call_off(self, sequence: Counted) -> None: ...
    def first(self, index: int, ends: bool, now: float) -> None: ...
    def ended(self, index: int, now: float) -> None: ...
    def wake_at(self, instance: int, at: float) -> None: ...
    def after(self, at: float, instance: int, actions: list[Action]) -> None: ...


class Tally:
    """See the module."""

    def __init__(self, index: int, spec: InstanceSpec, world: Around, watch: StepWatch | None) -> None:
        config = spec.config
        self.index = index
        self.steps = 0
        self.preemptions = 0
        self.busy_s = 0.0
        self.kv_peak = 0
        self.total = spec.kv_tokens // spec.block_size
        self.free = self.total
        self._world = world
        self._watch = watch
        self._block = spec.block_size
        self._pull_stall_s = spec.pull_stall_s
        self._headroom = max(1, int(self.total * config.headroom_share)) * spec.block_size
        self._most_sequences = config.max_sequences
        self._most_owed = config.max_batch_tokens
        self._choose = POLICIES[config.batching]
        self._limits = BatchLimits(config.max_batch_tokens, config.max_mixed_tokens, config.prefill_chunk)
        self._pace = Pace(spec.model, spec.pipeline_overlap, pipelined_prompts=not spec.role.can_decode)
        self._order = 0
        self._waiting: deque[Counted] = deque()
        self._pending: deque[MoveIn] = deque()
        self._open = 0  # moves coming in, with room reserved
        self._prompts: list[Counted] = []  # running, not decoding, in order
        self._owed = 0  # tokens the running prompts owe
        self._decoding = Decoding(spec.block_size)
        self._unsettled = False  # planning gave room back: any event may let somebody in
        self._stall = 0.0
        self._chunks = _NONE  # of the outstanding step
        self._rows = 0  # decoding ones in it
        self._ends: list[float] = []  # of it, and of those after it that are alike
        self._out_at = self._lag_until = self._began = 0.0

    # ── events ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def submit(self, index: int, prompt: int, output: int, destination: int, now: float) -> None:
        """A request arrives that fits here; the decode instance to hand it to, or -1."""
        if self._ends and self._ends[0] <= now:
            self.run_to(now)
        self._order += 1
        self._waiting.append(Counted(index, prompt, prompt + output, self._order, destination))
        self._turn(now)

    def asked(self, sequence: Counted, source: int, now: float) -> None:
        """A source asks for room."""
        if self._ends and self._ends[0] <= now:
            self.run_to(now)
        self._order += 1
        self._pending.append(MoveIn(sequence, source, self._order))
        self._turn(now)

    def granted(self, sequence: Counted, now: float) -> None:
        """A destination has room for one of this instance's sequences."""
        if self._ends and self._ends[0] <= now:
            self.run_to(now)
        sequence.granted = True
        if sequence.length >= sequence.limit:  # it ended while the grant was on its way
            return
        if actions := self._pump(sequence):
            self._leave(actions, now)

    def stored(self, move: MoveIn, tokens: int, now: float) -> None:
        """KV came in for a move."""
        if self._ends and self._ends[0] <= now:
            self.run_to(now)
        move.stored += tokens
        self._adopt_if_whole(move, now)

    def commit_asked(self, move: MoveIn, now: float) -> None:
        """The source has nothing more to send."""
        if self._ends and self._ends[0] <= now:
            self.run_to(now)
        move.commit = True
        self._adopt_if_whole(move, now)

    def _adopt_if_whole(self, move: MoveIn, now: float) -> None:
        if move.commit and move.stored >= move.total:
            self._open -= 1
            self._stall += self._pull_stall_s * move.stored
            source = move.sequence
            adopted = Counted(source.index, source.length, source.limit, move.order, -1)
            self._decoding.begin(adopted, late=bool(self._ends and self._rows))
            self._world.committed(move, now)
        elif not self._unsettled:
            return
        self._turn(now)

    def called_off(self, sequence: Counted, now: float) -> None:
        """The source's sequence ended: whatever is held for it is free."""
        if self._ends and self._ends[0] <= now:
            self.run_to(now)
        if sequence.reserved:
            self.free += self._blocks(sequence.length - 1)
            self._open -= 1
        else:
            self._pending.remove(next(move for move in self._pending if move.sequence is sequence))
        self._turn(now)

    def gone(self, sequence: Counted, now: float) -> None:
        """The destination owns it: its blocks here are free."""
        if self._ends and self._ends[0] <= now:
            self.run_to(now)
        self.free += self._blocks(sequence.computed)
        self._turn(now)

    # ── letting in ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self._block)

    def _turn(self, now: float) -> None:
        """What the machine does after every event: let in who has room, plan if no step is outstanding."""
        if self._waiting or self._pending:
            self._let_in(now)
        if not self._ends:
            if self._prompts or self._decoding.members:
                self._plan(now)
        elif len(self._ends) > 1 and (sure := self._alike()) < len(self._ends):
            del self._ends[max(1, sure) :]
            self._world.wake_at(self.index, self._ends[-1])

    def _let_in(self, now: float) -> None:
        """Queued prompts and asked moves, in one line by order."""
        waiting, pending, block = self._waiting, self._pending, self._block
        while waiting or pending:
            running = len(self._prompts) + len(self._decoding.members)
            if running + self._open >= self._most_sequences:
                return
            spare = self._headroom if running else 0
            if pending and (not waiting or pending[0].order < waiting[0].order):
                asked = pending[0]
                if -(-(asked.total + spare) // block) > self.free:
                    return
                pending.popleft()
                asked.sequence.reserved = True
                self.free -= -(-asked.total // block)
                self._open += 1
                self._world.grant(asked)
            else:
                queued = waiting[0]
                if self._owed >= self._most_owed or -(-(queued.length + spare) // block) > self.free:
                    return
                waiting.popleft()
                self.free -= -(-queued.length // block)
                self._owed += queued.length
                self._insert(queued)
                if queued.destination >= 0:
                    self._world.ask(self.index, queued, now)

    def _insert(self, sequence: Counted) -> None:
        place = len(self._prompts)
        while place and self._prompts[place - 1].order > sequence.order:  # one that was preempted is older
            place -= 1
        self._prompts.insert(place, sequence)

    # ── planning ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _plan(self, now: float) -> None:
        self._unsettled = False
        rows, chunks = self._batch() if self._prompts else (len(self._decoding.members), _NONE)
        if rows:
            need = self._decoding.need_now()
            if need > self.free:
                self._make_room()
                rows = len(self._decoding.members)
            else:
                self.free -= need
        if not rows and not chunks:
            raise NotCounted
        self._chunks, self._rows = chunks, rows
        self.steps += 1
        stall, self._stall = self._stall, 0.0
        self._began = now
        self._plan_ends(now, stall)

    def _batch(self) -> tuple[int, Chunks]:
        running = [*([_Row] * len(self._decoding.members)), *self._prompts]
        chosen = self._choose(running, self._limits)
        chunks = [(s, n) for s, n in chosen if s is not _Row]
        return len(chosen) - len(chunks), chunks

    def _make_room(self) -> None:
        """Blocks for every decoding sequence that needs one, at the cost of the youngest (``Residents._secure``)."""
        members = self._decoding.members
        for sequence in self._decoding.needing():
            while sequence.decoding and not self.free:
                if len(members) < 2:
                    raise NotCounted
                self._preempt(max(members.values(), key=BY_ORDER))
            if sequence.decoding:
                self.free -= 1

    def _preempt(self, sequence: Counted) -> None:
        self.preemptions += 1
        self._unsettled = True
        computed = self._decoding.take_out(sequence)
        self.free += self._blocks(computed)
        sequence.length, sequence.computed = computed + 1, 0
        place = 0
        while place < len(self._waiting) and self._waiting[place].order < sequence.order:
            place += 1
        self._waiting.insert(place, sequence)

    def _plan_ends(self, now: float, stall: float) -> None:
        rows = self._rows
        context = self._decoding.computed + rows if rows else 0
        if self._chunks:
            shape = StepShape(tuple([(n, s.computed) for s, n in self._chunks]), rows, context)
            end, out_at = self._pace.step(shape, now)
            end, self._out_at = end + stall, out_at + stall
            self._ends = [end]
        else:
            end = self._out_at = now + self._pace.decode_s(rows, context) + stall
            alike = self._alike()
            self._ends = self._pace.ends(rows, context, alike, end) if alike > 1 else [end]
        if self._watch is not None:
            self._watch(self.index, now, self._ends[-1], sum(n for _, n in self._chunks), rows)
        self._world.wake_at(self.index, self._ends[-1])

    def _alike(self) -> int:
        """As ``Steps.alike``."""
        rows, decoding = self._rows, self._decoding
        if self._chunks or not rows:
            return 0
        left = decoding.left()
        if left < 2:
            return left
        if rows != len(decoding.members) or self._prompts or self._unsettled:
            return 1
        return left if rows * (left // self._block + 1) <= self.free else decoding.steps_within(self.free, rows, left)

    # ── steps that end ───────────────────────────────────────────────────────────────────────────────────────────────

    def run_to(self, now: float) -> None:
        """Finish the steps that end by now."""
        while self._ends and self._ends[0] <= now:
            if self._chunks or not self._rows:
                self._finish_prompts()
            else:
                self._jump(bisect_right(self._ends, now))

    def _jump(self, steps: int) -> None:
        """As ``Steps.fast_forward``."""
        end, decoding = self._ends[steps - 1], self._decoding
        goes_on = steps < len(self._ends) or steps < self._alike()
        del self._ends[:steps]
        self._account(end)
        self.free -= decoding.need(steps if goes_on else steps - 1, self._rows)
        decoding.clock += steps
        decoding.computed += steps * self._rows
        if goes_on:
            self.steps += steps
            if not self._ends:
                self._plan_ends(end, 0.0)
            return
        self.steps += steps - 1
        self._end_due(end)
        self._rows = 0
        self._turn(end)

    def _account(self, end: float) -> None:
        self.busy_s += end - self._began
        self._began = end
        if self.total - self.free > self.kv_peak:
            self.kv_peak = self.total - self.free

    def _end_due(self, now: float) -> None:
        for sequence, computed in self._decoding.take_due():
            self.free += self._blocks(computed)
            self._world.ended(sequence.index, now)

    def _finish_prompts(self) -> None:
        """A step with prompt work; decodes that ran beside it advance too."""
        end, self._ends = self._ends[0], []
        self._account(end)
        chunks, self._chunks = self._chunks, _NONE
        self._lag_until = self._out_at
        if self._rows:
            self._decoding.clock += 1
            self._decoding.computed += self._rows
            self._end_due(end)
            self._rows = 0
        firsts: list[Action] = []
        actions: list[Action] = []
        for sequence, count in chunks:
            sequence.computed += count
            self._owed -= count
            if sequence.computed == sequence.length:
                firsts.append((FIRST, sequence, 0, 0))
                actions += self._advance(sequence)
            else:
                actions += self._pump(sequence)
        self._leave(firsts + actions, end)
        self._turn(end)

    def _advance(self, sequence: Counted) -> list[Action]:
        """Its prompt is computed and a token sampled: it ends, waits for its move, or decodes here."""
        self._prompts.remove(sequence)
        sequence.length += 1
        sequence.prefilled = True
        if sequence.length >= sequence.limit:
            self.free += self._blocks(sequence.computed)
            if sequence.destination >= 0:
                self._world.call_off(sequence)
            return []
        if sequence.destination < 0:
            self._decoding.begin(sequence, late=False)
            return []
        return self._pump(sequence)

    # ── what leaves ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _pump(self, sequence: Counted) -> list[Action]:
        """Send the KV that is final and not yet sent; commit when the prompt is done."""
        if not sequence.granted:
            return []
        whole = sequence.prefilled
        end = sequence.computed if whole else sequence.computed // self._block * self._block
        actions: list[Action] = []
        if end > sequence.sent:
            actions.append((STAGE, sequence, sequence.sent, end))
            sequence.sent = end
        if whole:
            actions.append((COMMIT, sequence, 0, 0))
        return actions

    def _leave(self, actions: list[Action], now: float) -> None:
        """Let them out now, or when the pipeline has computed what they tell of."""
        if self._lag_until > now and actions:
            self._world.after(self._lag_until, self.index, actions)
        else:
            self.release(actions, now)

    def release(self, actions: list[Action], now: float) -> None:
        """First tokens, KV, commits."""
        for kind, sequence, start, end in actions:
            if kind == FIRST:
                self._world.first(sequence.index, sequence.length >= sequence.limit, now)
            elif kind == STAGE:
                self._world.stage(self.index, sequence, start, end, now)
            else:
                self._world.commit(sequence)
