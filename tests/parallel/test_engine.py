"""Tensor and pipeline parallel against transformers: every family, TP 1, 2, 4 × PP 1, 2, and hand-offs between layouts.

Every rank is a process; they speak gloo, and KV moves over gloo links.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from distserve.core.types import Sampling
from distserve.engine.config import EngineConfig
from distserve.engine.runner import Engine
from distserve.kv.shard import KvCut, Parallel
from distserve.models.errors import ModelError, UnsupportedModel
from distserve.transfer import StageSent, StageStored
from tests.engine.driver import Running, complete, run, step
from tests.parallel.ranks import Ranks
from tests.tiny_models import FAMILIES, VOCAB_SIZE, make_tiny
from tests.transfer.peers import make_ticket

OUTPUT = 8
PROMPT_LENGTHS = (1, 7, 33, 150)
LAYOUTS = [Parallel(tp, pp) for pp in (1, 2) for tp in (1, 2, 4) if tp * pp > 1]
ODD_VOCAB = 383
"""No multiple of any number of lanes: the last of them hold rows that only fill up."""


@dataclass(frozen=True)
class Case:
    directory: Path
    prompts: tuple[tuple[int, ...], ...]
    answers: tuple[list[int], ...]  # transformers' greedy tokens


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    some = Ranks(8)
    yield some
    some.close()


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return {family: _case(family, tmp_path_factory.mktemp("tiny")) for family in FAMILIES}


def _case(family: str, folder: Path) -> Case:
    directory = make_tiny(family, folder, vocab_size=ODD_VOCAB)
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    generator = torch.Generator().manual_seed(7)
    prompts = [torch.randint(3, ODD_VOCAB, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = reference.generate(ids, max_new_tokens=OUTPUT, do_sample=False, eos_token_id=None, pad_token_id=0)
        answers.append(out[0, len(prompt) :].tolist())
    return Case(directory, tuple(tuple(p) for p in prompts), tuple(answers))


def sequences(case: Case) -> list[Running]:
    """Each prompt with a block table of its own, of blocks in no order."""
    order = torch.randperm(96, generator=torch.Generator().manual_seed(1)).tolist()
    found = []
    for i, prompt in enumerate(case.prompts):
        need = -(-(len(prompt) + OUTPUT) // 16)
        found.append(Running(f"r{i}", prompt, tuple(order[:need])))
        del order[:need]
    return found


EVERYTHING = [(layout, family, kernels) for layout in LAYOUTS for family in FAMILIES for kernels in ("native", "torch")]
BY_MESSAGES = [(LAYOUTS[0], family, "messages") for family in ("llama_tied", "opt")] + [
    (LAYOUTS[3], "qwen3", "messages")
]
STAGES = {"native": "NativeStage", "messages": "NativeStage", "torch": "TorchStage"}


@pytest.mark.parametrize(("layout", "family", "kernels"), EVERYTHING + BY_MESSAGES, ids=str)
def test_tokens_are_those_of_transformers(ranks, cases, layout, family, kernels):
    """Whole prompts, chunks beside decodes, then a batch that decodes. 3 layers: stages of 2 and 1.

    Lanes meet over gloo in torch; those of native kernels in memory, or by messages as on several machines.
    """
    case = cases[family]
    settings = {"kernels": "native", "messages": True} if kernels == "messages" else {"kernels": kernels}
    one = ranks.load(case.directory, layout, **settings)
    assert {facts["stage"] for facts in one.facts} == {STAGES[kernels]}
    if layout.tp > 1:
        assert {facts["lanes"] for facts in one.facts} == {"GroupedLanes" if kernels == "native" else "LaneGroup"}
    batch = sequences(case)
    run(one, batch[:2], 3)
    while any(len(s.output) < OUTPUT for s in batch):
        step(one, [s for s in batch if len(s.output) < OUTPUT], chunk=140)
    assert [s.output_ids for s in batch] == list(case.answers)


HANDOFFS = [(Parallel(2, 1), Parallel(1, 1)), (Parallel(1, 1), Parallel(2, 1)), (Parallel(2, 2), Parallel(1, 2))]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("prefill", "decode"), HANDOFFS, ids=lambda layout: str(layout))
def test_a_handoff_between_layouts_changes_no_token(ranks, cases, prefill, decode, family):
    """Prompts are read under one layout and block size, answers written under another; the KV bytes are counted."""
    case = cases[family]
    p = ranks.load(case.directory, prefill, name="prefill")
    d = ranks.load(case.directory, decode, first=prefill.ranks, name="decode", block_size=8, pool_blocks=128)
    batch = sequences(case)
    run(p, batch, 1)
    free = iter(range(127, -1, -1))
    shape = p.spec
    for number, sequence in enumerate(batch):
        total = len(sequence.prompt)
        table = tuple(next(free) for _ in range(-(-(total + OUTPUT) // 8)))
        ticket = make_ticket(number, p.ref, d.ref, total, fingerprint=shape.fingerprint)
        d.open_ticket(ticket, table)
        p.send_stage(ticket, d.address, 0, total, sequence.blocks, True)
        sent, stored = p.event(StageSent), d.event(StageStored)
        assert (stored.start, stored.end) == (0, total)
        heads = shape.layers * shape.kv_heads * KvCut(decode, shape.layers, shape.kv_heads).copies
        tokens = -(-total // shape.block_size) * shape.block_size  # whole blocks travel
        assert sent.nbytes == stored.nbytes == tokens * 2 * heads * shape.head_dim * 4
        sequence.blocks = table
    run(d, batch, OUTPUT)
    assert [s.output_ids for s in batch] == list(case.answers)
    p.close()
    d.close()


def test_a_rank_reads_and_keeps_its_share_only(ranks, cases):
    """Of 3 layers, 4 heads and 2 KV heads; what a rank reads is what it keeps."""
    whole = Engine.load(EngineConfig(model=str(cases["llama"].directory), pool_blocks=96))
    eight = ranks.load(cases["llama"].directory, Parallel(4, 2))
    assert [facts["pool"] for facts in eight.facts] == [(96, 2, 2, 1, 16, 16)] * 4 + [(96, 1, 2, 1, 16, 16)] * 4
    assert {facts["spec"] for facts in eight.facts} == {whole.spec}
    for facts in eight.facts:
        assert facts["read"] <= facts["weights"] < whole.weight_bytes / 3  # float32 as stored; padding is not read
    two = ranks.load(cases["llama"].directory, Parallel(2, 1))
    twice = 1.02  # norms and padding
    assert sum(facts["weights"] for facts in two.facts) < whole.weight_bytes * twice


@pytest.mark.parametrize("layout", [Parallel(2, 1), Parallel(1, 2), Parallel(2, 2)], ids=str)
def test_sampling_and_logprobs_are_those_of_one_rank(ranks, cases, layout):
    case = cases["qwen3"]
    one = Engine.load(EngineConfig(model=str(case.directory), pool_blocks=96))
    cut = ranks.load(case.directory, layout)
    wanted = Sampling(temperature=0.8, top_p=0.9, seed=11, logprobs=3, repetition_penalty=1.2)
    expected = complete(one, case.prompts[1], 6, sampling=wanted)
    found = complete(cut, case.prompts[1], 6, sampling=wanted)
    assert [t.id for t in found] == [t.id for t in expected]
    for token, same in zip(found, expected, strict=True):
        assert token.logprob == pytest.approx(same.logprob, abs=1e-4)
        assert [i for i, _ in token.top] == [i for i, _ in same.top]


@pytest.mark.parametrize("layout", [Parallel(2, 1), Parallel(2, 2)], ids=str)
def test_random_weights_are_the_same_model_however_it_is_cut(ranks, cases, layout):
    """Benchmarks load them; a name gives the same tensor, and a rank its slice of it."""
    name = f"random:{cases['llama'].directory}"
    one = Engine.load(EngineConfig(model=name, pool_blocks=96))
    cut = ranks.load(name, layout)
    prompt = cases["llama"].prompts[1]
    wanted = Sampling(temperature=0.0, logprobs=2)
    expected, found = complete(one, prompt, 3, sampling=wanted), complete(cut, prompt, 3, sampling=wanted)
    for token, same in zip(found, expected, strict=True):
        assert (token.id, token.logprob) == (same.id, pytest.approx(same.logprob, abs=1e-4))


def test_torch_too_sums_in_shared_memory(ranks, cases):
    """Native kernels are there, but do not fit: they keep no KV of another dtype."""
    case, settings = cases["opt"], {"kv_dtype": "bfloat16"}
    one = Engine.load(EngineConfig(model=str(case.directory), pool_blocks=96, **settings))
    cut = ranks.load(case.directory, Parallel(2, 1), **settings)
    assert [(facts["stage"], facts["lanes"]) for facts in cut.facts] == [("TorchStage", "GroupedLanes")] * 2
    wanted = Sampling(temperature=0.0, logprobs=3)
    expected, found = (complete(engine, case.prompts[2], 1, sampling=wanted)[0] for engine in (one, cut))
    assert (found.id, found.logprob) == (expected.id, pytest.approx(expected.logprob, abs=0.01))


@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_bfloat16_is_near(ranks, cases, kernels):
    case = cases["llama"]
    exact = Engine.load(EngineConfig(model=str(case.directory), pool_blocks=96))
    low = ranks.load(case.directory, Parallel(2, 2), dtype="bfloat16", kernels=kernels)
    wanted = Sampling(temperature=0.0, logprobs=VOCAB_SIZE)
    a = dict(complete(exact, case.prompts[2], 1, sampling=wanted)[0].top)
    b = dict(complete(low, case.prompts[2], 1, sampling=wanted)[0].top)
    assert max(abs(a[i] - b[i]) for i in a if a[i] > -8) < 0.35


@pytest.mark.parametrize(
    ("layout", "words"),
    [(Parallel(3, 1), "--tp 3 does not divide"), (Parallel(1, 4), "--pp 4 is more stages")],
    ids=str,
)
def test_a_cut_that_cannot_be_is_refused_with_a_sentence(ranks, cases, layout, words):
    with pytest.raises(UnsupportedModel, match=words):
        ranks.load(cases["llama"].directory, layout)


@pytest.mark.parametrize(("layout", "without"), [(Parallel(2, 1), 1), (Parallel(2, 2), 2)], ids=str)
def test_where_one_rank_cannot_do_native_all_do_torch(ranks, cases, layout, without):
    """Lanes and stages of the two kinds would not understand each other."""
    case = cases["qwen2"]
    cut = ranks.load(case.directory, layout, no_compiler_at=without)
    assert [facts["stage"] for facts in cut.facts] == ["TorchStage"] * layout.ranks
    batch = sequences(case)
    run(cut, batch, OUTPUT)
    assert [s.output_ids for s in batch] == list(case.answers)
    with pytest.raises(ModelError, match="native kernels were asked for, but another rank has no"):
        ranks.load(case.directory, layout, no_compiler_at=without, kernels="native")


def test_ranks_agree_on_the_steps_that_are_native(ranks, cases):
    """Where oneDNN has matrix tiles, longer steps are torch's; machines may differ in what they have."""
    case = cases["llama3"]
    cut = ranks.load(case.directory, Parallel(2, 2), most_rows=(None, 20, 8, 60))
    assert [facts["stage"] for facts in cut.facts] == ["BothStages"] * 4
    batch = sequences(case)
    run(cut, batch, OUTPUT)
    assert [s.output_ids for s in batch] == list(case.answers)
