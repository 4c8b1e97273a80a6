"""Deliberate bugs, by name: each replaces one method of production code (or of the shells, where the live shells have
the same duty) inside the test process. Nothing in production knows of them.

``seeds``: within so many seeds of its profile a property must break. ``found``: a bug that the simulation once found
in earnest, brought back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from distserve.core import effects as fx
from distserve.core import events as ev
from distserve.core.types import FinishReason
from distserve.kv.ledger import BlockLedger
from distserve.kv.prefix import PrefixIndex
from distserve.kv.shape import Coverage
from distserve.sched import cluster
from distserve.sched.ahead import Ahead
from distserve.sched.arrivals import Arrivals, MoveIn
from distserve.sched.closing import Closing
from distserve.sched.cluster import ClusterState
from distserve.sched.departures import Departures, MoveOut
from distserve.sched.dispatch import most_free, shortest_queue
from distserve.sched.gateway import GatewayState
from distserve.sched.instance import InstanceState
from distserve.sched.lifecycle import OutPhase, Phase
from distserve.sched.residents import Residents
from distserve.sched.sequence import Sequence
from distserve.sched.steps import Steps
from distserve.sched.stream import Stream
from tests.faults import dataplane
from tests.faults.instances import InstanceShell
from tests.faults.wrong_steps import (
    chooses_once,
    counts_as_run,
    freed_after_the_oldest,
    newest_first,
    preempts_ahead,
    release_at_once,
    tokens_last,
    void_counts,
)

Wrong = Callable[[Any], Any]
"""From the right function to the wrong one."""


@dataclass(frozen=True)
class Breakage:
    """One deliberate bug."""

    name: str
    profile: str
    patches: tuple[tuple[Any, str, Wrong], ...]
    seeds: int = 60
    found: bool = False


@contextmanager
def switched_on(breakage: Breakage) -> Iterator[None]:
    """The bug is in this process until the end of the block."""
    right = [(owner, name, getattr(owner, name)) for owner, name, _ in breakage.patches]
    raw = [(owner, name, vars(owner)[name]) for owner, name, _ in breakage.patches]
    try:
        for (owner, name, wrong), (_, _, was) in zip(breakage.patches, right, strict=True):
            setattr(owner, name, wrong(was))
        yield
    finally:
        for owner, name, was in raw:
            setattr(owner, name, was)


def always(value: Any) -> Wrong:
    """The function that returns one value whatever it is asked."""
    return lambda right: lambda *_, **__: value


def without(*kinds: type) -> Wrong:
    """The same effects but for some kinds (of an effect, or of an event that is sent)."""

    def kept(effect: Any) -> bool:
        return not isinstance(effect, kinds) and not (isinstance(effect, fx.Send) and isinstance(effect.event, kinds))

    def wrong(right: Any) -> Any:
        def method(*args: Any, **named: Any) -> Any:
            out = right(*args, **named)
            if isinstance(out, tuple):
                return out[0], [e for e in out[1] if kept(e)]
            return [e for e in out if kept(e)]

        return method

    return wrong


# ── the wrong methods that need more than a line ─────────────────────────────────────────────────────────────────────


def free_shared_too(right: Any) -> Any:
    def release(self: BlockLedger, owner: str) -> None:
        holding = self._holdings.pop(owner)
        self._index.release(holding.chain)
        self._groups.give(holding.blocks)

    return release


def keep_reservation(right: Any) -> Any:
    def end(self: Arrivals, move: MoveIn, reason: str, now: float, *, retriable: bool = True) -> list[fx.Effect]:
        kept, self.residents.ledger.release = self.residents.ledger.release, lambda owner: None  # type: ignore
        try:
            return right(self, move, reason, now, retriable=retriable)  # type: ignore[no-any-return]
        finally:
            self.residents.ledger.release = kept  # type: ignore[method-assign]

    return end


def reserve_again(right: Any) -> Any:
    def asked(self: Arrivals, event: ev.ReserveAsked, order: int, now: float) -> list[fx.Effect]:
        self.moves.pop(event.move_id, None)
        return right(self, event, order, now)  # type: ignore[no-any-return]

    return asked


def adopt_and_keep(right: Any) -> Any:
    def commit(self: Arrivals, move: MoveIn, now: float) -> Any:
        out = right(self, move, now)
        if out[0] is not None:
            self.moves[move.id] = move
            self.tombstones.pop(move.id)
        return out

    return commit


def same_epoch(right: Any) -> Any:
    def commit(self: Arrivals, move: MoveIn, now: float) -> Any:
        sequence, effects = right(self, move, now)
        if sequence is not None:
            sequence.epoch -= 1
        return sequence, effects

    return commit


def let_go_on_silence(right: Any) -> Any:
    def expired(self: Departures, move: MoveOut, now: float) -> list[fx.Effect]:
        if move.phase is not OutPhase.COMMITTING:
            return right(self, move, now)  # type: ignore[no-any-return]
        effects = self.end(move, "committed", tell=False)
        self.residents.drop(move.sequence)
        return effects

    return expired


def let_go_when_sent(right: Any) -> Any:
    def sent(self: Departures, event: ev.StageSent, now: float) -> list[fx.Effect]:
        move = self.moves.get(event.move_id)
        effects = right(self, event, now)
        if move is not None and move.phase is OutPhase.COMMITTING and move.acknowledged.covers(0, move.total):
            self.residents.drop(move.sequence)
            effects += self.end(move, "sent", tell=False)
        return effects  # type: ignore[no-any-return]

    return sent


def by_arrival(right: Any) -> Any:
    return lambda self, source, epoch, first, tokens, now: right(self, source, epoch, len(self.delivered), tokens, now)


def one_holder(right: Any) -> Any:
    return lambda self: right(self)[:1]


def no_repeats(right: Any) -> Any:
    def tick(self: Departures, now: float) -> list[fx.Effect]:
        for move in self.moves.values():
            move.repeat_at = max(move.repeat_at, now + 3.0)
        return right(self, now)  # type: ignore[no-any-return]

    return tick


def silent_closing(right: Any) -> Any:
    def tick(self: Closing, now: float) -> list[fx.Effect]:
        right(self, now)
        return []

    return tick


def never_superseded(right: Any) -> Any:
    def forget(self: InstanceState, request_id: str, epoch: int, reason: str, now: float) -> list[fx.Effect]:
        return [] if reason == "superseded" else right(self, request_id, epoch, reason, now)

    return forget


def only_sequences(right: Any) -> Any:
    def forget(self: InstanceState, request_id: str, epoch: int, reason: str, now: float) -> list[fx.Effect]:
        sequence = self.residents.sequences.get(request_id)
        return self._drop(sequence, reason) if sequence is not None and sequence.epoch <= epoch else []

    return forget


def only_when_asked(right: Any) -> Any:
    def handle(self: InstanceState, event: Any, now: float) -> list[fx.Effect]:
        effects = self._on(event, now)
        if isinstance(event, ev.Submit | ev.ReserveAsked):
            effects += self._let_in(now)
        return effects + self.steps.next(now)

    return handle


def mixed_hand_off(right: Any) -> Any:
    def pair(prefills: Any, decodes: Any, prompt_tokens: int, hashes: Any, config: Any) -> Any:
        prefill = shortest_queue(prefills, prompt_tokens, hashes)
        others = [d for d in decodes if d is not prefill]
        return prefill, most_free(others, hashes) or prefill, None

    return pair


def preempt_anybody(right: Any) -> Any:
    def secure(self: Residents, sequence: Sequence, need: int) -> bool:
        while sequence.phase in (Phase.PREFILL, Phase.DECODE):
            if self.ledger.grow(sequence.owner, need):
                return True
            if len(self.running) < 2:
                return False
            self._preempt(self.running[-1])
        return False

    return secure


def all_tokens_published(right: Any) -> Any:
    def drop(self: Residents, sequence: Sequence) -> None:
        if self.ledger.holds(sequence.owner):
            sequence.computed = min(len(sequence.tokens), self.ledger.capacity(sequence.owner))
        right(self, sequence)

    return drop


def early_kv(right: Any) -> Any:
    def pump(self: Departures, sequence: Sequence, now: float) -> list[fx.Effect]:
        computed = sequence.computed
        if sequence.phase is Phase.PREFILL:
            sequence.computed = min(len(sequence.tokens), computed + self.residents.spec.block_size)
        try:
            return right(self, sequence, now)  # type: ignore[no-any-return]
        finally:
            sequence.computed = computed

    return pump


def forget_move_at_end(right: Any) -> Any:
    def finish(self: Steps, sequence: Sequence) -> list[fx.Effect]:
        self.residents.drop(sequence)
        return []

    return finish


def grow_too_little(right: Any) -> Any:
    return lambda self, owner, need_tokens: right(self, owner, need_tokens - 1)


def wait_without_bound(right: Any) -> Any:
    def wait(self: Arrivals, move: MoveIn, timeout_s: float, now: float) -> None:
        move.expires_at = now + timeout_s

    return wait


def stages_in_order(right: Any) -> Any:
    def stored(self: Arrivals, event: ev.StageStored, now: float) -> Any:
        move = self.moves.get(event.move_id)
        if move is not None and not move.stored.covers(0, event.start):
            return None, []
        return right(self, event, now)

    return stored


def any_list(right: Any) -> Any:
    def changed(self: GatewayState, event: ev.MembersChanged, now: float) -> list[fx.Effect]:
        self._members_version = -1
        return right(self, event, now)  # type: ignore[no-any-return]

    return changed


def whole_prompt_cached(right: Any) -> Any:
    return lambda self, owner, tokens, need, state, limit: right(self, owner, tokens, need, state, len(tokens))


def never_forgets(right: Any) -> Any:
    def tick(self: Arrivals, now: float) -> list[fx.Effect]:
        for move_id, stone in list(self.tombstones.items()):
            if stone.until <= now:
                self.tombstones[move_id] = replace(stone, until=now + self.config.tombstone_s)
        return right(self, now)  # type: ignore[no-any-return]

    return tick


def bypass_only_by_timeout(right: Any) -> Any:
    def lost(self: GatewayState, event: Any, now: float) -> list[fx.Effect]:
        if isinstance(event, ev.ControllerLost):
            self.controller = False
            return []
        return right(self, event, now)  # type: ignore[no-any-return]

    return lost


def plain_loss(right: Any) -> Any:
    def lost(self: GatewayState, ref: Any, why: str, now: float) -> list[fx.Effect]:
        self.connected.pop(ref, None)
        return []

    return lost


def gateway_merely_noted(right: Any) -> Any:
    def lost(self: InstanceState, gateway: Any, now: float) -> list[fx.Effect]:
        self.gateways.pop(gateway, None)
        return []

    return lost


def publish_beside_others(right: Any) -> Any:
    """As it was: a holder went on through entries that others hold, and kept their blocks from use."""
    return lambda self, chain, tokens, table, *, leaving: right(self, chain, tokens, table, leaving=True)


def cancelled_is_silent(right: Any) -> Any:
    def cancelled(self: GatewayState, request_id: str, finish: FinishReason, now: float) -> list[fx.Effect]:
        effects = right(self, request_id, finish, now)
        return [e for e in effects if not (isinstance(e, fx.Send) and isinstance(e.event, ev.Abandon))]

    return cancelled


def opens_all(right: Any) -> Any:
    return lambda self, move_id, event: self.moves.get(move_id)


BREAKAGES: tuple[Breakage, ...] = (
    Breakage("commits before the KV has come", "data", ((Coverage, "covers", always(True)),)),
    Breakage("skips the epoch check", "forget", ((Stream, "is_current", always(True)),)),
    Breakage("takes tokens by arrival, not by index", "noise", ((Stream, "take", by_arrival),)),
    Breakage("keeps the epoch when the owner changes", "calm", ((Arrivals, "_commit_if_whole", same_epoch),)),
    Breakage("commit is not idempotent", "noise", ((Arrivals, "_commit_if_whole", adopt_and_keep),)),
    Breakage("a repeated ask reserves again", "noise", ((Arrivals, "asked", reserve_again),)),
    Breakage("source lets go on silence", "noise", ((Departures, "_expired", let_go_on_silence),), 200),
    Breakage("source lets go when all is sent", "noise", ((Departures, "sent", let_go_when_sent),)),
    Breakage("source keeps what is owned elsewhere", "calm", ((Departures, "committed", always([])),)),
    Breakage("abandoning tells one holder only", "crash", ((Stream, "holders", one_holder),)),
    Breakage("abandoning tells nobody", "calm", ((Closing, "open", always([])),)),
    Breakage("a cancel tells nobody", "calm", ((GatewayState, "_cancelled", cancelled_is_silent),)),
    Breakage("an abandonment is told once", "forget", ((Closing, "tick", silent_closing),)),
    Breakage("an abandonment is not acknowledged", "calm", ((InstanceState, "_abandon", without(ev.Abandoned)),)),
    Breakage("an abandonment forgets the moves", "storm", ((InstanceState, "_forget", only_sequences),), 200),
    Breakage("a cancel forgets the reservation", "calm", ((Arrivals, "end", keep_reservation),)),
    Breakage("frees what others share", "calm", ((BlockLedger, "release", free_shared_too),)),
    Breakage("frees blocks that a step writes", "noise", ((Residents, "_release", release_at_once),)),
    Breakage("writes past its blocks", "calm", ((BlockLedger, "grow", grow_too_little),)),
    Breakage("takes the whole prompt from the cache", "calm", ((BlockLedger, "admit", whole_prompt_cached),)),
    Breakage("publishes what is not computed", "calm", ((Residents, "drop", all_tokens_published),)),
    Breakage("keeps a ticket of a move that is over", "storm", ((Departures, "granted", without(ev.MoveEnded)),), 200),
    Breakage("closes no ticket", "calm", ((Arrivals, "end", without(fx.CloseTicket)),)),
    Breakage("aborts no stage", "noise", ((Departures, "end", without(fx.AbortSend)),), 200),
    Breakage("data plane takes any ticket", "data", ((InstanceShell, "admits", always(True)),)),
    Breakage("data plane checks no sum", "data", ((dataplane, "sound", always(True)),)),
    Breakage("leases have no timer", "calm", ((Arrivals, "next_deadline", always(None)),)),
    Breakage("asks and commits once", "noise", ((Departures, "tick", no_repeats),)),
    Breakage("does not say that it owns", "calm", ((Arrivals, "_commit_if_whole", without(ev.Committed)),)),
    Breakage("lets nobody in when blocks come free", "calm", ((InstanceState, "handle", only_when_asked),)),
    Breakage("a finished sequence leaves its move", "calm", ((Steps, "_finish", forget_move_at_end),)),
    Breakage("first token waits for its KV", "calm", ((Steps, "done", tokens_last),)),
    Breakage("a step given up is never over", "calm", ((Steps, "abandoned", always([])),)),
    Breakage("a step given up counts as run", "calm", ((Steps, "abandoned", counts_as_run),)),
    Breakage("frees blocks that a later step writes", "calm", ((Residents, "_release", freed_after_the_oldest),)),
    Breakage("preempts while steps are outstanding", "calm", ((Ahead, "choose", preempts_ahead),)),
    Breakage("takes outcomes out of order", "calm", ((Steps, "_answered", newest_first),)),
    Breakage("goes on from a step that did not end", "calm", ((Steps, "_void", void_counts),)),
    Breakage("follows a token that ends the sequence", "calm", ((Ahead, "_is_over", always(False)),)),
    Breakage("follows a token that penalties read", "calm", ((Ahead, "_needs_token", always(False)),)),
    Breakage(
        "plans a sequence as if nothing were outstanding",
        "calm",
        ((Sequence, "planned", lambda _: property(lambda self: self.computed)),),
    ),
    Breakage("tombstones last for ever", "calm", ((Arrivals, "tick", never_forgets),)),
    Breakage("a lost gateway is merely noted", "crash", ((InstanceState, "_gateway_lost", gateway_merely_noted),)),
    Breakage("a lost source is not noticed", "crash", ((Arrivals, "peer_lost", always([])),)),
    Breakage("a lost destination is not noticed", "crash", ((Departures, "peer_lost", always([])),)),
    Breakage("a lost instance is merely noted", "crash", ((GatewayState, "_instance_lost", plain_loss),)),
    Breakage("a lost controller is merely noted", "crash", ((GatewayState, "_on_parties", bypass_only_by_timeout),)),
    Breakage("the controller ends no lease", "stall", ((ClusterState, "next_deadline", always(None)),)),
    Breakage("the controller is not told of ends", "calm", ((GatewayState, "_leave", without(ev.RequestEnded)),)),
    Breakage("heartbeats from the step loop", "stall", ((InstanceShell, "beats", lambda _: InstanceShell.ready),), 200),
    Breakage("mixed instances hand off to each other", "calm", ((cluster, "pair", mixed_hand_off),), 200),
    # what the simulation found in earnest, brought back
    Breakage("a late submit runs again", "noise", ((InstanceState, "_was_submitted", always(False)),), found=True),
    Breakage("stages must come in order", "calm", ((Arrivals, "stored", stages_in_order),), 200, found=True),
    Breakage(
        "the commit's time runs while stages fly",
        "calm",
        ((MoveOut, "deadline_at", lambda _: property(lambda self: self.deadline)),),
        200,
        found=True,
    ),
    Breakage(
        "a commit of a move given up is unheard", "data", ((Departures, "_successor", always(None)),), 200, found=True
    ),
    Breakage("an owner is asked to own again", "forget", ((Arrivals, "over", always(None)),), 200, found=True),
    Breakage(
        "old attempts live on beside new", "forget", ((InstanceState, "_forget", never_superseded),), 400, found=True
    ),
    Breakage("an old ask ends a newer attempt", "forget", ((InstanceState, "_epochs", always([])),), 400, found=True),
    Breakage("an ask nobody repeats stands", "noise", ((Arrivals, "_wait", wait_without_bound),), found=True),
    Breakage(
        "cached copies are held beside own blocks",
        "calm",
        ((PrefixIndex, "extend", publish_beside_others),),
        400,
        found=True,
    ),
    Breakage("any member list is believed", "churn", ((GatewayState, "_members_changed", any_list),), 400, found=True),
    Breakage("a share that gave way leaves none", "calm", ((Ahead, "choose", chooses_once),), 100, found=True),
    Breakage("sends KV that is not computed", "calm", ((Departures, "pump", early_kv),), found=True),
)

BY_NAME = {breakage.name: breakage for breakage in BREAKAGES}
