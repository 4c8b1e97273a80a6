"""Half-full blocks that came from elsewhere: what lies behind their tokens must not reach attention."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from distserve.core.types import InstanceRef, StepItem, StepPlan
from distserve.engine.config import EngineConfig
from distserve.engine.runner import Engine
from distserve.engine.tails import OpenTails
from distserve.transfer import StageSent, StageStored
from tests.engine.driver import Running, run
from tests.tiny_models import make_tiny
from tests.transfer.peers import Local, make_ticket

HERE, THERE = InstanceRef("here", 1), InstanceRef("there", 2)
PROMPT = tuple(range(30, 67))
OUTPUT = 14  # the prompt and these end two blocks later


def plan(*items: tuple[str, int, int, tuple[int, ...]]) -> StepPlan:
    return StepPlan(1, tuple(StepItem(name, start, (1,) * n, blocks, True) for name, start, n, blocks in items))


def test_a_block_is_strange_until_a_step_wrote_into_it():
    tails = OpenTails(16)
    tails.turn()
    assert tails.strange(plan(("a", 0, 20, (3, 4)))) == []  # begun here
    tails.turn()
    assert tails.strange(plan(("a", 20, 1, (3, 4)), ("b", 5, 1, (7,)))) == [(7, 5)]
    tails.turn()
    assert tails.strange(plan(("a", 21, 1, (3, 4)), ("b", 6, 1, (7,)))) == []


def test_a_sequence_that_was_away_or_lies_elsewhere_is_strange_again():
    tails = OpenTails(16)
    tails.turn()
    tails.strange(plan(("a", 5, 1, (7,)), ("b", 5, 1, (8,))))
    tails.turn()
    tails.strange(plan(("b", 6, 1, (8,))))
    tails.turn()
    assert tails.strange(plan(("a", 6, 1, (7,)), ("b", 7, 1, (9,)))) == [(7, 6), (9, 7)]


def test_parts_of_one_step_follow_each_other():
    tails = OpenTails(16)
    tails.turn()
    assert tails.strange(plan(("a", 0, 4, (7,)))) == []
    assert tails.strange(plan(("a", 4, 4, (7,)))) == []
    tails.turn()
    assert tails.strange(plan(("a", 8, 8, (7,)))) == []  # filled to its end: nothing behind
    tails.turn()
    assert tails.strange(plan(("a", 16, 1, (7, 2)))) == []


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(params=["shm", "gloo"])
def ends(request: pytest.FixtureRequest, directory: Path) -> Iterator[tuple[Engine, Local, Engine, Local]]:
    """Two engines with a mover each; the pool there is full of NaN."""
    config = EngineConfig(model=str(directory), pool_blocks=12, kernels="torch")
    engines = Engine.load(config), Engine.load(config)
    movers = [Local(ref, engine.pool.tensor, request.param) for ref, engine in zip((HERE, THERE), engines, strict=True)]
    engines[1].pool.tensor.fill_(float("nan"))
    yield engines[0], movers[0], engines[1], movers[1]
    for mover in movers:
        mover.close()


@pytest.mark.parametrize("mates", [0, 3])
def test_a_half_block_that_moves_in_among_nan(ends, mates):
    """Few sequences take torch's fused kernel, more of them our products; neither may see what was there before."""
    here, source, there, target = ends
    stayed = Running("x", PROMPT, (0, 1, 2, 3))
    run(here, [stayed], OUTPUT)
    moving = Running("x", PROMPT, (4, 5, 6, 7))
    run(here, [moving], 1)
    tokens, blocks = moving.computed, (9, 2, 11)
    assert tokens % here.spec.block_size
    ticket = make_ticket(1, HERE, THERE, tokens)
    target.mover.open_ticket(ticket, blocks)
    source.mover.send_stage(ticket, target.mover.address, 0, tokens, moving.blocks, True)
    assert isinstance(source.event(), StageSent)
    assert isinstance(target.event(), StageStored)
    assert there.pool.tensor[11, :, :, :, tokens % 16 :].isnan().all()  # the move itself writes tokens alone
    arrived = Running("x", PROMPT, (*blocks, 5), computed=tokens, output=list(moving.output))
    others = [Running(f"m{i}", (7 + i,) * 3, ((0, 1), (3, 4), (6, 7))[i]) for i in range(mates)]
    run(there, [arrived, *others], OUTPUT)
    assert arrived.output_ids == stayed.output_ids
    assert torch.isfinite(there.pool.tensor[[9, 2, 11, 5]]).all()
