"""Dispatch without a controller: the gateway's own simple rule, from the members it last heard of (DESIGN §3)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from distserve.core.types import Endpoint, InstanceRef, Member, Role


def fewest_streams(
    members: Iterable[Member],
    streams: Mapping[InstanceRef, int],
    *,
    model: str,
    prompt_tokens: int,
    total_tokens: int,
    avoid: tuple[InstanceRef, ...],
) -> tuple[Endpoint, Endpoint] | None:
    """The members with the fewest of this gateway's streams; the first listed wins a tie. None: nobody can."""
    serving = [m for m in members if m.spec.name == model]

    def least(fitting: list[Member]) -> Member | None:
        wanted = [m for m in fitting if m.ref not in avoid] or fitting
        return min(wanted, key=lambda m: streams.get(m.ref, 0), default=None)

    def fits(member: Member) -> bool:
        need = total_tokens if member.role is Role.MIXED else prompt_tokens
        return member.role.can_prefill and member.spec.max_sequence_tokens >= need

    prefill = least([m for m in serving if fits(m)])
    if prefill is not None and prefill.role is Role.MIXED:
        return prefill.endpoint, prefill.endpoint
    decode = least([m for m in serving if m.role.can_decode and m.spec.max_sequence_tokens >= total_tokens])
    if prefill is None or decode is None:
        return None
    return prefill.endpoint, decode.endpoint
