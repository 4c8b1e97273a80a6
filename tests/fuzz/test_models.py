"""Model files from anywhere: configuration, index, weights or GGUF load or are refused by name, at no cost."""

from __future__ import annotations

import json
import resource
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from distserve.models.config import read_config
from distserve.models.errors import ModelError, ModelNotFound, UnsupportedModel, WeightsError
from distserve.models.gguf_check import check_gguf
from distserve.models.gguf_convert import convert_gguf
from distserve.models.weights import SafetensorWeights, weight_identity
from tests.fuzz.hostile import bent_bytes, bent_json, bounded, nested
from tests.models.test_catalog import write_gguf
from tests.tiny_models import FAMILIES, make_tiny

MOST_GROWTH_BYTES = 600 << 20
CONFIGS = {
    name: {k: v for k, v in kind(**given).to_dict().items() if v is not None} | {"architectures": [architecture]}
    for (name, (kind, given)), architecture in zip(
        FAMILIES.items(),
        ("Llama", "Llama", "Llama", "Mistral", "Qwen2", "Qwen3", "OPT"),
        strict=True,
    )
    for architecture in [architecture + "ForCausalLM"]
}
KNOWN = ("head_dim", "rope_scaling", "quantization_config", "layer_types", "sliding_window", "partial_rotary_factor")


@pytest.fixture(scope="module", autouse=True)
def memory_stays_bounded() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_GROWTH_BYTES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def refused_by_name(error: ModelError, name: str) -> None:
    assert name in str(error) and "Traceback" not in str(error) and len(str(error)) < 4000


# ── configurations ───────────────────────────────────────────────────────────────────────────────────────────────────


def read_written(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    try:
        config = read_config(folder)
    except (ModelNotFound, UnsupportedModel) as error:
        refused_by_name(error, "config.json")
        return
    assert min(config.layers, config.heads, config.head_dim, config.vocab_size, config.max_positions) > 0


@bounded(70)
@given(data=st.data())
def test_configurations_near_valid_ones(folder: Path, data: st.DataObject) -> None:
    valid = CONFIGS[data.draw(st.sampled_from(sorted(CONFIGS)))]
    read_written(folder, json.dumps(data.draw(bent_json(valid, (*valid, *KNOWN)))).encode())


@bounded(80)
@given(data=st.data())
def test_configurations_of_broken_bytes(folder: Path, data: st.DataObject) -> None:
    long = b'{"vocab_size": ' + b"9" * 5000 + b"}"
    odd = (b"", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, long, b"NaN", b"null")
    read_written(folder, data.draw(bent_bytes(json.dumps(CONFIGS["llama3"]).encode()) | st.sampled_from(odd)))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_hidden_layers": 10**9}, "layers is 1000000000, but must be from 1 to 1024"),
        ({"num_attention_heads": 0, "head_dim": None}, "division|zero|heads is 0"),
        ({"num_key_value_heads": 3}, "cannot share 3 KV heads"),
        ({"hidden_size": "wide"}, "no number"),
        ({"vocab_size": float("inf")}, "no number"),
        ({"head_dim": 15}, "even head_dim"),
        ({"architectures": "LlamaForCausalLM", "model_type": 5}, "not supported"),
        ({"architectures": [["LlamaForCausalLM"]]}, "of no name is not supported"),
        ({"eos_token_id": [2, "x"]}, "eos_token_id"),
        ({"rope_parameters": [1]}, "no number"),
        ({"layer_types": None, "sliding_window": -1}, "max_positions is -1"),
    ],
)
def test_numbers_that_no_model_has(folder: Path, fields: dict[str, Any], said: str) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIGS["llama3"] | fields))
    with pytest.raises(UnsupportedModel, match=r"config\.json: .*" + said):
        read_config(folder)


# ── safetensors ──────────────────────────────────────────────────────────────────────────────────────────────────────

TENSORS = {"a": (4, 6), "b.weight": (5,)}


@pytest.fixture(scope="module")
def weights(folder: Path) -> bytes:
    file = folder / "whole.safetensors"
    save_file({name: torch.ones(shape) for name, shape in TENSORS.items()}, file)
    return file.read_bytes()


def take_all(directory: Path) -> None:
    try:
        with SafetensorWeights(directory, torch.float32, torch.device("cpu"), None) as found:
            for name, shape in TENSORS.items():
                assert found.take(name, shape).shape == shape
        weight_identity(directory)
    except WeightsError as error:
        named = "safetensors" in str(error) or str(directory) in str(error)
        assert named and "Traceback" not in str(error), error


@bounded(80)
@given(data=st.data())
def test_weights_of_broken_bytes(folder: Path, weights: bytes, data: st.DataObject) -> None:
    directory = folder / "single"
    directory.mkdir(exist_ok=True)
    head = 8 + struct.unpack_from("<Q", weights)[0]
    whole = data.draw(bent_bytes(weights[:head])) + weights[head:] if data.draw(st.booleans()) else None
    (directory / "model.safetensors").write_bytes(whole or data.draw(bent_bytes(weights)))
    take_all(directory)


