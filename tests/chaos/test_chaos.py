"""A short chaos run in the normal suite: every kind of fault has its place in ``make chaos``, here a few of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from distserve.core.types import Role
from tests.chaos.__main__ import document, table
from tests.chaos.faults import CLIENT_KINDS, WEIGHTS, plan
from tests.chaos.run import Scenario, chaos
from tests.tiny_models import make_tiny

SHORT = Scenario(
    seed=5, requests=40, faults=9, concurrency=8, prompts=6, roles=(Role.PREFILL, Role.DECODE, Role.MIXED), gateways=2
)


@pytest.mark.timeout(300)
async def test_a_short_run_keeps_every_promise(tmp_path: Path) -> None:
    verdict = await chaos(SHORT, make_tiny("llama", tmp_path))
    assert verdict.problems == [], table(verdict)
    assert verdict.outcomes.total() >= SHORT.requests
    assert verdict.faults.total() == SHORT.faults
    assert verdict.moved_bytes > 0, "KV really went from instance to instance"
    assert json.loads(json.dumps(document(verdict)))["fault_count"] == SHORT.faults


def test_a_seed_gives_the_same_faults_at_the_same_tokens_and_another_gives_others() -> None:
    assert plan(1, 1000, 225) == plan(1, 1000, 225)
    assert plan(1, 1000, 225) != plan(2, 1000, 225)
    assert {f.kind for f in plan(1, 1000, 225)} == set(WEIGHTS)
    assert len({f.kind for f in plan(SHORT.seed, SHORT.requests, SHORT.faults)} - set(CLIENT_KINDS)) >= 5
    assert dataclasses.replace(SHORT, seed=6) != SHORT
