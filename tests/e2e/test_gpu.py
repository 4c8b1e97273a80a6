"""A cluster on one GPU, in real processes: what an answer is does not depend on where its KV was made, how it moved,
how many steps were in flight, or whether steps were recorded. Requests come one by one: every step has one shape.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from distserve.core.types import Role
from tests.e2e.test_path_equality import prompts
from tests.shells.cluster import answer, cluster, request
from tests.tiny_models import make_tiny

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
P, D, M = Role.PREFILL, Role.DECODE, Role.MIXED
OUTPUT = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("tiny"))


def answers(model: Path, roles: Sequence[Role], **settings: Any) -> tuple[list[list[int]], list[int]]:
    """The tokens of every prompt, and the bytes of KV that each moved."""

    async def ask() -> tuple[list[list[int]], list[int]]:
        tokens, moved = [], []
        async with cluster(model, *roles, device="cuda", **settings) as held:
            for i, prompt in enumerate(prompts()):
                found, end = await answer(held.shell, request(f"r{i}", prompt, OUTPUT))
                tokens.append(found)
                moved.append(end.account.timings.kv_bytes_moved)
            await held.clean()
        return tokens, moved

    return asyncio.run(ask())


@pytest.fixture(scope="module")
def alone(model: Path) -> list[list[int]]:
    """What one mixed instance answers, a step at a time and unrecorded."""
    tokens, moved = answers(model, [M], steps_in_flight=1, cuda_graphs="off")
    assert not any(moved)
    assert len({token for each in tokens for token in each}) > 10
    return tokens


@pytest.mark.parametrize("transfer", ["ipc", "shm", "gloo"])
def test_a_handed_off_answer_is_the_one_of_a_single_instance(
    model: Path, alone: list[list[int]], transfer: str
) -> None:
    tokens, moved = answers(model, [P, D], transfer=transfer, steps_in_flight=1, cuda_graphs="off")
    assert tokens == alone and all(moved)


def test_auto_between_two_processes_of_a_gpu(model: Path, alone: list[list[int]]) -> None:
    """As it is shipped: steps in flight, graphs, and the way KV moves, all chosen by itself."""
    tokens, moved = answers(model, [P, D], transfer="auto")
    assert tokens == alone and all(moved)


@pytest.mark.parametrize(("steps_in_flight", "cuda_graphs"), [(2, "off"), (1, "auto"), (2, "auto")])
def test_steps_in_flight_and_graphs_change_no_token(
    model: Path, alone: list[list[int]], steps_in_flight: int, cuda_graphs: str
) -> None:
    tokens, _ = answers(model, [M], steps_in_flight=steps_in_flight, cuda_graphs=cuda_graphs)
    assert tokens == alone
