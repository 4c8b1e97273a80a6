"""Members, leases, dispatch and admission: the controller's machine (DESIGN §3, §4).

Soft state only: everything here is rebuilt from joins and reports, and no token passes through it. Changed by
``handle`` alone.
"""

from __future__ import annotations

from collections import deque

from distserve.core.effects import Effect, Send
from distserve.core.events import (
    ClusterEvent,
    DispatchAsked,
    Dispatched,
    DispatchRefused,
    GatewayJoined,
    GatewayLeft,
    InstanceLeft,
    JoinAsked,
    Joined,
    JoinRefused,
    MembersChanged,
    PrefillFinished,
    Reported,
    RequestEnded,
    Tick,
    Welcomed,
)
from distserve.core.types import Code, GatewayRef, InstanceRef, Member, Placement, Role, attempt_of
from distserve.sched.config import ClusterConfig
from distserve.sched.dispatch import Standing, pair

LATE_SHARE = 0.25
"""A tick that comes by this share of a lease too late says that this process did not run meanwhile. Members report
three times a lease, so half a lease is then enough to hear of everybody who lives."""


class ClusterState:
    """See the module."""

    def __init__(self, config: ClusterConfig | None = None) -> None:
        self.config = config or ClusterConfig()
        self.members: dict[str, Standing] = {}  # by instance id, in order of joining
        self.gateways: dict[GatewayRef, None] = {}
        self.version = 0
        self.ignored = 0
        self.refused: dict[Code, int] = {}
        self._lost: deque[InstanceRef] = deque(maxlen=self.config.lost_memory)
        self._open: dict[str, tuple[GatewayRef, InstanceRef, InstanceRef]] = {}  # _key → gateway, prefill, decode
        self._joins = 0

    # ── the one door ─────────────────────────────────────────────────────────────────────────────────────────────────

    def handle(self, event: ClusterEvent, now: float) -> list[Effect]:
        match event:
            case DispatchAsked():
                return self._dispatch(event)
            case PrefillFinished(gateway, request_id, _):
                return self._prefilled(_key(gateway, request_id))
            case RequestEnded(gateway, request_id):
                self._close(_key(gateway, request_id))
                return []
            case Reported(ref, load):
                standing = self._standing(ref)
                if standing is None:
                    return [*self._ignore(), Send(ref, JoinAsked())]
                standing.load, standing.heard_at = load, now
                return []
            case Joined():
                return self._join(event, now)
            case InstanceLeft(ref, _):
                return self._leave(ref)
            case GatewayJoined(gateway):
                self._close_all(gateway)
                self.gateways[gateway] = None
                return [Send(gateway, self._members_now())]
            case GatewayLeft(gateway):
                self.gateways.pop(gateway, None)
                self._close_all(gateway)
                return []
            case Tick():
                return self._tick(now)

    def _tick(self, now: float) -> list[Effect]:
        """Who was silent for a lease is dead; unless the tick itself is late: then it was we who did not listen."""
        lease_s = self.config.lease_s
        due = self.next_deadline()
        if due is not None and now > due + LATE_SHARE * lease_s:
            for standing in self.members.values():
                standing.heard_at = max(standing.heard_at, now - lease_s / 2)
            return []
        silent = [s.member.ref for s in self.members.values() if now >= s.heard_at + lease_s]
        return [effect for ref in silent for effect in self._leave(ref)]

    def _ignore(self) -> list[Effect]:
        self.ignored += 1
        return []

    # ── membership ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _standing(self, ref: InstanceRef) -> Standing | None:
        standing = self.members.get(ref.id)
        return standing if standing is not None and standing.member.ref == ref else None

    def _join(self, event: Joined, now: float) -> list[Effect]:
        member = event.member
        known = self.members.get(member.ref.id)
        if known is not None and known.member.ref.incarnation == member.ref.incarnation:
            known.member, known.load, known.heard_at = member, event.load, now
            return [Send(member.ref, Welcomed(self.config.lease_s)), Send(member.ref, self._members_now())]
        if reason := self._join_problem(member, known):
            return [Send(member.ref, JoinRefused(reason))]
        effects = self._leave(known.member.ref, announce=False) if known is not None else []
        self._joins += 1
        if member.ref in self._lost:  # silent for a while, but the same life
            self._lost.remove(member.ref)
        self.members[member.ref.id] = Standing(member, event.load, self._joins, now)
        effects.append(Send(member.ref, Welcomed(self.config.lease_s)))
        return effects + self._announce()

    def _join_problem(self, member: Member, known: Standing | None) -> str:
        """Why this life may not join; empty when it may. A sentence that names both sides."""
        if known is not None and known.member.ref.incarnation > member.ref.incarnation:
            return f"{member.ref} is an earlier life than {known.member.ref}, which is here; give it another id"
        mine = self.config.version
        if mine and member.version != mine:
            return f"{member.ref} speaks version {member.version!r}, this controller speaks {mine!r}"
        for other in self.members.values():
            if other is known or other.member.spec.name != member.spec.name:
                continue
            if other.member.spec.fingerprint != member.spec.fingerprint:
                theirs = f"{other.member.ref} serves {other.member.spec.fingerprint}"
                return (
                    f"{member.ref} serves {member.spec.name!r} with weights {member.spec.fingerprint}, but {theirs}"
                    f" under that name; KV cannot move between them"
                )
            if other.member.spec.kv_dtype != member.spec.kv_dtype:
                return (
                    f"{member.ref} keeps KV in {member.spec.kv_dtype}, but {other.member.ref} in "
                    f"{other.member.spec.kv_dtype}; start both with the same --kv-cache-dtype"
                )
        return ""

    def _leave(self, ref: InstanceRef, *, announce: bool = True) -> list[Effect]:
        if self._standing(ref) is None:
            return self._ignore()
        del self.members[ref.id]
        self._lost.append(ref)
        return self._announce() if announce else []

    def _members_now(self) -> MembersChanged:
        return MembersChanged(self.version, tuple(s.member for s in self.members.values()), tuple(self._lost))

    def _announce(self) -> list[Effect]:
        self.version += 1
        changed = self._members_now()
        return [
            *(Send(g, changed) for g in self.gateways),
            *(Send(s.member.ref, changed) for s in self.members.values()),
        ]

    # ── dispatch ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _dispatch(self, event: DispatchAsked) -> list[Effect]:
        key = _key(event.gateway, event.request_id)
        self._close(key)
        choice = self._choose(event)
        if isinstance(choice, DispatchRefused):
            self.refused[choice.code] = self.refused.get(choice.code, 0) + 1
            return [Send(event.gateway, choice)]
        prefill, decode, placement = choice
        prefill.send_prompt(key, event.prompt_tokens)
        decode.send_decode(key, event.total_tokens)
        for reader in (prefill, decode) if self.config.overflow_prefill_tokens else (prefill,):
            reader.remember(event.prefix_hashes, self.config.affinity_runs)
        self._open[key] = (event.gateway, prefill.member.ref, decode.member.ref)
        endpoints = prefill.member.endpoint, decode.member.endpoint
        return [Send(event.gateway, Dispatched(event.request_id, event.epoch, *endpoints, placement))]

    def _choose(self, event: DispatchAsked) -> tuple[Standing, Standing, Placement] | DispatchRefused:
        """A prefill and a decode member for an attempt. Those to avoid are used only when nobody else is there."""
        serving = [s for s in self.members.values() if s.member.spec.name == event.model]
        prefills = [s for s in serving if s.member.role.can_prefill]
        decodes = [s for s in serving if s.member.role.can_decode]
        if not prefills or not decodes:
            missing = "prefill" if not prefills else "decode"
            message = f"no instance that can {missing} {event.model!r} is in the cluster; try again shortly"
            return self._refuse(event, Code.UNAVAILABLE, message)
        largest = max(s.member.spec.max_sequence_tokens for s in decodes)
        decodes = [s for s in decodes if s.member.spec.max_sequence_tokens >= event.total_tokens]
        prefills = [s for s in prefills if self._can_prefill(s, event)]
        if not prefills or not decodes:
            message = f"the request needs room for {event.total_tokens} tokens; the largest instance holds {largest}"
            return self._refuse(event, Code.INVALID_ARGUMENT, message)
        if first_attempt(event) and (problem := self._overload(prefills)):
            return self._refuse(event, Code.RESOURCE_EXHAUSTED, problem)
        prefills = [s for s in prefills if s.member.ref not in event.avoid] or prefills
        decodes = [s for s in decodes if s.member.ref not in event.avoid] or decodes
        return pair(prefills, decodes, event.prompt_tokens, event.prefix_hashes, self.config)

    def _can_prefill(self, standing: Standing, event: DispatchAsked) -> bool:
        spec = standing.member.spec
        need = event.total_tokens if standing.member.role is Role.MIXED else event.prompt_tokens
        return spec.max_sequence_tokens >= need

    def _overload(self, prefills: list[Standing]) -> str:
        """Why a new request is not admitted; empty when it is. Resumed requests were admitted once and stay so."""
        config = self.config
        if len(self._open) >= config.max_open_requests:
            return f"{len(self._open)} requests are in the cluster, its limit; try again shortly"
        if all(s.queue_tokens >= config.max_queued_tokens for s in prefills):
            return f"every prefill queue holds {config.max_queued_tokens} tokens or more; try again shortly"
        return ""

    def _refuse(self, event: DispatchAsked, code: Code, message: str) -> DispatchRefused:
        return DispatchRefused(event.request_id, event.epoch, code, message, self.config.retry_after_s)

    # ── open requests ────────────────────────────────────────────────────────────────────────────────────────────────

    def _prefilled(self, key: str) -> list[Effect]:
        entry = self._open.get(key)
        standing = self._standing(entry[1]) if entry is not None else None
        if standing is None:
            return self._ignore()
        standing.prefilled(key)
        return []

    def _close(self, key: str) -> None:
        entry = self._open.pop(key, None)
        if entry is None:
            return
        for ref in entry[1:]:
            standing = self._standing(ref)
            if standing is not None:
                standing.close(key)

    def _close_all(self, gateway: GatewayRef) -> None:
        for key in [k for k, entry in self._open.items() if entry[0] == gateway]:
            self._close(key)

    # ── views ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def next_deadline(self) -> float | None:
        return min((s.heard_at + self.config.lease_s for s in self.members.values()), default=None)

    @property
    def open_requests(self) -> int:
        return len(self._open)

    def check(self) -> None:
        """Raise if an open request is counted where it is not, or not where it is."""
        for standing in self.members.values():
            for key in [*standing.prefilling, *standing.decoding]:
                if standing.member.ref not in self._open.get(key, ()):
                    raise AssertionError(f"{standing.member.ref} counts {key}, which is not open there")
            sums = sum(standing.prefilling.values()), sum(standing.decoding.values())
            if sums != (standing.owed, standing.held):
                raise AssertionError(f"{standing.member.ref}: totals {standing.owed}, {standing.held}; sums {sums}")


def _key(gateway: GatewayRef, request_id: str) -> str:
    """Request ids are unique within a gateway only."""
    return f"{gateway}/{request_id}"


def first_attempt(event: DispatchAsked) -> bool:
    """Whether a request has not been dispatched before."""
    return attempt_of(event.epoch) <= 1
