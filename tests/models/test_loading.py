"""Weights and configurations that are missing, damaged, or not for us: named errors with a sentence; shards load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from distserve.engine.config import EngineConfig
from distserve.engine.runner import Engine
from distserve.models.errors import ModelError, ModelNotFound, UnsupportedModel, WeightsError
from tests.engine.driver import complete
from tests.tiny_models import make_tiny

PROMPT = tuple(range(10, 30))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("qwen2", tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(original, tmp_path / "model"))


def load(directory: Path) -> Engine:
    return Engine.load(EngineConfig(model=str(directory), pool_blocks=8))


def edit_config(directory: Path, **fields: Any) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def edit_tensors(directory: Path, **changes: torch.Tensor | None) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path) | changes
    save_file({k: v for k, v in tensors.items() if v is not None}, path, metadata={"format": "pt"})


def test_sharded_weights_are_the_same_model(original, tmp_path):
    sharded = make_tiny("qwen2", tmp_path, max_shard_size="60KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    assert complete(load(sharded), PROMPT, 8) == complete(load(original), PROMPT, 8)


def test_a_missing_shard_is_named(tmp_path):
    sharded = make_tiny("qwen2", tmp_path, max_shard_size="60KB")
    lost = sorted(sharded.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(WeightsError, match=f"lacks {lost.name}"):
        load(sharded)


def test_a_damaged_index_is_named(tmp_path):
    sharded = make_tiny("qwen2", tmp_path, max_shard_size="60KB")
    (sharded / "model.safetensors.index.json").write_text('{"metadata": {}}')
    with pytest.raises(WeightsError, match=r"index\.json is damaged"):
        load(sharded)


def test_no_weights(model):
    (model / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"neither model\.safetensors nor"):
        load(model)


@pytest.mark.parametrize("keep", [0, 5, 300, -1000])
def test_a_file_cut_short(model, keep):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WeightsError, match="damaged or cut short"):
        load(model)


def test_a_missing_tensor(model):
    edit_tensors(model, **{"model.layers.1.mlp.up_proj.weight": None})
    with pytest.raises(
        WeightsError, match=r'tensor "model\.layers\.1\.mlp\.up_proj\.weight" is in no safetensors file'
    ):
        load(model)


def test_a_tensor_of_another_shape(model):
    edit_tensors(model, **{"model.norm.weight": torch.ones(63)})
    with pytest.raises(WeightsError, match=r'"model\.norm\.weight" .* is \[63\], but config\.json asks for \[64\]'):
        load(model)


def test_quantized_tensors_are_refused(model):
    edit_tensors(model, **{"model.norm.weight": torch.ones(64, dtype=torch.int8)})
    with pytest.raises(WeightsError, match="quantized weights are not supported"):
        load(model)


def test_an_untied_model_without_head(model):
    edit_config(model, tie_word_embeddings=False)
    edit_tensors(model, **{"lm_head.weight": None})
    with pytest.raises(WeightsError, match=r"lm_head\.weight"):
        load(model)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM is not supported; supported are LlamaForCausalLM"),
        ({"architectures": ..., "model_type": "gpt2"}, "architecture gpt2 is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantized checkpoints are not supported"),
        ({"hidden_act": "gelu"}, 'activation "gelu" is not supported'),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, 'rope type "yarn" is not supported'),
        ({"partial_rotary_factor": 0.5}, "partial rotary"),
        ({"hidden_size": ...}, "lacks 'hidden_size'"),
    ],
)
def test_unsupported_configurations(model, fields, sentence):
    edit_config(model, **fields)
    with pytest.raises(UnsupportedModel, match=sentence):
        load(model)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [({"word_embed_proj_dim": 32}, "word_embed_proj_dim"), ({"do_layer_norm_before": False}, "do_layer_norm_before")],
)
def test_unsupported_opt(tmp_path, fields, sentence):
    model = make_tiny("opt", tmp_path)
    edit_config(model, **fields)
    with pytest.raises(UnsupportedModel, match=sentence):
        load(model)


def test_a_sliding_window_bounds_the_length(tmp_path):
    model = make_tiny("mistral", tmp_path, sliding_window=128)
    assert load(model).spec.max_model_len == 128
    with pytest.raises(ModelError, match="its attention window is 128"):
        Engine.load(EngineConfig(model=str(model), max_model_len=200))


def test_a_window_that_is_switched_off_bounds_nothing(model):
    edit_config(model, sliding_window=64, use_sliding_window=False)
    assert load(model).spec.max_model_len == 512


def test_model_type_alone_names_the_architecture(model, original):
    edit_config(model, architectures=...)
    assert complete(load(model), PROMPT, 4) == complete(load(original), PROMPT, 4)


def test_eos_of_the_generation_configuration_wins(model):
    (model / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert load(model).spec.eos_token_ids == (2, 7)


def test_directories_without_a_readable_configuration(tmp_path, model):
    with pytest.raises(ModelNotFound, match=r"config\.json does not exist"):
        load(tmp_path)
    (model / "config.json").write_text("{")
    with pytest.raises(ModelNotFound, match="not valid JSON"):
        load(model)


@pytest.mark.parametrize(
    ("family", "rope"),
    [
        ("llama", {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}),
        ("llama", {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}),
        ("llama", {"rope_type": "default", "rope_theta": 500000.0}),
    ],
)
def test_rope_variants_as_transformers(tmp_path, family, rope):
    directory = make_tiny(family, tmp_path, rope_parameters=rope)
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    out = reference.generate(
        torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert [t.id for t in complete(load(directory), PROMPT, 12)] == out[0, len(PROMPT) :].tolist()


def test_the_older_spelling_of_rope(tmp_path):
    new = make_tiny("llama3", tmp_path)
    old = Path(shutil.copytree(new, tmp_path / "old"))
    rope = json.loads((new / "config.json").read_text())["rope_parameters"]
    theta = rope.pop("rope_theta")
    edit_config(old, rope_parameters=..., rope_theta=theta, rope_scaling=rope)
    assert complete(load(old), PROMPT, 8) == complete(load(new), PROMPT, 8)
