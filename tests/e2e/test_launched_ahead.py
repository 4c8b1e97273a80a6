"""A cluster whose instance runs what a GPU runs, interpreted on the CPU: Triton's kernels, and steps launched ahead of
the host that take their tokens from the step before. Tokens are those of transformers, and followers there really were.

One instance: Triton's interpreter serves one thread of a process.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from distserve.core.effects import RunStep
from distserve.core.types import Role
from distserve.observe.journal import read
from tests.e2e.inprocess import all_free, cluster
from tests.oracle import Oracle
from tests.shells.cluster import answer, request
from tests.tiny_models import make_tiny

pytest.importorskip("triton", reason="triton is not installed: pip install 'distserve[dev]' has it on Linux")
OUTPUT = 6


async def test_tokens_with_followers_are_those_of_transformers(tmp_path: Path) -> None:
    model = make_tiny("llama", tmp_path / "tiny", num_hidden_layers=2)
    oracle = Oracle(model)
    asked = [[5, 9, 11, 20, 7], [30 + i for i in range(19)]]
    async with cluster(
        model,
        (Role.MIXED,),
        transfer="shm",
        journals=tmp_path,
        kernels="triton",
        steps_in_flight=2,
        max_model_len=256,
    ) as running:
        work = (answer(running.shell, request(f"r{i}", prompt, OUTPUT)) for i, prompt in enumerate(asked))
        for prompt, (tokens, _) in zip(asked, await asyncio.gather(*work), strict=True):
            assert tokens == oracle(prompt, OUTPUT)
        await all_free(running)
    assert followers(tmp_path / "mixed-0.jsonl") > 0


def followers(journal: Path) -> int:
    """Items of an instance's steps that were planned before their token was known."""
    plans = [effect.plan for entry in read(journal) for effect in entry.effects if isinstance(effect, RunStep)]
    return sum(item.follows for plan in plans for item in plan.items)
