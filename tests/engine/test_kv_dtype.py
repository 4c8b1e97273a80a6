"""A pool of another dtype than the model computes in: close results, the same ones however a prompt was cut."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from distserve.core.types import Sampling
from distserve.engine.config import EngineConfig
from distserve.engine.runner import Engine
from distserve.kv.shape import KvShape
from distserve.models.errors import ModelError
from distserve_kernels.stored import cast, put_rows, rounded, take_rows
from tests.engine.driver import Running, complete, run, step
from tests.tiny_models import VOCAB_SIZE, make_tiny

PROMPT = tuple(range(20, 65))
ALL = Sampling(temperature=0.0, logprobs=VOCAB_SIZE)
ERROR = {"bfloat16": 0.04, "float16": 0.01, "fp8_e4m3": 0.6}
"""In the logprob of a token. Of 8, 11 and 4 significant bits."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("tiny"))


def load(directory: Path, kv: str, **options: object) -> Engine:
    config = {"kernels": "torch", "pool_blocks": 24} | options
    return Engine.load(EngineConfig(model=str(directory), kv_dtype=kv, **config))  # type: ignore[arg-type]


def logprobs(engine: Engine, chunk: int = 1 << 30) -> list[float]:
    """Of every token, as the second one."""
    token = complete(engine, PROMPT, 2, sampling=ALL, chunk=chunk)[1]
    return [p for _, p in sorted(token.top)]


@pytest.mark.parametrize("kv", list(ERROR))
def test_results_are_near_those_of_a_full_pool(directory, kv):
    engine = load(directory, kv)
    assert engine.spec.kv_dtype == kv
    assert engine.pool.block_bytes == KvShape.of(engine.spec).block_bytes
    exact, found = torch.tensor(logprobs(load(directory, "auto"))), torch.tensor(logprobs(engine))
    off = (exact - found).abs().max().item()
    assert 0 < off < ERROR[kv]


@pytest.mark.parametrize("kv", list(ERROR))
def test_chunks_and_neighbours_change_nothing(directory, kv):
    """What a chunk computes of its own KV is what later steps read of it."""
    engine = load(directory, kv)
    whole = torch.tensor(logprobs(engine))
    assert torch.allclose(torch.tensor(logprobs(engine, chunk=7)), whole, atol=2e-3)
    alone = [t.id for t in complete(engine, PROMPT, 12)]
    own = Running("own", PROMPT, tuple(range(4, 8)))
    mates = [Running(f"m{i}", (9 + i,) * 5, (10 + 2 * i, 11 + 2 * i)) for i in range(4)]
    run(engine, [*mates, own], 12, chunk=10)
    assert own.output_ids == alone


def test_a_pool_of_bytes_is_cleared_like_any_other(directory):
    engine = load(directory, "fp8_e4m3")
    clean = logprobs(engine)
    engine.pool.tensor.view(torch.uint8).fill_(0x7F)  # NaN
    assert logprobs(engine) == clean


def test_native_kernels_leave_another_dtype_to_torch(directory, caplog):
    with caplog.at_level(logging.INFO):
        engine = load(directory, "bfloat16", kernels="auto")
    assert "torch kernels: native ones keep KV in the model's float32, not in bfloat16" in caplog.text
    step(engine, [Running("x", PROMPT, (0, 1, 2))])
    with pytest.raises(ModelError, match="native kernels were asked for, but native ones keep KV"):
        load(directory, "bfloat16", kernels="native")


def test_kv_as_it_is_computed_is_the_default(directory):
    engine = load(directory, "auto")
    assert (engine.spec.kv_dtype, engine.pool.tensor.dtype) == ("float32", torch.float32)
    assert load(directory, "float32").spec == engine.spec
    with pytest.raises(ModelError, match="auto, float32, bfloat16, float16, fp8_e4m3"):
        load(directory, "int4")


def test_what_a_byte_cannot_hold_becomes_the_largest_it_can():
    x = torch.tensor([[1e6, -1e6, float("inf"), 0.3]])
    kept = cast(x, torch.float8_e4m3fn).float()
    assert kept.tolist()[0][:3] == [448.0, -448.0, 448.0]
    assert torch.equal(rounded(x, torch.float8_e4m3fn), kept)
    assert rounded(x, x.dtype) is x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_rows_are_put_and_taken(dtype):
    table = torch.zeros(5, 4).to(dtype)
    values = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.5, 0.25, -1.0, 8.0]])
    put_rows(table, torch.tensor([3, 1]), values)
    taken = take_rows(table, torch.tensor([1, 3, 0]), torch.float32)
    assert torch.equal(taken, torch.stack((values[1], values[0], torch.zeros(4))))
