"""Throw-away tokenizers of both kinds models use: byte-level BPE, and sentencepiece-like BPE with byte fallback."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

CORPUS = (
    "The quick brown fox jumps over the lazy dog.",
    "A cluster reads the prompt in one place and writes the answer in another.",
    "user assistant system: what is the capital of France? The capital of France is Paris.",
    "def add(a, b):\n    return a + b\n# 0123456789",
    "Grüße aus Köln, 世界, 🙂🙃",
) * 4
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3, Qwen and SmolLM2: every text round-trips."""
    tokenizer = Tokenizer(BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=480,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def sentencepiece() -> Tokenizer:
    """As Llama 2 and Mistral: "▁" for a space, unknown characters as bytes, a BOS in front."""
    letters = sorted({c for text in CORPUS for c in text if c.isascii() and c.isprintable() and c != " "})
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *letters]
    merges = [("▁", letter) for letter in "abcdefghijklmnopqrstuvwxyzT"] + [("h", "e"), ("▁t", "he"), ("e", "r")]
    vocab = {piece: i for i, piece in enumerate([*pieces, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    return tokenizer


def save(tokenizer: Tokenizer, directory: Path, template: str | None = TEMPLATE) -> Path:
    """Write what ``TextCodec.load`` reads."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    end = {"__type": "AddedToken", "content": "<|im_end|>", "special": True}
    names = {"bos_token": "<|im_start|>", "eos_token": end, "tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(names | {"chat_template": template}))
    return directory
