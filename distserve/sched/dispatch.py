"""Which instances serve an attempt: functions from a view of the members to a choice. Ties are settled, not left.

Source: DistServe §4.3 (shortest prefill queue, least-loaded decode); the prefix term is the prompt tokens whose KV is
probably at an instance already, because a prompt with that beginning was sent there lately.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from distserve.core.types import Load, Member, Placement, Role
from distserve.kv.prefix import PREFIX_RUN
from distserve.sched.config import ClusterConfig

DEPTH = 3
"""Prompt tokens that may overflow to one decode instance, in margins (and one prompt)."""


@dataclass(slots=True)
class Standing:
    """What the controller believes of one member: its last report, and what was sent there since."""

    member: Member
    load: Load
    joined_order: int
    heard_at: float
    prefilling: dict[str, int] = field(default_factory=dict)  # open request's key → prompt tokens it still owes here
    decoding: dict[str, int] = field(default_factory=dict)  # open request's key → tokens it holds or will hold here
    runs: OrderedDict[int, None] = field(default_factory=OrderedDict)  # prefix runs sent here, oldest first
    owed: int = 0  # sum of ``prefilling``
    held: int = 0  # sum of ``decoding``

    @property
    def queue_tokens(self) -> int:
        """Predicted prompt tokens owed before a new arrival: what was sent, or more if others send too."""
        return max(self.owed, self.load.queued_tokens)

    @property
    def free_tokens(self) -> int:
        """Predicted KV room: reported or reckoned from what was sent, whichever is less."""
        spec = self.member.spec
        reported = (self.load.kv_free + self.load.kv_cached) * spec.block_size
        return min(reported, spec.pool_tokens - self.held)

    def send_prompt(self, key: str, tokens: int) -> None:
        """A request's prompt goes here."""
        self.owed += tokens - self.prefilling.get(key, 0)
        self.prefilling[key] = tokens

    def send_decode(self, key: str, tokens: int) -> None:
        """A request will decode here, holding at most ``tokens``."""
        self.held += tokens - self.decoding.get(key, 0)
        self.decoding[key] = tokens

    def prefilled(self, key: str) -> None:
        """Its prompt is no longer owed."""
        self.owed -= self.prefilling.pop(key, 0)

    def close(self, key: str) -> None:
        """Nothing of a request is here any more."""
        self.prefilled(key)
        self.held -= self.decoding.pop(key, 0)

    def cached_tokens(self, hashes: Sequence[int]) -> int:
        """Prompt tokens probably cached here: the leading runs that were sent here lately."""
        hits = 0
        for run in hashes:
            if run not in self.runs:
                break
            hits += 1
        return hits * PREFIX_RUN

    def owed_with(self, prompt_tokens: int, hashes: Sequence[int]) -> int:
        """Prompt tokens owed once a prompt is sent here, those cached left out."""
        return self.queue_tokens + max(1, prompt_tokens - self.cached_tokens(hashes))

    def remember(self, hashes: Iterable[int], limit: int) -> None:
        for run in hashes:
            self.runs[run] = None
            self.runs.move_to_end(run)
        while len(self.runs) > limit:
            self.runs.popitem(last=False)


def shortest_queue(candidates: Iterable[Standing], prompt_tokens: int, hashes: Sequence[int]) -> Standing | None:
    """The instance that would finish this prompt first, by tokens owed; then fewest open, then first to join."""

    def work(s: Standing) -> tuple[int, int, int]:
        return s.owed_with(prompt_tokens, hashes), len(s.prefilling) + len(s.decoding), s.joined_order

    return min(candidates, key=work, default=None)


def most_free(candidates: Iterable[Standing], hashes: Sequence[int]) -> Standing | None:
    """The instance with the most free KV; the longer cached prefix, then the first to join, wins a tie."""
    return max(candidates, key=lambda s: (s.free_tokens, s.cached_tokens(hashes), -s.joined_order), default=None)


def overflow(
    prefill: Standing, decodes: Iterable[Standing], prompt_tokens: int, hashes: Sequence[int], margin: int
) -> Standing | None:
    """The decode instance that reads a prompt itself because the prefill pool is behind; None: it is handed off.

    ``prefill``: the shortest queue of its pool. A prompt overflows only while that owes more than ``margin`` tokens,
    and only to a decode instance that would finish it more than ``margin`` tokens earlier, since it has streams to go
    on with and reads slower, and that owes at most ``DEPTH`` margins before it. Hence

    - a decode instance takes the excess alone, and with ``DEPTH`` margins below its ``max_batch_tokens`` whatever
      overflows is let in as soon as there is room: no move waits in line there until prompts are read;
    - what is owed counts from the dispatch, not from a report: a burst spills over prompt by prompt, and neither side
      is chosen for longer than it is ahead.
    """
    if prefill.queue_tokens <= margin:
        return None
    reader = shortest_queue([s for s in decodes if s.queue_tokens <= DEPTH * margin], prompt_tokens, hashes)
    if reader is None:
        return None
    earlier = prefill.owed_with(prompt_tokens, hashes) - reader.owed_with(prompt_tokens, hashes)
    return reader if earlier > margin else None


def pair(
    prefills: Iterable[Standing],
    decodes: Sequence[Standing],
    prompt_tokens: int,
    hashes: Sequence[int],
    config: ClusterConfig,
) -> tuple[Standing, Standing, Placement]:
    """Where to prefill, where to decode, and why, of candidates that fit the request; neither list may be empty.

    A mixed instance decodes what it prefilled, so that hand-offs form no cycle. Conditional disaggregation: a prompt
    is prefilled where it decodes if it has at most ``local_prefill_tokens`` to compute, or if every prefill queue is
    behind by more than ``overflow_prefill_tokens`` (see ``overflow``); 0: never.
    """
    prefill = shortest_queue(prefills, prompt_tokens, hashes)
    assert prefill is not None
    margin, local = config.overflow_prefill_tokens, config.local_prefill_tokens
    if margin > 0 and (reader := overflow(prefill, decodes, prompt_tokens, hashes, margin)) is not None:
        return reader, reader, Placement.OVERFLOW
    if prefill.member.role is Role.MIXED:
        return prefill, prefill, Placement.COLOCATED
    decode = most_free(decodes, hashes)
    assert decode is not None
    if local > 0 and prompt_tokens - prefill.cached_tokens(hashes) <= local:
        return decode, decode, Placement.LOCAL
    return prefill, decode, Placement.DISAGGREGATED
