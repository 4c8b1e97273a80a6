"""Role changes: the same instances, other roles, found by changing one at a time while it surely helps.

Knows no simulation: ``run`` says which of the same requests meet both limits under given roles. Because the requests
are the same, differences are taken pair by pair, and their error is that of the pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from distserve.core.types import Role

Roles = tuple[Role, ...]
Run = Callable[[Roles], np.ndarray]
"""Roles of the instances, in order → for each request whether it met both limits (bool, in order of arrival)."""

GAIN = 0.02
"""Least share of all requests that a change of role must bring within the limits: a change costs a drain."""

BATCHES = 20
_SIGMAS = 2.0


@dataclass(frozen=True, slots=True)
class Change:
    """One instance gets another role. ``gain``: share of requests it brings within the limits, after those before."""

    instance: str
    before: Role
    after: Role
    gain: float
    error: float


@dataclass(frozen=True, slots=True)
class Proposal:
    """``changes`` in order; none when nothing surely helps. ``tried``: role assignments simulated."""

    roles: Roles
    attainment: float
    changes: tuple[Change, ...]
    proposed: Roles
    proposed_attainment: float
    tried: int


def propose(
    names: Sequence[str], roles: Roles, kinds: Sequence[Hashable], run: Run, target: float, gain: float = GAIN
) -> Proposal:
    """Steepest ascent over single changes. ``kinds`` tells instances apart that are not alike (GPU, TP, PP): of alike
    ones with one role it does not matter which changes. Stops at ``target`` attainment: beyond it nothing is owed.
    """
    seen: dict[tuple[tuple[Role, Hashable], ...], np.ndarray] = {}

    def met(candidate: Roles) -> np.ndarray:
        key = tuple(sorted(zip(candidate, kinds, strict=True), key=repr))
        if key not in seen:
            seen[key] = run(candidate)
        return seen[key]

    now, changes = roles, []
    while met(now).mean() < target:
        steps = [_step(names, now, after, met) for after in _neighbours(now, kinds)]
        sure = [(change, after) for change, after in steps if change.gain > max(gain, _SIGMAS * change.error)]
        if not sure:
            break
        change, now = max(sure, key=lambda found: found[0].gain)
        changes.append(change)
    return Proposal(roles, float(met(roles).mean()), tuple(changes), now, float(met(now).mean()), len(seen))


def _step(names: Sequence[str], now: Roles, after: Roles, met: Run) -> tuple[Change, Roles]:
    place = next(i for i, (a, b) in enumerate(zip(now, after, strict=True)) if a != b)
    mean, error = paired(met(now), met(after))
    return Change(names[place], now[place], after[place], mean, error), after


def _neighbours(roles: Roles, kinds: Sequence[Hashable]) -> Iterator[Roles]:
    """Every assignment one change away that can still serve; one of those that are alike."""
    told: set[tuple[Role, Role, Hashable]] = set()
    for place in reversed(range(len(roles))):  # the last of its kind goes first: the first keeps its name's role
        for role in Role:
            step = (roles[place], role, kinds[place])
            after = (*roles[:place], role, *roles[place + 1 :])
            if role != roles[place] and step not in told and _serves(after):
                told.add(step)
                yield after


def _serves(roles: Roles) -> bool:
    return any(r.can_prefill for r in roles) and any(r.can_decode for r in roles)


def paired(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """Mean difference and its standard error from batch means: requests near in time share their luck."""
    difference = after.astype(float) - before.astype(float)
    batches = [float(batch.mean()) for batch in np.array_split(difference, min(BATCHES, len(difference)))]
    error = float(np.std(batches, ddof=1)) / math.sqrt(len(batches)) if len(batches) > 1 else math.inf
    return float(difference.mean()), error
