"""From a plan that breaks a property to a small one that breaks the same: delta debugging over the plan's parts.

Nothing is invented: clients, faults, gateways and instances are left out, rates set to zero, times, prompts and answers
cut. A candidate counts when it still breaks the same property.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

from distserve.sched.config import ClusterConfig, GatewayConfig
from tests.faults.plan import Client, Fault, Plan, Rates
from tests.faults.world import Outcome, run_plan

T = TypeVar("T")
MOST_RUNS = 400


@dataclass
class Shrunk:
    """The smallest plan found, what it came to, and how many runs that took."""

    plan: Plan
    outcome: Outcome
    runs: int


class Shrinker:
    """See the module. ``run``: what a plan comes to; ``most``: runs to spend."""

    def __init__(self, outcome: Outcome, run: Callable[[Plan], Outcome] = run_plan, most: int = MOST_RUNS) -> None:
        self.plan = outcome.plan
        self.outcome = outcome
        self.runs = 0
        self._run = run
        self._most = most

    def shrink(self) -> Shrunk:
        """Cut until nothing more can be cut or the runs are spent."""
        size: tuple[int, ...] = ()
        while size != (size := _size(self.plan)) and self.runs < self._most:
            self._cut(lambda plan: plan.clients, lambda plan, kept: replace(plan, clients=kept))
            self._cut(lambda plan: plan.faults, lambda plan, kept: replace(plan, faults=kept))
            for candidates in (_rates, _places, _shorter, _plainer):
                self._each(candidates)
        return Shrunk(self.plan, self.outcome, self.runs)

    def _still(self, plan: Plan) -> bool:
        """Whether this plan breaks the same property; if so it is the one to go on from."""
        if self.runs >= self._most:
            return False
        self.runs += 1
        outcome = self._run(plan)
        if outcome.broken is not self.outcome.broken:
            return False
        self.plan, self.outcome = plan, outcome
        return True

    def _cut(
        self, items_of: Callable[[Plan], tuple[T, ...]], with_items: Callable[[Plan, tuple[T, ...]], Plan]
    ) -> None:
        """Leave out all, halves, quarters, … single ones (ddmin)."""
        size = len(items_of(self.plan))
        while size >= 1:
            start = 0
            while start < len(items := items_of(self.plan)):
                if not self._still(with_items(self.plan, _without(items, start, size))):
                    start += size
            size //= 2

    def _each(self, candidates: Callable[[Plan], Iterator[Plan]]) -> None:
        """Try simpler plans of one kind, beginning anew from each that still fails."""
        while any(self._still(plan) for plan in candidates(self.plan)):
            if self.runs >= self._most:
                return


def _without(items: Sequence[T], start: int, count: int) -> tuple[T, ...]:
    return (*items[:start], *items[start + count :])


def _size(plan: Plan) -> tuple[int, ...]:
    tokens = sum(c.request.total_tokens for c in plan.clients)
    return len(plan.clients), len(plan.faults), len(plan.names), len(plan.rates.nonzero), tokens


def _rates(plan: Plan) -> Iterator[Plan]:
    """Less luck: all rates at zero, all but one, all but those that matter."""
    names = plan.rates.nonzero
    if names:
        yield replace(plan, rates=Rates())
    if len(names) > 1:
        yield from (replace(plan, rates=plan.rates.only(name)) for name in names)
        yield from (replace(plan, rates=replace(plan.rates, **{name: 0.0})) for name in names)


def _places(plan: Plan) -> Iterator[Plan]:
    """Fewer gateways and instances. Whoever spoke to one that is left out speaks to another."""
    if len(plan.gateways) > 1:
        for name in plan.gateways:
            kept = tuple(g for g in plan.gateways if g != name)
            moved = tuple(replace(c, gateway=kept[0]) if c.gateway == name else c for c in plan.clients)
            yield replace(plan, gateways=kept, clients=moved, faults=_faults_among(plan, name))
    for node in plan.instances:
        rest = tuple(n for n in plan.instances if n is not node)
        if any(n.role.can_prefill for n in rest) and any(n.role.can_decode for n in rest):
            yield replace(plan, instances=rest, faults=_faults_among(plan, node.name))


def _faults_among(plan: Plan, gone: str) -> tuple[Fault, ...]:
    return tuple(f for f in plan.faults if gone not in (f.target, f.other))


def _shorter(plan: Plan) -> Iterator[Plan]:
    """A shorter run, shorter faults, shorter prompts and answers, clients that stay."""
    for index, client in enumerate(plan.clients):
        for simpler in _shorter_client(client):
            yield replace(plan, clients=(*plan.clients[:index], simpler, *plan.clients[index + 1 :]))
    last = max([0.5, *(f.at + 0.1 for f in plan.faults)])
    if plan.faults_end > last + 0.5:
        yield replace(plan, faults_end=last)
        yield replace(plan, faults_end=(plan.faults_end + last) / 2)


def _shorter_client(client: Client) -> Iterator[Client]:
    request = client.request
    prompt, most = request.prompt_token_ids, request.stopping.max_tokens
    if len(prompt) > 1:
        yield replace(client, request=replace(request, prompt_token_ids=prompt[: len(prompt) // 2]))
    if most > 2:
        fewer = replace(request.stopping, max_tokens=most // 2, min_tokens=min(request.stopping.min_tokens, most // 2))
        yield replace(client, request=replace(request, stopping=fewer))
    if client.stop_at is not None:
        yield replace(client, stop_at=None)
    if client.cancel_after is not None or client.cancel_on:
        yield replace(client, cancel_after=None, cancel_on="")


def _plainer(plan: Plan) -> Iterator[Plan]:
    """Settings as they come, one clock for all."""
    if plan.skewed:
        yield replace(plan, skewed=False)
    if plan.cluster_config != ClusterConfig() or plan.gateway_config != GatewayConfig():
        yield replace(plan, cluster_config=ClusterConfig(), gateway_config=GatewayConfig())
    config = plan.instance_config
    usual = type(config)()
    for setting in fields(config):
        if getattr(config, setting.name) != getattr(usual, setting.name):
            yield replace(plan, instance_config=replace(config, **{setting.name: getattr(usual, setting.name)}))
    if plan.inline_steps:
        yield replace(plan, inline_steps=False)
    if plan.gives_up:
        yield replace(plan, gives_up=False)
