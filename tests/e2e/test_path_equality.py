"""Path equality (DESIGN §7): in float32 greedy tokens are those of transformers, whatever way they took.

Every family × every layout × both links, requests sent concurrently. A test that claims the P→D path asserts that KV
bytes really moved, and at the end every block is free.
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from distserve.core.types import Role
from distserve.sched.config import ClusterConfig, InstanceConfig
from tests.e2e.inprocess import all_free, cluster
from tests.oracle import Oracle
from tests.shells.cluster import answer, request
from tests.tiny_models import FAMILIES, VOCAB_SIZE, make_tiny

P, D, M = Role.PREFILL, Role.DECODE, Role.MIXED
LAYOUTS = {"1P1D": (P, D), "2P2D": (P, P, D, D), "1P2D": (P, D, D), "2M": (M, M)}
OUTPUT = 12


WAYS = [(layout, link) for layout in LAYOUTS for link in ("shm", "gloo") if (layout, link) != ("2M", "gloo")]
"""Mixed instances decode what they prefill: no link is used."""


@pytest.fixture(scope="module")
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Oracle]:
    """A tiny model of a family, and what transformers makes of it."""
    directory = make_tiny(request.param, tmp_path_factory.mktemp("tiny"))
    return directory, Oracle(directory)


def prompts() -> list[list[int]]:
    """Unequal lengths; two begin alike for longer than a block, so that a prefix is shared on the way."""
    draw = random.Random(5)
    made = [[draw.randrange(3, VOCAB_SIZE) for _ in range(n)] for n in (3, 17, 40, 64, 131, 300)]
    return [*made, made[4][:100] + made[1]]


@pytest.mark.parametrize(("layout", "transfer"), WAYS)
@pytest.mark.parametrize("family", list(FAMILIES), indirect=True)
async def test_tokens_are_those_of_transformers(family: tuple[Path, Oracle], layout: str, transfer: str) -> None:
    model, oracle = family
    asked = prompts()
    async with cluster(model, LAYOUTS[layout], transfer=transfer) as running:
        work = (answer(running.shell, request(f"r{i}", p, OUTPUT)) for i, p in enumerate(asked))
        answers = await asyncio.gather(*work)
        for prompt, (tokens, end) in zip(asked, answers, strict=True):
            assert tokens == oracle(prompt, OUTPUT)
            moved = end.account.timings.kv_bytes_moved
            assert (moved > 0) == (layout != "2M")
        await all_free(running)


@pytest.mark.parametrize("family", ["llama", "opt"], indirect=True)
@pytest.mark.parametrize("sizes", [(16, 8), (8, 32), (5, 16)])
async def test_block_sizes_may_differ_at_the_two_ends(family: tuple[Path, Oracle], sizes: tuple[int, int]) -> None:
    model, oracle = family
    async with cluster(model, (P, D), transfer="shm", block_sizes=sizes) as running:
        work = (answer(running.shell, request(f"r{i}", p, OUTPUT)) for i, p in enumerate(prompts()))
        for prompt, (tokens, end) in zip(prompts(), await asyncio.gather(*work), strict=True):
            assert tokens == oracle(prompt, OUTPUT)
            assert end.account.timings.kv_bytes_moved > 0
        await all_free(running)


@pytest.mark.parametrize("family", ["llama", "opt"], indirect=True)
async def test_a_burst_is_read_at_both_ends(family: tuple[Path, Oracle]) -> None:
    """Whatever comes while the prefill instance reads is read by the decode instance, in small chunks."""
    model, oracle = family
    draw = random.Random(6)
    asked = [[draw.randrange(3, VOCAB_SIZE) for _ in range(n)] for n in range(30, 310, 20)]
    overflow, small = ClusterConfig(overflow_prefill_tokens=1), InstanceConfig(max_mixed_tokens=24)
    async with cluster(model, (P, D), transfer="shm", dispatch=overflow, machine=small) as running:
        work = (answer(running.shell, request(f"r{i}", p, OUTPUT)) for i, p in enumerate(asked))
        answers = await asyncio.gather(*work)
        ways = []
        for prompt, (tokens, end) in zip(asked, answers, strict=True):
            assert tokens == oracle(prompt, OUTPUT)
            moved = end.account.prefill_instance != end.account.decode_instance
            assert moved == (end.account.timings.kv_bytes_moved > 0)
            ways.append((end.account.prefill_instance[0], moved))
        assert set(ways) == {("p", True), ("d", False)}, "some handed off, some read where they decode"
        await all_free(running)
