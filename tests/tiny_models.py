"""Tiny random models of every supported family, as Hugging Face directories, for tests that need a whole model.

Owns the shapes and the throw-away tokenizer. Weights are seeded, so two processes that ask for the same family get
the same model. Knows nothing of the engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama import LlamaConfig
from transformers.models.mistral import MistralConfig
from transformers.models.opt import OPTConfig
from transformers.models.qwen2 import Qwen2Config
from transformers.models.qwen3 import Qwen3Config

VOCAB_SIZE = 384
MAX_MODEL_LEN = 512
BOS, EOS = "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CORPUS = (
    "The quick brown fox jumps over the lazy dog.",
    "A cluster reads the prompt in one place and writes the answer in another.",
    "user assistant system: what is the capital of France? The capital of France is Paris.",
    "def add(a, b):\n    return a + b\n# 0123456789",
) * 8

_DECODER: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_MODEL_LEN,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_OPT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "ffn_dim": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_MODEL_LEN,
    "word_embed_proj_dim": 64,
    "init_std": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

# family → (configuration class, its arguments)
FAMILIES: Mapping[str, tuple[Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, _DECODER),
    "llama_tied": (LlamaConfig, _DECODER | {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "llama3": (LlamaConfig, _DECODER | {"rope_parameters": _LLAMA3_ROPE, "num_key_value_heads": 4}),
    "mistral": (MistralConfig, _DECODER | {"sliding_window": None, "head_dim": 16}),
    "qwen2": (Qwen2Config, _DECODER | {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, _DECODER | {"head_dim": 32}),
    "opt": (OPTConfig, _OPT),
}


def make_tiny(family: str, directory: Path, *, seed: int = 0, max_shard_size: str = "1GB", **overrides: Any) -> Path:
    """Write a tiny random model of ``family`` (a key of FAMILIES) and its tokenizer to ``directory/family``.

    Float32 weights, biases and norm weights random as well, so that no term of the forward pass is left untested.
    ``overrides`` replace fields of the configuration. Returns the directory.
    """
    config_class, arguments = FAMILIES[family]
    config = config_class(**(arguments | overrides))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _randomize_vectors(model, seed)
    target = directory / family
    model.generation_config.eos_token_id = 2
    model.save_pretrained(target, max_shard_size=max_shard_size)
    tiny_tokenizer().save_pretrained(target)
    return target


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on four sentences; any text round-trips. At most VOCAB_SIZE entries."""
    tokenizer = Tokenizer(BPE(unk_token=None))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>", BOS, EOS],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token="<|endoftext|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


@torch.no_grad()
def _randomize_vectors(model: torch.nn.Module, seed: int) -> None:
    """Biases start at zero and norm weights at one; shift them, or a forgotten bias would pass unnoticed."""
    generator = torch.Generator().manual_seed(seed + 1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