@bounded(60)
@given(data=st.data())
def test_indices_near_valid_ones(folder: Path, weights: bytes, data: st.DataObject) -> None:
    directory = folder / "sharded"
    directory.mkdir(exist_ok=True)
    (directory / "one.safetensors").write_bytes(weights)
    valid = {"metadata": {"total_size": 116}, "weight_map": dict.fromkeys(TENSORS, "one.safetensors")}
    content = json.dumps(data.draw(bent_json(valid))).encode()
    (directory / "model.safetensors.index.json").write_bytes(data.draw(st.just(content) | bent_bytes(content)))
    take_all(directory)


@pytest.mark.parametrize("file", ["../one.safetensors", "/etc/passwd", "", "..", "a\0b", 5, None, ["x"]])
def test_an_index_does_not_lead_out_of_the_directory(folder: Path, weights: bytes, file: Any) -> None:
    directory = folder / "led"
    directory.mkdir(exist_ok=True)
    (folder / "one.safetensors").write_bytes(weights)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(WeightsError, match=r"index\.json is damaged"):
        SafetensorWeights(directory, torch.float32, torch.device("cpu"), None)


def test_an_index_of_lists_within_lists(folder: Path) -> None:
    directory = folder / "led"
    directory.mkdir(exist_ok=True)
    (directory / "model.safetensors.index.json").write_text("[" * 100_000)
    with pytest.raises(WeightsError, match=r"index\.json is damaged"):
        SafetensorWeights(directory, torch.float32, torch.device("cpu"), None)
    with pytest.raises(ModelNotFound, match="within each other"):
        (directory / "config.json").write_text(json.dumps({"a": nested(900, list)}).replace("[[[", "[" * 99_999))
        read_config(directory)


# ── GGUF ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def gguf(folder: Path) -> bytes:
    model = make_tiny("llama", folder, intermediate_size=128, num_hidden_layers=1)
    return write_gguf(model, folder / "whole.gguf", GGMLQuantizationType.F32).read_bytes()


def head_of(gguf: bytes) -> int:
    """About where its descriptions end and its tensors begin."""
    return gguf.rindex(b"output.weight") + 60


@bounded(70)
@given(data=st.data())
def test_gguf_headers(folder: Path, gguf: bytes, data: st.DataObject) -> None:
    """What the check lets through is checked again by the reader in the next test; here it is many."""
    head = head_of(gguf)
    path = folder / "bent.gguf"
    path.write_bytes(data.draw(bent_bytes(gguf[:head])) + gguf[head:])
    try:
        check_gguf(path)
    except WeightsError as error:
        refused_by_name(error, "bent.gguf")


@bounded(12)
@given(data=st.data())
def test_gguf_files_convert_or_are_refused(folder: Path, gguf: bytes, data: st.DataObject) -> None:
    head = head_of(gguf)
    path, target = folder / "bent.gguf", folder / "converted"
    early = data.draw(st.integers(24, 600))  # among the fields that name sizes
    path.write_bytes(gguf[:early] + data.draw(bent_bytes(gguf[early:head])) + gguf[head:])
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    try:
        convert_gguf(path, target)
    except ModelError as error:
        refused_by_name(error, "bent.gguf")
        return
    assert (target / "config.json").is_file() and list(target.glob("*.safetensors"))


def patched(gguf: bytes, key: bytes, value: bytes, skip: int = 4) -> bytes:
    """The file with the value of one field overwritten; ``skip`` bytes (its type) after the key are kept."""
    at = gguf.index(key) + len(key) + skip
    return gguf[:at] + value + gguf[at + len(value) :]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda g: g[:4] + b"\x09" + g[5:], "version is 9"),
        (lambda g: g[:8] + b"\xff" * 8 + g[16:], "tensors do not fit"),
        (lambda g: g[:16] + b"\xff" * 8 + g[24:], "fields and"),
        (lambda g: patched(g, b"tokenizer.ggml.token_type", b"\xff" * 7, 8), "in the middle of its header"),
        (lambda g: patched(g, b"tokenizer.ggml.tokens", b"\xff" * 7, 8), "texts of"),
        (lambda g: patched(g, b"general.name", b"\xff" * 7), "in the middle of its header"),
        (lambda g: patched(g, b"llama.block_count", b"\xff" * 4), "layers, but holds"),
        (lambda g: patched(g, b"token_embd.weight", b"\x09\0\0\0", 0), "has 9 dimensions"),
        (lambda g: patched(g, b"token_embd.weight", b"\xff" * 7, 4), "which cannot be|would end at"),
        (lambda g: g[:-1000], "would end at byte"),
        (lambda g: g[:3000], "in the middle of its header|do not fit"),
        (lambda g: b"", "too short"),
    ],
)
def test_gguf_damage_is_named(folder: Path, gguf: bytes, damage: Any, said: str) -> None:
    path = folder / "damaged.gguf"
    path.write_bytes(damage(gguf))
    with pytest.raises(WeightsError, match=rf"damaged\.gguf is not a readable GGUF file \(.*({said})"):
        check_gguf(path)


@pytest.mark.parametrize("key", [b"llama.embedding_length", b"llama.vocab_size", b"llama.context_length"])
def test_gguf_sizes_that_no_model_has_are_refused_before_anything_is_built(
    folder: Path, gguf: bytes, key: bytes
) -> None:
    path, target = folder / "huge.gguf", folder / "huge"
    path.write_bytes(patched(gguf, key, b"\xff\xff\xff\x7f"))
    target.mkdir(exist_ok=True)
    with pytest.raises(ModelError, match=r"huge\.gguf cannot be converted: "):
        convert_gguf(path, target)
