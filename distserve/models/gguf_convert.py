"""A GGUF file rewritten as a Hugging Face directory: dequantized safetensors, configuration, tokenizer, chat template.

Slow (half a minute for a small model) and hungry (float32 weights in memory): done once, by ``catalog``. Reading is
transformers' own; what it leaves behind that would mislead later loaders is put right here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from distserve.models.config import parse_config
from distserve.models.errors import ModelError, WeightsError
from distserve.models.gguf_check import check_gguf

_FLOAT_FILES = {0: torch.float32, 1: torch.float16}  # general.file_type of unquantized files; all others: bfloat16


def convert_gguf(gguf: Path, directory: Path) -> None:
    """Write the model of ``gguf`` into the existing empty ``directory``.

    Raises WeightsError for a damaged file, ModelError for one that makes no model we can run.
    """
    check_gguf(gguf)
    dtype = _stored_dtype(gguf)
    try:
        _convert(gguf, directory, dtype)
    except ModelError as error:
        raise ModelError(f"{gguf} cannot be converted: {error}") from error
    except Exception as error:  # whatever transformers and tokenizers raise for contents that make no sense to them
        why = str(error) or type(error).__name__
        raise ModelError(f"{gguf} cannot be converted: {why}") from error
    for file in directory.iterdir():
        file.chmod(0o644)


def _convert(gguf: Path, directory: Path, dtype: torch.dtype) -> None:
    raw = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    architecture = _class_name(raw)
    config = _clean_config(raw.to_diff_dict(), architecture, dtype)
    parse_config(config)  # before anything of the sizes it names is built
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    save_file(_dequantized(gguf, raw, dtype), directory / "model.safetensors", metadata={"format": "pt"})
    _write_json(directory / "config.json", config)
    eos = {key: config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(directory / "generation_config.json", {k: v for k, v in eos.items() if v is not None})
    tokenizer.save_pretrained(directory)
    _clean_tokenizer(directory / "tokenizer_config.json", tokenizer.chat_template, config["max_position_embeddings"])


def _stored_dtype(gguf: Path) -> torch.dtype:
    try:
        kind = GGUFReader(gguf).get_field("general.file_type")
    except (ValueError, IndexError, OSError) as error:
        raise WeightsError(f"{gguf} is not a readable GGUF file ({error}); download it again") from error
    return torch.bfloat16 if kind is None else _FLOAT_FILES.get(int(kind.contents()), torch.bfloat16)


def _class_name(config: Any) -> str:
    """The architecture's class for causal language models."""
    mapping: Any = AutoModelForCausalLM._model_mapping
    return str(mapping[type(config)].__name__)


def _dequantized(gguf: Path, config: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors under their Hugging Face names.

    Not through ``from_pretrained``: that needs the accelerate package, and what it returns refuses to be saved.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)  # names and shapes only
    found = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=model, torch_dtype=dtype)["tensors"]
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in found.items()}
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    return tensors


def _clean_config(config: dict[str, Any], architecture: str, dtype: torch.dtype) -> dict[str, Any]:
    """Without the traces of GGUF: its quantization, its title as a path, and epsilon as it came out of float32."""
    config.pop("quantization_config", None)
    for title in ("_name_or_path", "_model_name_or_path"):
        config.pop(title, None)
    if "rms_norm_eps" in config:
        config["rms_norm_eps"] = float(f"{config['rms_norm_eps']:.6g}")
    return config | {"architectures": [architecture], "dtype": str(dtype).removeprefix("torch.")}


def _clean_tokenizer(path: Path, chat_template: Any, max_length: int) -> None:
    """A tokenizer class that every version of transformers knows, and a length that is a length."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length}
    config.pop("gguf_file", None)
    if isinstance(chat_template, str):
        config["chat_template"] = chat_template
    _write_json(path, config)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
