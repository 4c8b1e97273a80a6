"""The engine beyond plain greedy: isolation, seeds and places, steps that sample nothing, what it says of itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distserve.core.types import Sampling, StepItem, StepPlan
from distserve.engine.config import EngineConfig
from distserve.engine.runner import Engine
from distserve.models.errors import ModelError
from tests.engine.driver import GREEDY, Running, complete, run, step
from tests.tiny_models import VOCAB_SIZE, make_tiny

ALL_LOGPROBS = Sampling(temperature=0.0, logprobs=VOCAB_SIZE)
PROMPT = tuple(range(10, 47))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def engine(directory: Path) -> Engine:
    return Engine.load(EngineConfig(model=str(directory), pool_blocks=64))


def table_of(engine: Engine, mates: int, fill: int) -> tuple[tuple[int, float], ...]:
    """The logprobs of a sequence's third token, with ``mates`` neighbours whose prompts are all ``fill``."""
    own = Running("own", PROMPT, tuple(range(4)), ALL_LOGPROBS)
    others = [
        Running(f"m{i}", (fill,) * (20 + i), tuple(range(4 + 3 * i, 7 + 3 * i)), ALL_LOGPROBS) for i in range(mates)
    ]
    for _ in range(3):
        step(engine, [*others, own])
    return own.output[2].top


@pytest.mark.parametrize("mates", [1, 3, 7])
def test_neighbours_content_changes_nothing(engine, mates):
    assert table_of(engine, mates, fill=5) == table_of(engine, mates, fill=300)


def test_blocks_left_full_of_nan_do_not_leak(engine):
    """A block's last owner may have overflowed: what it left behind must not reach the next owner through masks."""
    clean = table_of(engine, 3, fill=5)
    engine.pool.tensor.fill_(float("nan"))
    dirty = table_of(engine, 3, fill=5)
    engine.pool.tensor.zero_()
    assert dirty == clean


def test_seeded_sampling_is_the_same_alone_in_company_and_in_chunks(engine):
    sampling = Sampling(temperature=1.0, top_p=0.95, seed=77)
    alone = [t.id for t in complete(engine, PROMPT, 16, sampling=sampling)]
    own = Running("own", PROMPT, tuple(range(40, 45)), sampling)
    mates = [Running(f"m{i}", (9 + i,) * 5, (3 * i, 3 * i + 1), Sampling(seed=i)) for i in range(4)]
    run(engine, [*mates, own], 16, chunk=10)
    assert own.output_ids == alone
    other = complete(engine, PROMPT, 16, sampling=Sampling(temperature=1.0, top_p=0.95, seed=78))
    assert [t.id for t in other] != alone


def test_tokens_come_in_item_order(engine):
    batch = [
        Running("a", (5, 6, 7), (0,)),
        Running("b", (8,), (1,)),
        Running("c", (9, 4), (2,)),
        Running("d", (3,), (3,)),
    ]
    output = engine.run(StepPlan(1, tuple(s.item() for s in batch)))
    assert [id for id, _ in output.tokens] == ["a", "b", "c", "d"]
    assert output.forward_s > 0
    for sequence, (_, token) in zip(batch, output.tokens, strict=True):
        assert complete(engine, sequence.prompt, 1)[0].id == token.id


def test_a_step_that_samples_nothing_still_writes_kv(engine):
    engine.pool.tensor.zero_()
    output = engine.run(StepPlan(1, (StepItem("a", 0, PROMPT, (7, 9, 8), False, 0, GREEDY),)))
    assert output.tokens == ()
    written = engine.pool.tensor.flatten(1).abs().sum(1).nonzero().flatten().tolist()
    assert written == [7, 8, 9]
    assert engine.run(StepPlan(2, ())).tokens == ()


def test_pool_layout_is_a_block_of_all_layers(engine):
    spec, pool = engine.spec, engine.pool
    assert tuple(pool.tensor.shape) == (64, spec.layers, 2, spec.kv_heads, spec.block_size, spec.head_dim)
    assert pool.tensor.is_contiguous()
    assert pool.block_bytes == pool.tensor[3].nbytes == pool.tensor.stride(0) * pool.tensor.element_size()


def test_moving_blocks_as_bytes_moves_the_sequence(directory, engine):
    """KV written by one engine and copied block by block into another's pool continues there to the same tokens."""
    whole = complete(engine, PROMPT, 12, blocks=range(5))
    other = Engine.load(EngineConfig(model=str(directory), pool_blocks=16))
    first = Running("x", PROMPT, (0, 1, 2, 3), GREEDY)
    run(engine, [first], 5)
    other.pool.tensor[[9, 3, 11, 6]] = engine.pool.tensor[[0, 1, 2, 3]]
    there = Running("x", PROMPT, (9, 3, 11, 6), GREEDY, first.computed, list(first.output))
    run(other, [there], 12)
    assert there.output == whole


def test_spec_and_fingerprint(directory, engine, tmp_path):
    spec = engine.spec
    assert (spec.vocab_size, spec.layers, spec.kv_heads, spec.head_dim) == (VOCAB_SIZE, 3, 2, 16)
    assert (spec.kv_dtype, spec.block_size, spec.pool_blocks, spec.eos_token_ids) == ("float32", 16, 64, (2,))

    def fingerprint(path: Path, **options: object) -> str:
        return Engine.load(EngineConfig(model=str(path), pool_blocks=4, **options)).spec.fingerprint  # type: ignore[arg-type]

    assert fingerprint(directory) == spec.fingerprint
    assert fingerprint(directory, block_size=4) == spec.fingerprint
    assert fingerprint(directory, dtype="bfloat16") != spec.fingerprint
    assert fingerprint(make_tiny("llama", tmp_path)) == spec.fingerprint
    assert fingerprint(make_tiny("llama", tmp_path / "other", seed=1)) != spec.fingerprint
    assert fingerprint(make_tiny("llama_tied", tmp_path)) != spec.fingerprint


def test_loading_reports_progress(directory):
    seen: list[tuple[int, int, str]] = []
    Engine.load(EngineConfig(model=str(directory), pool_blocks=4), lambda *report: seen.append(report))
    done = [d for d, _, _ in seen]
    assert done == sorted(done)
    assert 0.9 * seen[-1][1] < done[-1] <= seen[-1][1]
    assert seen[0][2] == "model.safetensors"


def test_max_model_len(directory, engine):
    assert engine.spec.max_model_len == 512
    short = Engine.load(EngineConfig(model=str(directory), pool_blocks=8, max_model_len=100))
    assert short.spec.max_model_len == 100
    with pytest.raises(ModelError, match="max_model_len 600 is longer than the 512"):
        Engine.load(EngineConfig(model=str(directory), max_model_len=600))


def test_random_weights_are_seeded(directory, tmp_path):
    name = f"random:{directory / 'config.json'}"
    one, two = (Engine.load(EngineConfig(model=name, pool_blocks=8)) for _ in range(2))
    assert one.spec == two.spec
    assert complete(one, PROMPT, 4) == complete(two, PROMPT, 4)
    assert torch.isfinite(torch.tensor(complete(one, PROMPT, 1, sampling=ALL_LOGPROBS)[0].logprob))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "float32, bfloat16, float16"),
        ({"block_size": 0}, "block_size"),
        ({"kv_tokens": 0}, "kv_tokens"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ModelError, match=message):
        EngineConfig(model="x", **options)
