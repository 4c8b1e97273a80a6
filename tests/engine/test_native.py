"""The native forward pass beside the torch one: the same numbers, whoever the neighbours; torch where it cannot be."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distserve.core.types import StepItem, StepPlan
from distserve.engine.config import EngineConfig
from distserve.engine.forward import Forward, TorchForward
from distserve.engine.native import BothForward, take_over
from distserve.engine.pool import KvPool
from distserve.engine.runner import Engine, build_model
from distserve.models.catalog import default_cache
from distserve.models.config import read_config
from distserve.models.errors import ModelError
from distserve_kernels.cores import Threads
from distserve_kernels.native import library
from tests.engine.driver import GREEDY, complete, ids
from tests.tiny_models import FAMILIES, VOCAB_SIZE, make_tiny

try:
    library.find_compiler()
except library.NativeUnavailable as why:
    pytest.skip(f"native kernels cannot be built: {why}", allow_module_level=True)

CACHE = default_cache() / "native"
LENGTHS = (1, 2, 15, 16, 17, 40, 97, 130, 200)
KV_TOKENS = 4096
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.25}  # of logits up to 15; torch in bfloat16 is as far from float32


@dataclass
class Side:
    """One forward pass over its own pool."""

    pool: KvPool
    forward: Forward

    def __call__(self, *items: StepItem) -> Tensor:
        with torch.inference_mode():
            logits = self.forward(StepPlan(1, items))
        assert logits is not None
        return logits.float().clone()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[str, Path] = {}

    def make(family: str, **overrides: int) -> Path:
        key = f"{family}{overrides}"
        if key not in made:
            made[key] = make_tiny(family, tmp_path_factory.mktemp("tiny"), **overrides)
        return made[key]

    return make


def side(directory: Path, dtype: str, kernels: str, block_size: int = 16, threads: int = 2, rows: int = 0) -> Side:
    """``rows``: native up to so many, torch beyond."""
    config = EngineConfig(model=str(directory), dtype=dtype, block_size=block_size, kv_tokens=KV_TOKENS)
    shape = read_config(directory)
    length = shape.max_positions
    with torch.inference_mode():
        model, _ = build_model(directory, shape, config, length, None)
        pool = KvPool(
            config.blocks,
            shape.layers,
            shape.kv_heads,
            block_size,
            shape.head_dim,
            config.torch_dtype,
            torch.device("cpu"),
        )
        if kernels == "torch":
            return Side(pool, TorchForward(model, pool))
        native = take_over(model, shape, pool.tensor, length, Threads(threads), CACHE, rows or None)
        return Side(pool, BothForward(native, TorchForward(model, pool), rows) if rows else native)


def sequences(lengths: Sequence[int], block_size: int, spare: int = 4) -> tuple[list[list[int]], list[tuple[int, ...]]]:
    """Random tokens, and tables of blocks in no order."""
    generator = torch.Generator().manual_seed(len(lengths))
    order = torch.randperm(KV_TOKENS // block_size, generator=generator).tolist()
    tokens, tables = [], []
    for n in lengths:
        need = -(-(n + spare) // block_size)
        tables.append(tuple(order[:need]))
        del order[:need]
        tokens.append(torch.randint(3, VOCAB_SIZE, (n + spare,), generator=generator).tolist())
    return tokens, tables


def items(
    tokens: Sequence[Sequence[int]], tables: Sequence[tuple[int, ...]], spans: Sequence[tuple[int, int]]
) -> list[StepItem]:
    return [
        StepItem(str(i), low, tuple(t[low:high]), blocks, True, 0, GREEDY)
        for i, (t, blocks, (low, high)) in enumerate(zip(tokens, tables, spans, strict=True))
    ]


def near(one: Tensor, other: Tensor, dtype: str) -> None:
    assert (one - other).abs().max() < TOLERANCE[dtype]


@pytest.mark.parametrize(("dtype", "block_size"), [("float32", 1), ("float32", 16), ("bfloat16", 5), ("bfloat16", 64)])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_equals_torch(tiny, family, dtype, block_size):
    """Prompts, a batch of single tokens, and both in one step, on unaligned lengths."""
    directory = tiny(family)
    native, plain = (side(directory, dtype, kernels, block_size) for kernels in ("native", "torch"))
    tokens, tables = sequences(LENGTHS, block_size)
    steps = (
        [(0, n) for n in LENGTHS],
        [(n, n + 1) for n in LENGTHS],
        [(n + 1, n + 2 + i % 2) for i, n in enumerate(LENGTHS)],
    )
    for spans in steps:
        plan = items(tokens, tables, spans)
        near(native(*plan), plain(*plan), dtype)
    near(native.pool.tensor.float(), plain.pool.tensor.float(), dtype)


@pytest.mark.parametrize("batch", [1, 3, 4, 5, 13, 25, 100])
def test_batch_sizes(tiny, batch):
    directory = tiny("llama")
    native, plain = (side(directory, "bfloat16", kernels, 4) for kernels in ("native", "torch"))
    tokens, tables = sequences([5 + i % 7 for i in range(batch)], 4)
    for spans in ([(0, 5 + i % 7) for i in range(batch)], [(5 + i % 7, 6 + i % 7) for i in range(batch)]):
        plan = items(tokens, tables, spans)
        near(native(*plan), plain(*plan), "bfloat16")


@pytest.mark.parametrize("dim", [8, 24, 80, 128])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_head_dimensions(tiny, dim, dtype):
    directory = tiny("qwen3", head_dim=dim)
    native, plain = (side(directory, dtype, kernels) for kernels in ("native", "torch"))
    tokens, tables = sequences((70, 9), 16)
    for spans in ([(0, 70), (0, 9)], [(70, 71), (9, 10)]):
        plan = items(tokens, tables, spans)
        near(native(*plan), plain(*plan), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_odd_sizes(tiny, dtype):
    """Nothing is a multiple of anything: widths are padded, tails are masked."""
    sizes = {"hidden_size": 36, "intermediate_size": 51, "head_dim": 10, "vocab_size": 401}
    directory = tiny("llama", **sizes)
    native, plain = (side(directory, dtype, kernels) for kernels in ("native", "torch"))
    tokens, tables = sequences((33, 1, 20), 16)
    for spans in ([(0, 33), (0, 1), (0, 20)], [(33, 34), (1, 2), (20, 21)]):
        plan = items(tokens, tables, spans)
        near(native(*plan), plain(*plan), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_long_context_is_split_and_joined(tiny, dtype):
    directory = tiny("llama", max_position_embeddings=3000)
    native, plain = (side(directory, dtype, kernels) for kernels in ("native", "torch"))
    lengths = (2500, 1023, 40)
    tokens, tables = sequences(lengths, 16)
    for extra in range(3):
        spans = [(n + extra - 1, n + extra) if extra else (0, n) for n in lengths]
        plan = items(tokens, tables, spans)
        near(native(*plan), plain(*plan), dtype)
    alone = native(plan[0])
    assert torch.equal(alone, native(*plan)[:1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "opt", "qwen3"])
def test_a_row_is_the_same_to_the_bit(tiny, family, dtype):
    """Alone or among any number, first or last, in chunks or whole, in blocks of any size, on any number of threads."""
    directory = tiny(family)
    native = side(directory, dtype, "native")
    tokens, tables = sequences(LENGTHS, 16)
    at = LENGTHS.index(97)

    def last_logits(run: Side, places: Sequence[tuple[int, ...]], mates: Sequence[int], chunk: int) -> Tensor:
        for low in range(0, 97, chunk):
            run(*items([tokens[at]], [places[at]], [(low, min(97, low + chunk))]))
        chosen = [*mates, at]
        run(*items([tokens[i] for i in mates], [places[i] for i in mates], [(0, LENGTHS[i]) for i in mates]) or items(
            [tokens[at]], [places[at]], [(96, 97)]
        ))  # fmt: skip
        plan = items(
            [tokens[i] for i in chosen],
            [places[i] for i in chosen],
            [(LENGTHS[i], LENGTHS[i] + 1 + (i % 3 == 0)) for i in mates] + [(97, 98)],
        )
        return run(*plan)[-1]

    want = last_logits(native, tables, [], 97)
    for mates in ([0], [0, 1, 2, 3], [i for i in range(len(LENGTHS)) if i != at]):
        assert torch.equal(last_logits(native, tables, mates, 97), want)
    assert torch.equal(last_logits(native, tables, [2], 31), want)
    _, small = sequences(LENGTHS, 5)
    assert torch.equal(last_logits(side(directory, dtype, "native", 5), small, [], 97), want)
    for threads in (1, 3):
        assert torch.equal(last_logits(side(directory, dtype, "native", threads=threads), tables, [4], 97), want)


def test_longer_steps_go_to_torch(tiny, caplog):
    """Where oneDNN has matrix tiles: one pool, two layouts of the weights, the same tokens."""
    with caplog.at_level(logging.INFO):
        both = side(tiny("llama_tied"), "float32", "native", rows=8)
    assert "held twice" in caplog.text
    plain = side(tiny("llama_tied"), "float32", "torch")
    tokens, tables = sequences((30, 3), 16)
    for spans in ([(0, 30), (0, 3)], [(30, 31), (3, 4)], [(31, 34), (4, 5)]):
        plan = items(tokens, tables, spans)
        near(both(*plan), plain(*plan), "float32")


@pytest.mark.parametrize("bad", ["token", "block", "position", "table"])
def test_a_step_out_of_range_is_refused(tiny, bad):
    native = side(tiny("llama"), "float32", "native")
    token = VOCAB_SIZE if bad == "token" else 5
    blocks = (KV_TOKENS // 16,) if bad == "block" else tuple(range(1 if bad == "table" else 40))
    start = {"position": 512, "table": 16}.get(bad, 0)
    with pytest.raises(IndexError):
        native(StepItem("a", start, (token,), blocks, True, 0, GREEDY))
    assert not native.pool.tensor.any()


def test_idle_threads_use_no_processor(tiny):
    native = side(tiny("llama"), "float32", "native", threads=3)
    tokens, tables = sequences((40,), 16)
    native(*items(tokens, tables, [(0, 40)]))
    time.sleep(0.05)  # the team has gone to sleep
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.05


def test_the_engine_says_which_kernels_run(tiny, caplog):
    directory = tiny("llama")
    answers = {}
    for kernels, words in (("auto", "native kernels ("), ("native", "native kernels ("), ("torch", "torch kernels")):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="distserve"):
            engine = Engine.load(EngineConfig(model=str(directory), pool_blocks=16, kernels=kernels))
        assert words in caplog.text
        answers[kernels] = ids(complete(engine, range(10, 40), 12))
    assert answers["auto"] == answers["native"] == answers["torch"]


@pytest.mark.parametrize(
    ("options", "variables", "why"),
    [
        ({"dtype": "float16"}, {}, "not in float16"),
        ({}, {"CXX": "", "PATH": ""}, "no C++ compiler is installed"),
        ({}, {"CXX": "no-such-compiler"}, "no-such-compiler, which is not installed"),
        ({}, {"CXX": "false"}, "failed"),
    ],
)
def test_torch_takes_over_and_says_why(tiny, options, variables, why, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("DISTSERVE_CACHE", str(tmp_path))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    config = EngineConfig(model=str(tiny("llama")), pool_blocks=16, **options)
    with caplog.at_level(logging.INFO, logger="distserve"):
        engine = Engine.load(config)
    assert "torch kernels: " in caplog.text and why in caplog.text
    assert len(complete(engine, range(10, 40), 4)) == 4
    with pytest.raises(ModelError, match="native kernels were asked for"):
        Engine.load(EngineConfig(model=str(tiny("llama")), pool_blocks=16, kernels="native", **options))


def test_unknown_kernels_are_refused():
    with pytest.raises(ModelError, match="auto, native, torch"):
        EngineConfig(model="x", kernels="fast")
