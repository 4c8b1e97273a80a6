"""A model's words: text to token ids and back, and chats to text.

Owns the tokenizer and the chat template of one model, loaded from a Hugging Face style directory: ``tokenizer.json``
directly (fast), or through transformers when a model ships only older files. Immutable once loaded and safe to use
from several threads. Knows nothing of requests.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from distserve.gateway.template import ChatTemplate
from distserve.gateway.token_bytes import byte_reader

INLINE_CHARS = 4096
"""Text up to this long is encoded where it stands (well under a millisecond); longer text in a thread."""

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TextCodec:
    """Encodes and decodes one model's text."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None = None) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._template = template
        self._read_bytes = byte_reader(tokenizer)
        self._bytes: dict[int, bytes] = {}
        added = tokenizer.get_added_tokens_decoder()
        self._special = frozenset(token_id for token_id, token in added.items() if token.special)

    @classmethod
    def load(cls, directory: Path) -> TextCodec:
        """Read the tokenizer of the model in ``directory``.

        Raises ``FileNotFoundError`` or ``ValueError`` with a sentence that names the directory and what is wrong.
        """
        if not directory.is_dir():
            raise FileNotFoundError(f"There is no model directory {directory}; give one that holds a tokenizer.json.")
        try:
            config = _read_json(directory / "tokenizer_config.json")
            if not (directory / "tokenizer.json").exists():
                return _load_with_transformers(directory)
            return cls(_read_tokenizer(directory / "tokenizer.json"), _template(directory, config))
        except ValueError as error:
            raise ValueError(f"The tokenizer in {directory} cannot be read ({error}); fetch the model anew.") from error

    @property
    def has_chat(self) -> bool:
        return self._template is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of ``text``; with the tokenizer's own special tokens (such as BOS) unless told otherwise."""
        # The batch call releases the interpreter lock while it works; the single one does not.
        return tuple(self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)

    async def encode_aside(self, text: str, add_special_tokens: bool = True) -> tuple[int, ...]:
        """``encode``, off the event loop when the text is long."""
        if len(text) <= INLINE_CHARS:
            return self.encode(text, add_special_tokens)
        return await asyncio.to_thread(self.encode, text, add_special_tokens)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The tokenizer's own decoding of a whole text. Every id must be below 2**32."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special

    def token_bytes(self, token_id: int) -> bytes:
        """What the token stands for in the middle of a text, special tokens by their name."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._read_bytes(token_id)
        return found

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """A chat as text; its special tokens are already in it. Raises ``TemplateRefused``; needs ``has_chat``."""
        if self._template is None:
            raise ValueError("this model has no chat template")
        return self._template.render(messages, add_generation_prompt, variables)


def _read_tokenizer(file: Path) -> Tokenizer:
    text = file.read_text(encoding="utf-8")
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the library raises Exception itself, for whatever is wrong with the file
        raise ValueError(f"{file.name}: {error}") from error


def _load_with_transformers(directory: Path) -> TextCodec:
    from transformers import AutoTokenizer  # slow to import, and needed by models with old tokenizer files only

    try:
        loaded = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ValueError(f"no tokenizer.json, and transformers says: {error}") from error
    if not loaded.is_fast:
        raise ValueError("no tokenizer.json, and transformers knows only a slow tokenizer for it")
    source = loaded.chat_template
    special = {name: str(token) for name, token in loaded.special_tokens_map.items() if isinstance(token, str)}
    return TextCodec(loaded.backend_tokenizer, ChatTemplate(source, special) if isinstance(source, str) else None)


def _template(directory: Path, config: Mapping[str, Any]) -> ChatTemplate | None:
    """The model's default chat template: a file of its own, or a field of the tokenizer's configuration."""
    special = _special_tokens(config) or _special_tokens(_read_json(directory / "special_tokens_map.json"))
    file = directory / "chat_template.jinja"
    if file.exists():
        return ChatTemplate(file.read_text(encoding="utf-8"), special)
    source = config.get("chat_template")
    if isinstance(source, list):
        source = next((entry["template"] for entry in source if entry.get("name") == "default"), None)
    return ChatTemplate(source, special) if source else None


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Named special tokens; each is a string, or an object with the string as ``content``."""
    values = {name: config.get(name) for name in _SPECIAL_NAMES}
    texts = {name: value["content"] if isinstance(value, dict) else value for name, value in values.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _read_json(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} is not a JSON object")
    return content
