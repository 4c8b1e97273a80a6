"""Cuts a step into micro-batches, so that the stages of a pipeline work at the same time (GPipe, arXiv 1811.06965).

With m micro-batches over p stages a step takes (m + p - 1) / m of the time that its work needs on busy stages. Below
some tokens a pass takes as long as reading the weights, however small it is: there, cutting would only add passes.
"""

from __future__ import annotations

from dataclasses import replace

from distserve.core.types import StepItem, StepPlan

LEAST_TOKENS = 64
"""A micro-batch holds at least so many; about where a forward pass becomes bound by arithmetic."""

PER_STAGE = 2
"""Micro-batches for each stage, at most: four of them on two stages leave a fifth of the time idle."""


def cut_step(plan: StepPlan, stages: int, least: int = LEAST_TOKENS) -> list[StepPlan]:
    """``plan`` in parts of about equal tokens, in order; a prompt chunk may be cut, for its parts run in order too.

    Every stage that runs them one after the other writes the same KV, and samples for the same items in the same
    order, as for the whole plan.
    """
    tokens = plan.tokens
    count = min(stages * PER_STAGE, tokens // least) if stages > 1 else 1
    if count < 2:
        return [plan]
    parts: list[list[StepItem]] = [[]]
    done, part = 0, 1
    for item in plan.items:
        rest: StepItem | None = item
        while rest is not None:
            room = tokens * part // count - done
            head, rest = _split(rest, room)
            parts[-1].append(head)
            done += len(head.token_ids)
            if done == tokens * part // count and part < count:
                parts.append([])
                part += 1
    return [StepPlan(plan.number, tuple(items)) for items in parts]


def _split(item: StepItem, room: int) -> tuple[StepItem, StepItem | None]:
    """The first ``room`` tokens of an item, which sample nothing, and the rest."""
    if len(item.token_ids) <= room:
        return item, None
    head = replace(item, token_ids=item.token_ids[:room], sample=False)
    return head, replace(item, start=item.start + room, token_ids=item.token_ids[room:])
