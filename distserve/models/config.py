"""A model's shape, read from a Hugging Face ``config.json``; refusals of what we cannot run.

Plain JSON in, a frozen value out: no import of transformers, so that a directory is understood in milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distserve.models.errors import ModelNotFound, UnsupportedModel
from distserve.models.files import BadJson, read_object
from distserve.models.rope import Rope, parse_rope

# The most that a field may say. Far above any model there is: a damaged number must not become an allocation.
_MOST = {
    "vocab_size": 1 << 22,
    "hidden": 1 << 17,
    "intermediate": 1 << 20,
    "layers": 1 << 10,
    "heads": 1 << 11,
    "kv_heads": 1 << 11,
    "head_dim": 1 << 11,
    "max_positions": 1 << 25,
}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What the forward pass needs to know. ``rope`` is None for learned positions (OPT)."""

    architecture: str
    vocab_size: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int  # the longest sequence the model supports
    norm_eps: float
    tied: bool  # the head shares the embedding's weight
    eos_token_ids: tuple[int, ...]
    rope: Rope | None
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    final_norm: bool = True
    sliding_window: int | None = None


def read_config(directory: Path) -> ModelConfig:
    """The configuration in ``directory``. Raises ModelNotFound or UnsupportedModel with a sentence."""
    raw = _read_json(directory / "config.json")
    generation = directory / "generation_config.json"
    if generation.is_file():
        eos = _read_json(generation).get("eos_token_id")
        if eos is not None:
            raw["eos_token_id"] = eos
    try:
        return parse_config(raw)
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{directory / 'config.json'}: {error}") from error


def parse_config(raw: Mapping[str, Any]) -> ModelConfig:
    """A configuration from the decoded JSON. Raises UnsupportedModel."""
    architecture = _architecture(raw)
    if "quantization_config" in raw:
        raise UnsupportedModel("quantized checkpoints are not supported; use the unquantized weights or a GGUF file")
    try:
        config = _PARSERS[architecture](architecture, raw)
    except KeyError as missing:
        raise UnsupportedModel(f"config.json of a {architecture} lacks {missing}") from missing
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise UnsupportedModel(f"a field of this {architecture} is no number where one is needed: {error}") from error
    _check(config)
    return config


def _check(config: ModelConfig) -> None:
    """Raises UnsupportedModel for numbers that no model has."""
    for name, most in _MOST.items():
        if not 1 <= getattr(config, name) <= most:
            raise UnsupportedModel(f"{name} is {getattr(config, name)}, but must be from 1 to {most}")
    if config.heads % config.kv_heads:
        raise UnsupportedModel(f"{config.heads} heads cannot share {config.kv_heads} KV heads evenly")
    if not 0 < config.norm_eps < 1:
        raise UnsupportedModel(f"the norm's epsilon is {config.norm_eps:g}, but must be between 0 and 1")
    if not all(isinstance(i, int) and 0 <= i < config.vocab_size for i in config.eos_token_ids):
        raise UnsupportedModel(f"an eos_token_id is not in the vocabulary of {config.vocab_size}")
    if config.rope is not None:
        _check_rope(config.rope, config.head_dim)


def _check_rope(rope: Rope, head_dim: int) -> None:
    if head_dim % 2:
        raise UnsupportedModel(f"rotary positions need an even head_dim, not {head_dim}")
    numbers = (rope.theta, rope.factor, rope.low_freq_factor, rope.high_freq_factor)
    if not all(0 < number < math.inf for number in numbers) or rope.original_length < 1:
        raise UnsupportedModel("a number of the rope settings is not above zero")
    if rope.kind == "llama3" and rope.low_freq_factor == rope.high_freq_factor:
        raise UnsupportedModel("low_freq_factor and high_freq_factor of the rope settings must differ")


def _architecture(raw: Mapping[str, Any]) -> str:
    listed = raw.get("architectures")
    known = str(raw.get("model_type"))
    named = listed[0] if isinstance(listed, list) and listed else _BY_MODEL_TYPE.get(known, known)
    if not isinstance(named, str) or named not in _PARSERS:
        said = named if isinstance(named, str) else "of no name"
        raise UnsupportedModel(f"architecture {said:.80} is not supported; supported are {', '.join(sorted(_PARSERS))}")
    return named


