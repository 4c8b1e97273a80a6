"""The Triton forward pass beside torch's, in Triton's interpreter where there is no GPU: the same logits and the same
greedy tokens for prompts, chunks behind cached positions, batches of single tokens, and all of them in one step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distserve.core.types import Sampling, StepItem, StepPlan
from distserve.engine.config import EngineConfig
from distserve.engine.paged_inputs import PagedInputs
from distserve.engine.runner import Engine
from distserve.engine.shard import ShardEngine
from distserve.engine.stopping import StepGivenUp
from distserve.engine.triton_forward import PagedForward
from distserve.kv.shard import Parallel
from distserve.models.errors import ModelError
from distserve.models.step import PagedKv
from distserve_kernels import backend
from tests.engine.driver import Running, ids, run, step
from tests.tiny_models import make_tiny

pytest.importorskip("triton", reason="triton is not installed: pip install 'distserve[dev]' has it on Linux")

# family, block size: grouped heads, one KV head, biases, QK norm, learned positions
CASES = [("llama", 16), ("llama_tied", 5), ("qwen2", 16), ("qwen3", 4), ("opt", 16)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = make_tiny(family, tmp_path_factory.mktemp("tiny"), num_hidden_layers=2)
        return made[family]

    return make


def loaded(directory: Path, kernels: str, block_size: int = 16, **options: str) -> Engine:
    return Engine.load(
        EngineConfig(
            model=str(directory),
            pool_blocks=640 // block_size,
            block_size=block_size,
            kernels=kernels,
            device=DEVICE,
            **options,  # type: ignore[arg-type]
        )
    )


def sequences(lengths: Sequence[int], block_size: int, sampling: Sampling | None = None) -> list[Running]:
    """Random prompts over tables of blocks in no order."""
    generator = torch.Generator().manual_seed(len(lengths))
    order = torch.randperm(640 // block_size, generator=generator).tolist()
    found = []
    for i, n in enumerate(lengths):
        need = -(-(n + 8) // block_size)
        prompt = torch.randint(3, 380, (n,), generator=generator).tolist()
        blocks, order = tuple(order[:need]), order[need:]
        found.append(Running(str(i), tuple(prompt), blocks, sampling or Sampling(temperature=0.0)))
    return found


def spoiled(engine: Engine) -> Engine:
    """With a pool of NaN, as an earlier owner may leave it: nothing that was not written may be read."""
    engine.pool.tensor.fill_(float("nan"))
    return engine


@pytest.mark.parametrize(("family", "block_size"), CASES)
def test_greedy_tokens_are_those_of_torch(tiny, family, block_size):
    """Three prompts whole, then in chunks that join the batch while others decode; steps of both kinds at once."""
    answers = {}
    for kernels in ("torch", "triton"):
        engine = loaded(tiny(family), kernels, block_size)
        if kernels == "triton":
            spoiled(engine)
        early, late = sequences((1, 19), block_size), sequences((3, 37, 20), block_size)[1:]
        used = {block for s in early for block in s.blocks}
        free = [block for block in range(engine.spec.pool_blocks) if block not in used]
        for one in late:
            one.blocks, free = tuple(free[: len(one.blocks)]), free[len(one.blocks) :]
            one.id = "late " + one.id
        step(engine, early)  # two prompts in one launch, one of a single token
        step(engine, [late[0], *early, late[1]], chunk=17)  # chunks of the late prompts beside single tokens
        run(engine, [*late, *early], 3, chunk=17)
        answers[kernels] = [ids(s.output) for s in (*early, *late)]
    assert answers["triton"] == answers["torch"]
    assert len({token for answer in answers["torch"] for token in answer}) > 4, "too few to compare"


@pytest.mark.parametrize(
    ("family", "dtype", "tolerance"),
    [("qwen3", "float32", 2e-4), ("opt", "float32", 2e-4), ("llama", "bfloat16", 0.25)],  # of logits up to 15
)
def test_logits_and_kv_are_those_of_torch(tiny, family, dtype, tolerance):
    torch_side, triton_side = (loaded(tiny(family), kernels, dtype=dtype) for kernels in ("torch", "triton"))
    (one, two) = sequences((40, 33), 16)
    plans = [
        [(one, 0, 25, False), (two, 0, 33, True)],
        [(two, 33, 34, True), (one, 25, 40, True)],
        [(one, 40, 41, True), (two, 34, 35, True)],
    ]
    for number, parts in enumerate(plans, 1):
        items = tuple(
            StepItem(s.id, low, tuple((i * 7 + low) % 377 + 3 for i in range(high - low)), s.blocks, sample)
            for s, low, high, sample in parts
        )
        with torch.inference_mode():
            found, wanted = (engine.forward(StepPlan(number, items)) for engine in (triton_side, torch_side))
        assert found is not None and wanted is not None
        assert (found - wanted).abs().max() < tolerance
    assert (triton_side.pool.tensor - torch_side.pool.tensor).abs().max() < tolerance


def test_seeded_draws_are_those_of_torch_whoever_the_mates_are(tiny):
    """Triton's sampler in the engine: a sequence alone and the same one in a batch of other settings."""
    kinds = [Sampling(temperature=0.8, top_k=9, seed=4), Sampling(temperature=1.1, top_p=0.7, seed=5)]
    kinds += [Sampling(temperature=0.9, seed=6), Sampling(temperature=0.0)]
    answers = {}
    for kernels in ("torch", "triton"):
        engine = loaded(tiny("llama"), kernels)
        batch = sequences((2, 3, 4, 2), 16)
        for sequence, kind in zip(batch, kinds, strict=True):
            sequence.sampling = kind
        run(engine, batch, 2)
        answers[kernels] = [ids(s.output) for s in batch]
        alone = sequences((2, 3, 4, 2), 16)[1]
        alone.sampling = kinds[1]
        run(engine, [alone], 1)
        assert ids(alone.output) == answers[kernels][1][:1]
    assert answers["triton"] == answers["torch"]


