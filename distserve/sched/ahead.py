"""Whom a step takes where several are in flight: a policy, from what runs and is outstanding to the next batch.

Two ways to keep an engine busy, chosen by ``follow_up``.

*Disjoint batches* (off): a step takes sequences that no outstanding step samples for. Next tokens are shared out, so
that each of the steps in flight has some: the stages of a pipeline all have work. Who stepped longest ago comes first.

*Following* (on): a step takes whoever the step before takes, each with the token that this one is about to sample
(``StepItem.follows``), so that the device does not wait for the host. Everybody follows or nobody does: where somebody
cannot for want of knowing its token, or of a block without anybody giving way, nothing is planned ahead, and the step
that comes when the token is known takes all. Split instead, the batch would stay split for good: two half batches that
take turns.

Either way the next chunk of a prompt may be planned behind the last, and nobody gives way: who is preempted would give
away blocks that outstanding steps write. When no step is outstanding any more the next one preempts as ever, so nobody
waits for room for longer than the steps in flight need to end for want of it.
"""

from __future__ import annotations

from distserve.sched.batching import POLICIES, BatchLimits
from distserve.sched.residents import Residents
from distserve.sched.sequence import Sequence


class Candidate:
    """A running sequence as a batching policy sees it (``batching.Owing``), outstanding steps taken as done."""

    __slots__ = ("decoding", "owed", "sequence")

    def __init__(self, sequence: Sequence, owed: int, decoding: bool) -> None:
        self.sequence = sequence
        self.owed = owed
        self.decoding = decoding


class Ahead:
    """Belongs to ``Steps``."""

    def __init__(self, residents: Residents) -> None:
        self._residents = residents
        config = residents.config
        self._follow_up = config.follow_up
        self._in_flight = config.steps_in_flight
        self._policy = POLICIES[config.batching]
        self._limits = BatchLimits(config.max_batch_tokens, config.max_mixed_tokens, config.prefill_chunk)
        # Beside next tokens of another step, too: they wait for this one.
        self._mixed = BatchLimits(config.max_mixed_tokens, config.max_mixed_tokens, config.prefill_chunk)

    def choose(self, *, first: bool) -> list[tuple[Sequence, int]]:
        """The chunks of the next step, each with its blocks secured, in order of arrival.

        ``first``: no step is outstanding, so that sequences may give way.
        """
        if not first:
            chosen = self._chosen()
            return self._grown_together(chosen) if self._follow_up else self._grown(chosen)
        while True:
            preemptions = self._residents.preemptions
            secured = self._residents.secure(self._chosen())
            if secured or preemptions == self._residents.preemptions:
                return secured  # else all of this share gave way to others, whose turn it is then

    def _chosen(self) -> list[tuple[Sequence, int]]:
        running = self._residents.running
        candidates = self._candidates(running)
        if candidates is None:
            return []
        decoding = sum(s.decoding for s in running)
        if not self._follow_up:
            candidates = self._share(candidates, decoding)
        chosen = [(c.sequence, n) for c, n in self._policy(candidates, self._mixed if decoding else self._limits)]
        chosen.sort(key=lambda c: c[0].order)
        return chosen

    def _candidates(self, running: list[Sequence]) -> list[Candidate] | None:
        """Who could be in the next step; None: somebody could if only its token were known, so wait for it."""
        found: list[Candidate] = []
        for sequence in running:
            known = len(sequence.tokens) - sequence.planned
            if known > 0:
                found.append(Candidate(sequence, known, sequence.decoding))
            elif self._follow_up and not self._is_over(sequence):
                if self._needs_token(sequence):
                    return None
                found.append(Candidate(sequence, 1, True))
        return found

    def _needs_token(self, sequence: Sequence) -> bool:
        """Whether its next step cannot be planned before its last token is known: penalties read it."""
        return sequence.request.sampling.needs_history

    def _is_over(self, sequence: Sequence) -> bool:
        """Whether it needs no step after those that are outstanding: the last token is under way, or it leaves."""
        ends = len(sequence.tokens) + sequence.unknown >= sequence.length_limit
        return ends or (not sequence.decoding and self._residents.leaves(sequence))

    def _share(self, candidates: list[Candidate], decoding: int) -> list[Candidate]:
        """All prompts, and of the next tokens one step's share."""
        decodes = [c for c in candidates if c.decoding]
        most = -(-decoding // self._in_flight)
        if len(decodes) <= most:
            return candidates
        decodes.sort(key=lambda c: (c.sequence.last_step, c.sequence.order))
        return [c for c in candidates if not c.decoding] + decodes[:most]

    def _grown(self, chosen: list[tuple[Sequence, int]]) -> list[tuple[Sequence, int]]:
        """Those whose blocks are to be had without anybody giving way."""
        ledger = self._residents.ledger
        return [(s, n) for s, n in chosen if ledger.grow(s.owner, s.planned + n)]

    def _grown_together(self, chosen: list[tuple[Sequence, int]]) -> list[tuple[Sequence, int]]:
        """All of them, or nobody where there are not blocks for all."""
        ledger = self._residents.ledger
        size = ledger.block_size
        short = (s.planned + n - ledger.capacity(s.owner) for s, n in chosen)
        if sum(-(-positions // size) for positions in short if positions > 0) > ledger.available:
            return []
        return self._grown(chosen)