def _rotary_decoder(architecture: str, raw: Mapping[str, Any], **features: bool) -> ModelConfig:
    """The Llama family: RMS norm, rotary positions, gated SiLU."""
    if raw.get("hidden_act", "silu") != "silu":
        activation = f"{raw['hidden_act']!s:.80}"
        raise UnsupportedModel(f'activation "{activation}" is not supported for {architecture}; only silu is')
    heads, hidden = int(raw["num_attention_heads"]), int(raw["hidden_size"])
    max_positions = int(raw.get("max_position_embeddings", 2048))
    window = _sliding_window(raw)
    rope = parse_rope(raw, max_positions)
    if rope.kind == "dynamic":
        max_positions = rope.original_length
    return ModelConfig(
        architecture=architecture,
        vocab_size=int(raw["vocab_size"]),
        hidden=hidden,
        intermediate=int(raw["intermediate_size"]),
        layers=int(raw["num_hidden_layers"]),
        heads=heads,
        kv_heads=int(raw.get("num_key_value_heads") or heads),
        head_dim=int(raw.get("head_dim") or hidden // heads),
        max_positions=max_positions if window is None else min(max_positions, window),
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        tied=bool(raw.get("tie_word_embeddings", False)),
        eos_token_ids=_token_ids(raw.get("eos_token_id")),
        rope=rope,
        sliding_window=window,
        **features,
    )


def _llama(architecture: str, raw: Mapping[str, Any]) -> ModelConfig:
    bias = bool(raw.get("attention_bias", False))
    return _rotary_decoder(
        architecture, raw, qkv_bias=bias, output_bias=bias, mlp_bias=bool(raw.get("mlp_bias", False))
    )


def _qwen2(architecture: str, raw: Mapping[str, Any]) -> ModelConfig:
    return _rotary_decoder(architecture, raw, qkv_bias=True)


def _qwen3(architecture: str, raw: Mapping[str, Any]) -> ModelConfig:
    bias = bool(raw.get("attention_bias", False))
    return _rotary_decoder(architecture, raw, qkv_bias=bias, output_bias=bias, qk_norm=True)


def _opt(architecture: str, raw: Mapping[str, Any]) -> ModelConfig:
    hidden, heads = int(raw["hidden_size"]), int(raw["num_attention_heads"])
    if int(raw.get("word_embed_proj_dim", hidden)) != hidden:
        raise UnsupportedModel("OPT with word_embed_proj_dim other than hidden_size (opt-350m) is not supported")
    if not raw.get("do_layer_norm_before", True):
        raise UnsupportedModel("OPT with do_layer_norm_before=false (opt-350m) is not supported")
    if raw.get("activation_function", "relu") != "relu":
        raise UnsupportedModel(f'OPT with activation "{raw["activation_function"]}" is not supported; only relu is')
    if not raw.get("layer_norm_elementwise_affine", True):
        raise UnsupportedModel("OPT without layer norm weights (layer_norm_elementwise_affine) is not supported")
    bias = bool(raw.get("enable_bias", True))
    return ModelConfig(
        architecture=architecture,
        vocab_size=int(raw["vocab_size"]),
        hidden=hidden,
        intermediate=int(raw["ffn_dim"]),
        layers=int(raw["num_hidden_layers"]),
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        max_positions=int(raw["max_position_embeddings"]),
        norm_eps=1e-5,
        tied=bool(raw.get("tie_word_embeddings", True)),
        eos_token_ids=_token_ids(raw.get("eos_token_id")),
        rope=None,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        final_norm=not raw.get("_remove_final_layer_norm", False),
    )


def _sliding_window(raw: Mapping[str, Any]) -> int | None:
    """The window some layer looks through, if any. Qwen writes a window that ``use_sliding_window`` switches off."""
    if not raw.get("use_sliding_window", True) or raw.get("sliding_window") is None:
        return None
    kinds = raw.get("layer_types")
    if kinds is not None and "sliding_attention" not in kinds:
        return None
    return int(raw["sliding_window"])


def _token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (int(value),)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except FileNotFoundError as error:
        raise ModelNotFound(f"{path} does not exist; a model directory holds config.json and safetensors") from error
    except (BadJson, OSError) as error:
        raise ModelNotFound(f"{path} {error}; download the model again") from error


_PARSERS: dict[str, Callable[[str, Mapping[str, Any]], ModelConfig]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _llama,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "OPTForCausalLM": _opt,
}
_BY_MODEL_TYPE = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "opt": "OPTForCausalLM",
}