def test_a_rank_of_a_cut_model_runs_the_same_kernels(tiny):
    """``ShardEngine``, whole here: its steps come with block tables as well."""
    answers = []
    for kernels in ("torch", "triton"):
        config = EngineConfig(str(tiny("llama")), pool_blocks=40, kernels=kernels, device=DEVICE)
        rank = ShardEngine.load(config, Parallel(), 0, None, None)
        items = [s.item() for s in sequences((9, 3), 16)]
        tokens = rank.run(StepPlan(1, tuple(items)))
        after = [
            replace(item, start=len(item.token_ids), token_ids=(token.id,))
            for item, token in zip(items, tokens, strict=True)
        ]
        answers.append(ids([*tokens, *rank.run(StepPlan(2, tuple(after)))]))
    assert answers[0] == answers[1]


def test_a_step_is_given_up_between_layers(tiny):
    engine = loaded(tiny("llama"), "triton")
    (sequence,) = sequences((5,), 16)
    engine.give_up(1)
    with pytest.raises(StepGivenUp):
        step(engine, [sequence])


def test_a_trial_writes_nothing(tiny):
    """What kernels are tuned on at the start must leave the pool as it was."""
    engine = loaded(tiny("opt"), "torch")
    before = engine.pool.tensor.normal_().clone()
    with torch.inference_mode():
        PagedForward(engine.forward._model, engine.pool, 40).warm()  # type: ignore[attr-defined]
    assert torch.equal(engine.pool.tensor, before)


def test_columns_of_a_mixed_step():
    """Rows: chunks, then single tokens; slots follow the tables across blocks; samples in item order."""
    inputs = PagedInputs(4, 100, torch.device("cpu"))
    single = StepItem("a", 5, (50,), (9, 7), True)
    chunk = StepItem("b", 2, (20, 21, 22), (3, 1), True)
    quiet = StepItem("c", 0, (30, 31), (0,), False)
    found = inputs(StepPlan(1, (single, chunk, quiet)))
    assert found.token_ids.tolist() == [20, 21, 22, 30, 31, 50]
    assert found.positions.tolist() == [2, 3, 4, 0, 1, 5]
    assert found.sample_rows is not None and found.sample_rows.tolist() == [5, 2]
    assert isinstance(found.kv, PagedKv)
    assert found.kv.slots.tolist() == [14, 15, 4, 0, 1, 29]
    assert found.kv.prefill is not None and found.kv.decode is not None
    assert found.kv.prefill.tables.tolist() == [[3, 1, *[0] * 14], [0] * 16]
    assert (found.kv.prefill.firsts.tolist(), found.kv.prefill.starts.tolist()) == ([0, 3, 5], [2, 0])
    assert (found.kv.prefill.longest, found.kv.prefill_tokens) == (3, 5)
    assert found.kv.decode.longest == 100
    assert (found.kv.decode.tables.tolist(), found.kv.decode.lengths.tolist()) == ([[9, 7, *[0] * 14]], [6])


# ── the choice ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_log_says_that_triton_runs(tiny, caplog):
    with caplog.at_level(logging.INFO, logger="distserve"):
        loaded(tiny("llama"), "triton")
    assert "Triton kernels" in caplog.text


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU auto means Triton")
def test_auto_on_a_cpu_is_not_triton(tiny, caplog):
    with caplog.at_level(logging.INFO):
        loaded(tiny("llama"), "auto", dtype="float16")  # which nothing but torch computes in there
    assert "torch kernels" in caplog.text and "Triton" not in caplog.text


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU needs no interpreter")
def test_triton_on_a_cpu_that_interprets_nothing_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(backend, "_interpreted", lambda: False)
    with pytest.raises(ModelError, match=r"they run on a GPU, not on cpu .*say --kernels auto"):
        loaded(tiny("llama"), "triton")


def test_triton_that_is_not_installed_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="Triton is not installed"):
        loaded(tiny("llama"), "triton")


def test_kv_of_another_dtype_is_refused_when_triton_must_be(tiny):
    with pytest.raises(ModelError, match="fp8_e4m3"):
        loaded(tiny("llama"), "triton", kv_dtype="fp8_e4m3")


def test_unknown_words_are_refused():
    with pytest.raises(ModelError, match="triton"):
        EngineConfig(model="x", kernels="fast")
    with pytest.raises(ModelError, match="auto, off"):
        EngineConfig(model="x", cuda_graphs="on")
