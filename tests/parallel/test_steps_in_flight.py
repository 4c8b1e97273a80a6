"""A pipeline has a step for each stage in flight: disjoint ones, which the order of events shows. Real processes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from distserve.core.effects import RunStep
from distserve.core.events import StepDone
from distserve.core.types import Role, StepPlan
from distserve.observe.journal import read, replay
from tests.oracle import Oracle
from tests.parallel.test_cluster import check, prompts
from tests.shells.cluster import answer, cluster, request
from tests.shells.test_life import fresh_machine
from tests.tiny_models import make_tiny

P, D = Role.PREFILL, Role.DECODE


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def oracle(model: Path) -> Oracle:
    return Oracle(model)


def together(path: Path) -> list[list[StepPlan]]:
    """The steps that were outstanding after each plan, oldest first; checks that they end in order."""
    outstanding: list[StepPlan] = []
    found = []
    for entry in read(path):
        if isinstance(entry.event, StepDone):
            assert entry.event.number == outstanding.pop(0).number
        for plan in [e.plan for e in entry.effects if isinstance(e, RunStep)]:
            outstanding.append(plan)
            found.append(list(outstanding))
    return found


async def test_stages_work_on_disjoint_batches_at_once(model: Path, oracle: Oracle, tmp_path: Path) -> None:
    """On both sides two stages; prompts are handed off in chunks while the next chunk is on its way through."""
    settings = {P: {"pp": 2, "machine": {"prefill_chunk": 32}}, D: {"pp": 2}}
    async with cluster(model, P, D, transfer="shm", by_role=settings, journals=tmp_path) as held:
        await check(held, oracle, 1)
        long = [(f"l{i}", p) for i, p in enumerate(prompts(2))]
        work = (answer(held.shell, request(name, p, 60)) for name, p in long)
        for (_, prompt), (tokens, _) in zip(long, await asyncio.gather(*work), strict=True):
            assert tokens == oracle(prompt, 60)
        await held.clean()
    for name in ("prefill-0", "decode-1"):
        path = tmp_path / f"{name}.jsonl"
        assert replay(path, fresh_machine) > 10
        pairs = [steps for steps in together(path) if len(steps) > 1]
        assert len(pairs) > 10
        assert max(map(len, pairs)) == 2
        for first, second in pairs:
            ends = {i.request_id: i.start + len(i.token_ids) for i in first.items if not i.sample}
            assert not any(item.follows for item in (*first.items, *second.items))
            for item in second.items:
                known = ends.get(item.request_id)
                assert known == item.start or item.request_id not in {i.request_id for i in first.items}
