"""Every family against transformers: greedy tokens in float32 are the same, however the work is cut and batched."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from distserve.core.types import Sampling
from distserve.engine.config import EngineConfig
from distserve.engine.runner import Engine
from tests.engine.driver import Running, complete, ids, run, step
from tests.tiny_models import FAMILIES, VOCAB_SIZE, make_tiny

OUTPUT_TOKENS = 20
PROMPT_LENGTHS = (1, 7, 16, 33, 150)
BLOCKS = 96


@dataclass(frozen=True)
class Case:
    directory: Path
    prompts: tuple[tuple[int, ...], ...]
    answers: tuple[list[int], ...]  # transformers' greedy tokens


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    directory = make_tiny(request.param, tmp_path_factory.mktemp("tiny"))
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    generator = torch.Generator().manual_seed(7)
    prompts = [torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]
    answers = []
    for prompt in prompts:
        out = reference.generate(
            torch.tensor([prompt]), max_new_tokens=OUTPUT_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        answers.append(out[0, len(prompt) :].tolist())
    return Case(directory, tuple(tuple(p) for p in prompts), tuple(answers))


def load(case: Case, block_size: int = 16, kernels: str = "auto") -> Engine:
    blocks = BLOCKS * 16 // block_size
    return Engine.load(
        EngineConfig(model=str(case.directory), block_size=block_size, pool_blocks=blocks, kernels=kernels)
    )


@pytest.fixture(scope="module")
def engine(case: Case) -> Engine:
    return load(case)


def shuffled_tables(engine: Engine, case: Case) -> list[tuple[int, ...]]:
    """A block table for each prompt, of blocks in no order."""
    order = torch.randperm(engine.spec.pool_blocks, generator=torch.Generator().manual_seed(1)).tolist()
    tables = []
    for prompt in case.prompts:
        need = -(-(len(prompt) + OUTPUT_TOKENS) // engine.spec.block_size)
        tables.append(tuple(order[:need]))
        del order[:need]
    return tables


def sequences(engine: Engine, case: Case) -> list[Running]:
    tables = shuffled_tables(engine, case)
    return [Running(f"r{i}", p, t) for i, (p, t) in enumerate(zip(case.prompts, tables, strict=True))]


def test_answers_are_not_trivial(case):
    assert len({tuple(answer) for answer in case.answers}) == len(PROMPT_LENGTHS)
    assert all(len(set(answer)) > 1 for answer in case.answers)


def test_whole_prompt(engine, case):
    for prompt, answer in zip(case.prompts, case.answers, strict=True):
        assert ids(complete(engine, prompt, OUTPUT_TOKENS)) == answer


@pytest.mark.parametrize("chunk", [1, 5, 16, 40])
def test_prompt_in_chunks(engine, case, chunk):
    assert ids(complete(engine, case.prompts[3], OUTPUT_TOKENS, chunk=chunk)) == case.answers[3]


def test_prefix_left_in_the_pool_by_another_sequence(engine, case):
    prompt, table = case.prompts[4], tuple(range(40, 60))
    first = Running("first", prompt[:128], table[:8])
    step(engine, [first])
    second = Running("second", prompt, (*table[:8], *range(20, 36)), computed=128)
    run(engine, [second], OUTPUT_TOKENS)
    assert second.output_ids == case.answers[4]


def test_batch_of_unequal_prompts_then_batched_decode(engine, case):
    batch = sequences(engine, case)
    run(engine, batch, OUTPUT_TOKENS)
    assert [s.output_ids for s in batch] == list(case.answers)


def test_prompt_chunks_beside_decoding(engine, case):
    batch = sequences(engine, case)
    run(engine, batch[:3], 4)
    while any(len(s.output) < OUTPUT_TOKENS for s in batch):
        step(engine, [s for s in batch if len(s.output) < OUTPUT_TOKENS], chunk=24)
    assert [s.output_ids for s in batch] == list(case.answers)


@pytest.mark.parametrize("block_size", [1, 8, 64])
def test_other_block_sizes(case, block_size):
    engine = load(case, block_size)
    batch = sequences(engine, case)
    run(engine, batch, OUTPUT_TOKENS, chunk=50)
    assert [s.output_ids for s in batch] == list(case.answers)


def test_in_torch(case):
    """What runs where native kernels cannot; elsewhere in this file they run if there is a compiler."""
    engine = load(case, kernels="torch")
    batch = sequences(engine, case)
    run(engine, batch, OUTPUT_TOKENS, chunk=50)
    assert [s.output_ids for s in batch] == list(case.answers)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_logprobs_are_near(case, dtype):
    """Teacher forcing on the float32 answer: the logprob of each of its tokens is near transformers' float32 one."""
    exact, low = load(case), Engine.load(EngineConfig(model=str(case.directory), dtype=dtype, pool_blocks=BLOCKS))
    prompt = (*case.prompts[3], *case.answers[3])
    want_all = Sampling(temperature=0.0, logprobs=VOCAB_SIZE)
    for cut in range(len(case.prompts[3]), len(prompt), 5):
        a = dict(complete(exact, prompt[:cut], 1, sampling=want_all)[0].top)
        b = dict(complete(low, prompt[:cut], 1, sampling=want_all)[0].top)
        worst = max(abs(a[i] - b[i]) for i in a if a[i] > -8)
        assert worst < (0.35 if dtype == "bfloat16" else 0.05)
