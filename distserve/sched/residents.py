"""The sequences of one instance and the blocks they hold: who waits, who runs, who gives way.

Owns the block ledger. Knows nothing of moves; whoever drops a sequence that is on the move ends the move first.
"""

from __future__ import annotations

from collections import deque

from distserve.core.effects import Effect, Send
from distserve.core.events import AttemptFailed
from distserve.core.types import CHOSEN_BEFORE, Code, InstanceRef, Member, StepItem
from distserve.kv.ledger import BlockLedger, BlockState
from distserve.sched.batching import POLICIES, BatchLimits
from distserve.sched.config import InstanceConfig
from distserve.sched.lifecycle import Phase
from distserve.sched.sequence import Sequence

FOLLOWS = (CHOSEN_BEFORE,)


class Residents:
    """Queue, running set and ledger."""

    def __init__(self, member: Member, config: InstanceConfig) -> None:
        self.me: InstanceRef = member.ref
        self.spec = member.spec
        self.config = config
        self.ledger = BlockLedger(member.spec.pool_blocks, member.spec.block_size, prefix_cache=config.prefix_cache)
        self.sequences: dict[str, Sequence] = {}
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of arrival
        self.preemptions = 0
        self._steps_done = 0  # steps up to this number touch no block any more
        self._after_step: list[tuple[int, str]] = []  # step, ledger owner to release when it is done
        self._zombies = 0

    # ── questions ────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def zombies(self) -> bool:
        """Whether outstanding steps write blocks of sequences that were dropped meanwhile."""
        return bool(self._after_step)

    @property
    def headroom_tokens(self) -> int:
        """Room kept for running sequences to grow into when somebody new is let in; none on an empty instance."""
        if not self.running:
            return 0
        share = int(self.spec.pool_blocks * self.config.headroom_share)
        return max(1, share) * self.spec.block_size

    def room_for(self, tokens: list[int], need: int, limit: int) -> bool:
        """Whether a sequence of ``need`` tokens could get its blocks now and leave the headroom."""
        return self.ledger.room_for(tokens, need + self.headroom_tokens, limit)

    def leaves(self, sequence: Sequence) -> bool:
        """Whether a sequence is to be handed off once it is prefilled."""
        return sequence.owned_at is None and sequence.decode.ref != self.me

    def queued_tokens(self) -> int:
        """Prompt tokens owed before a new arrival would start."""
        return sum(s.owed for s in self.waiting) + sum(s.owed for s in self.running if not s.decoding)

    # ── commands ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def enqueue(self, sequence: Sequence) -> None:
        self.sequences[sequence.id] = sequence
        self.waiting.append(sequence)

    def admit_next(self, *, before: int | None = None, reserved: int = 0) -> Sequence | None:
        """Move the head of the queue into the running set if it has room there and in the pool.

        ``before``: only if it arrived before this order. ``reserved``: places in the running set held for incoming
        moves. Admits at most about one batch of prompt tokens ahead, so that blocks are not held idle.
        """
        if not self.waiting or len(self.running) + reserved >= self.config.max_sequences:
            return None
        sequence = self.waiting[0]
        if before is not None and sequence.order > before:
            return None
        if sum(s.owed for s in self.running if not s.decoding) >= self.config.max_batch_tokens:
            return None
        need, limit = len(sequence.tokens), len(sequence.tokens) - 1
        if not self.room_for(sequence.tokens, need, limit):
            return None
        cached = self.ledger.admit(sequence.owner, sequence.tokens, need, BlockState.FILLING, limit)
        if cached is None:
            return None
        self.waiting.popleft()
        sequence.computed = sequence.cached_tokens = cached
        sequence.enter(Phase.PREFILL)
        self._insert_running(sequence)
        return sequence

    def adopt(self, sequence: Sequence, move_owner: str) -> None:
        """Take in a sequence whose KV came by a move: its reserved blocks become owned."""
        self.ledger.rename(move_owner, sequence.owner)
        self.ledger.restate(sequence.owner, BlockState.OWNED)
        self.sequences[sequence.id] = sequence
        sequence.enter(Phase.PREFILL)
        sequence.enter(Phase.DECODE)
        self._insert_running(sequence)

    def _insert_running(self, sequence: Sequence) -> None:
        place = len(self.running)
        while place and self.running[place - 1].order > sequence.order:
            place -= 1
        self.running.insert(place, sequence)

    def prefilled(self, sequence: Sequence, *, leaves: bool) -> None:
        """The prompt is computed: share its blocks, and go on decoding here or wait for the hand-off."""
        self.ledger.restate(sequence.owner, BlockState.OWNED)
        self.ledger.publish(sequence.owner, sequence.tokens[: sequence.computed])
        if leaves:
            sequence.enter(Phase.HANDOFF)
            self.running.remove(sequence)
        else:
            sequence.enter(Phase.DECODE)

    def drop(self, sequence: Sequence) -> None:
        """Forget a sequence and free what it holds, now or when the last step that writes its blocks is done."""
        if sequence.phase is Phase.WAITING:
            self.waiting.remove(sequence)
        elif sequence.phase is not Phase.HANDOFF:
            self.running.remove(sequence)
        held = self.ledger.holds(sequence.owner)
        sequence.enter(Phase.ENDED)
        if self.sequences.get(sequence.id) is sequence:
            del self.sequences[sequence.id]
        if held:
            self.ledger.publish(sequence.owner, sequence.tokens[: sequence.computed])
            self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        if self.stepping(sequence):
            self._zombies += 1
            zombie = f"z:{self._zombies}:{sequence.id}"
            self.ledger.rename(sequence.owner, zombie)
            self._after_step.append((sequence.last_step, zombie))
        else:
            self.ledger.release(sequence.owner)

    def fail(
        self, sequence: Sequence, code: Code, message: str, *, retriable: bool, culprit: InstanceRef | None = None
    ) -> list[Effect]:
        """Give an attempt up and tell its gateway."""
        self.drop(sequence)
        failed = AttemptFailed(self.me, sequence.id, sequence.epoch, code, message, retriable, culprit)
        return [Send(sequence.gateway, failed)]

    # ── steps ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def choose(self) -> list[tuple[Sequence, int]]:
        """The chunks of the next step, each with its blocks secured; preempts the youngest where the pool is full.

        No step may be outstanding: who gives way gives its blocks away.
        """
        config = self.config
        limits = BatchLimits(config.max_batch_tokens, config.max_mixed_tokens, config.prefill_chunk)
        chosen = POLICIES[config.batching](self.running, limits)
        if chosen and chosen[0][0].decoding != chosen[-1][0].decoding:  # else they are in order of arrival already
            chosen.sort(key=lambda c: c[0].order)
        return self.secure(chosen)

    def secure(self, chosen: list[tuple[Sequence, int]]) -> list[tuple[Sequence, int]]:
        """Those of ``chosen`` whose blocks could be had, at the cost of younger sequences if need be."""
        preemptions = self.preemptions
        secured = [(s, n) for s, n in chosen if self._secure(s, s.computed + n)]
        if preemptions == self.preemptions:
            return secured
        return [(s, n) for s, n in secured if s.phase in (Phase.PREFILL, Phase.DECODE)]

    def _secure(self, sequence: Sequence, need: int) -> bool:
        """Blocks for ``need`` tokens, at the cost of younger sequences, in the end of the sequence itself."""
        while sequence.phase in (Phase.PREFILL, Phase.DECODE):
            if self.ledger.grow(sequence.owner, need):
                return True
            decoding = [s for s in self.running if s.decoding]
            if len(decoding) < 2:  # alone: what is in the way is reserved or leaving, and ends by its own deadline
                return False
            self._preempt(decoding[-1])
        return False

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the head of the queue; its KV is computed again later (a prefix hit keeps most of it)."""
        self.preemptions += 1
        sequence.preemptions += 1
        self.running.remove(sequence)
        self.ledger.publish(sequence.owner, sequence.tokens[: sequence.computed])
        self._release(sequence)
        sequence.computed = 0
        sequence.enter(Phase.WAITING)
        place = 0
        while place < len(self.waiting) and self.waiting[place].order < sequence.order:
            place += 1
        self.waiting.insert(place, sequence)

    def item(self, sequence: Sequence, count: int) -> StepItem:
        """One entry of a step plan, behind what outstanding steps compute of the sequence."""
        start = sequence.computed + sequence.ahead
        end = start + count
        sampling = sequence.request.sampling
        history = sampling.needs_history
        return StepItem(
            request_id=sequence.id,
            start=start,
            token_ids=tuple(sequence.tokens[start:end]) or FOLLOWS,
            blocks=self.ledger.table(sequence.owner),
            sample=end == len(sequence.tokens) + sequence.unknown,
            output_index=sequence.output_len + sequence.unknown,
            sampling=sampling,
            banned=sequence.banned(),
            prompt=sequence.request.prompt_token_ids if history else (),
            output=sequence.output if history else (),
        )

    def end_step(self, number: int) -> None:
        """Steps up to this one touch no block any more: what they alone still wrote is free."""
        self._steps_done = number
        due = [owner for last, owner in self._after_step if last <= number]
        if due:
            self._after_step = [(last, owner) for last, owner in self._after_step if last > number]
        for owner in due:
            self.ledger.release(owner)

    def stepping(self, sequence: Sequence) -> bool:
        """Whether an outstanding step computes some of it."""
        return sequence.last_step > self._steps_done

    def holders(self) -> set[str]:
        """Every ledger owner that this object can release."""
        held = {s.owner for s in self.sequences.values() if s.phase is not Phase.WAITING}
        return held | {owner for _, owner in self._after_step}

    def check(self) -> None:
        """Raise if queue, running set and sequences disagree."""
        placed = [*self.waiting, *self.running, *(s for s in self.sequences.values() if s.phase is Phase.HANDOFF)]
        if sorted(s.id for s in placed) != sorted(self.sequences):
            raise AssertionError(f"{self.me}: {sorted(s.id for s in placed)} placed, {sorted(self.sequences)} known")
        for sequence in self.running:
            if sequence.phase not in (Phase.PREFILL, Phase.DECODE) or sequence.owed < 1:
                raise AssertionError(f"{sequence.id}: {sequence.phase}, owes {sequence.owed}, in the running set")
            if sequence.decoding and sequence.owed != 1:
                raise AssertionError(f"{sequence.id}: decodes but owes {sequence.owed}")
        for sequence in self.sequences.values():
            if (sequence.ahead or sequence.unknown) and not self.stepping(sequence):
                what = f"{sequence.ahead} positions and {sequence.unknown} tokens"
                raise AssertionError(f"{sequence.id}: waits for {what} of no outstanding step")
            if sequence.phase is Phase.HANDOFF and sequence.ahead:
                raise AssertionError(f"{sequence.id}: is computed on while it is handed off")
