"""Architecture facts against published parameter counts and KV sizes; what a cut by TP and PP holds and leaves."""

from __future__ import annotations

import json

import pytest

from distserve_planner.hardware import GIB, gpu_described, gpu_named
from distserve_planner.memory import MemoryRule, room, shapes_that_fit, why_nothing_fits
from distserve_planner.models import known_models, load_model
from distserve_planner.refusal import CannotPlan

PUBLISHED = {  # parameters in 10^9, KV bytes a token at 2 bytes an element
    "opt-13b": (12.85, 819200),
    "opt-66b": (65.72, 2359296),
    "opt-175b": (174.60, 4718592),
    "llama-2-7b": (6.74, 524288),
    "llama-2-13b": (13.02, 819200),
    "llama-2-70b": (68.98, 327680),
    "llama-3.1-8b": (8.03, 131072),
    "llama-3.1-70b": (70.55, 327680),
    "llama-3.1-405b": (405.85, 516096),
    "qwen2.5-0.5b": (0.49, 12288),
    "qwen2.5-1.5b": (1.54, 28672),
    "qwen2.5-3b": (3.09, 36864),
    "qwen2.5-7b": (7.62, 57344),
    "qwen2.5-14b": (14.77, 196608),
    "qwen2.5-32b": (32.76, 262144),
    "qwen2.5-72b": (72.71, 327680),
    "qwen3-0.6b": (0.60, 114688),
    "qwen3-1.7b": (1.72, 114688),
    "qwen3-4b": (4.02, 147456),
    "qwen3-8b": (8.19, 147456),
    "qwen3-14b": (14.77, 163840),
    "qwen3-32b": (32.76, 262144),
    "mixtral-8x7b": (46.70, 131072),
    "qwen3-30b-a3b": (30.53, 98304),
    "deepseek-v3": (671.03, 70272),
    "smollm2-135m": (0.13, 23040),
}

PAPER_CAPACITY = [  # (model, tp, pp, tokens) of the released simulator's own table for A100-80GB
    ("opt-13b", 1, 1, 66144),
    ("opt-13b", 2, 1, 163008),
    ("opt-13b", 1, 2, 163008),
    ("opt-66b", 4, 1, 78496),
    ("opt-66b", 4, 2, 212320),
    ("opt-175b", 8, 2, 192784),
]


def test_every_packaged_model_has_its_published_size():
    assert set(known_models()) == set(PUBLISHED)
    for name, (billions, kv_bytes) in PUBLISHED.items():
        facts = load_model(name)
        assert facts.parameters / 1e9 == pytest.approx(billions, abs=0.0051), name
        assert facts.kv_bytes_per_token() == kv_bytes, name


@pytest.mark.parametrize(("name", "tp", "pp", "tokens"), PAPER_CAPACITY)
def test_kv_capacity_agrees_with_the_papers_table(name, tp, pp, tokens):
    assert room(load_model(name), gpu_named("a100-80g"), tp, pp).kv_tokens == pytest.approx(tokens, rel=0.05)


def test_ranks_together_hold_the_model_and_little_more():
    for name in ("llama-3.1-70b", "opt-66b", "qwen3-30b-a3b"):
        facts = load_model(name)
        for tp, pp in ((1, 1), (2, 1), (4, 2), (1, 4)):
            held = tp * sum(facts.weight_bytes(tp, pp, stage) for stage in range(pp))
            assert facts.parameters * 2 <= held * 1.0001 <= facts.parameters * 2 * 1.03, (name, tp, pp)


def test_stages_cover_every_layer_once():
    facts = load_model("llama-3.1-405b")  # 126 layers: no power of two divides it
    assert facts.stage_layers(4) == (32, 32, 31, 31)
    assert [layer for stage in facts.stages(4) for layer in stage] == list(range(126))


def test_kv_heads_are_copied_when_there_are_more_ranks():
    facts = load_model("llama-3.1-8b")
    assert facts.kv_bytes_per_layer(8) == facts.kv_bytes_per_layer(16) == 2 * 128 * 2


@pytest.mark.parametrize(
    ("tp", "pp", "reason"), [(3, 1, "40 attention heads"), (1, 41, "40 layers"), (0, 1, "at least 1")]
)
def test_a_cut_that_cannot_be_says_why(tp, pp, reason):
    facts = load_model("opt-13b")
    assert reason in (facts.why_not(tp, pp) or "")
    with pytest.raises(CannotPlan, match=reason):
        room(facts, gpu_named("a100"), tp, pp)


def test_names_are_forgiving_and_refusals_name_the_nearest():
    assert load_model("facebook/opt-13b") == load_model("OPT_13B")
    assert load_model("meta-llama/Llama-3.1-8B-Instruct").layers == 32
    with pytest.raises(CannotPlan, match=r"did you mean 'llama-3\.1-8b'"):
        load_model("llama-3.1-8")
    with pytest.raises(CannotPlan, match="did you mean 'h100'"):
        gpu_named("h1000")


def test_a_config_file_is_a_model(tmp_path):
    config = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
    config |= {
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
    }
    path = tmp_path / "mine" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(config))
    assert load_model(str(path)).parameters == load_model("llama-3.1-8b").parameters
    assert load_model(str(path)).name == "mine"
    path.write_text(json.dumps({k: v for k, v in config.items() if k != "vocab_size"}))
    with pytest.raises(CannotPlan, match="lacks 'vocab_size'"):
        load_model(str(path.parent))


def test_what_does_not_fit_says_what_would():
    facts, gpu = load_model("opt-175b"), gpu_named("a100")
    shapes = [(tp, 1) for tp in (1, 2, 4)]
    assert shapes_that_fit(facts, gpu, shapes, 2048) == []
    assert "8 of them in one instance would do" in why_nothing_fits(facts, gpu, shapes, 2048)
    fitting = shapes_that_fit(load_model("opt-13b"), gpu, [(1, 1), (2, 1), (3, 1)], 2048)
    assert [shape for shape, _ in fitting] == [(1, 1), (2, 1)]


def test_more_memory_never_holds_less():
    facts = load_model("llama-3.1-8b")
    sizes = [
        room(facts, gpu_described("x", {"like": "h100", "memory_gib": g}), 1, 1).kv_tokens for g in range(10, 90, 5)
    ]
    assert sizes == sorted(sizes)
    assert sizes[0] == 0 < sizes[-1]
    half = room(facts, gpu_named("h100"), 1, 1, MemoryRule(weight_dtype="fp8"))
    assert half.weight_bytes < 0.51 * room(facts, gpu_named("h100"), 1, 1).weight_bytes


def test_a_described_gpu_keeps_measured_tables_only_if_it_is_as_fast():
    assert gpu_described("a100-big", {"like": "a100", "memory_gib": 96}).tables == "a100"
    assert gpu_described("a100-slow", {"like": "a100", "hbm_gbs": 1000}).tables == ""
    mine = gpu_described("mine", {"memory_gib": 48, "hbm_gbs": 900, "tflops": 200})
    assert (mine.memory_bytes, mine.flops) == (48 * GIB, 200e12)
    with pytest.raises(CannotPlan, match="did you mean 'hbm_gbs'"):
        gpu_described("mine", {"memory_gib": 48, "hbm_gb": 900, "tflops": 200})
    with pytest.raises(CannotPlan, match="needs memory_gib"):
        gpu_described("mine", {"memory_gib": 48})
