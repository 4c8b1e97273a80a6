"""Prompts of exact lengths for measuring: words of one token each, or token ids where the model has no tokenizer."""

from __future__ import annotations

import random
from pathlib import Path

from distserve.loadgen.words import VocabularyWords
from distserve.loadgen.workload import Ask
from distserve.models.catalog import RANDOM_PREFIX, resolve_model

_FIRST_ID, _LAST_ID = 3, 200  # ids that every vocabulary has, and that end nothing


class Prompts:
    """Never the same prompt twice, so that no prefix cache can help. Raises ModelError for an unknown model."""

    def __init__(self, model: str, seed: int) -> None:
        self._random = random.Random(seed)
        self._words = None if model.startswith(RANDOM_PREFIX) else _vocabulary(resolve_model(model))

    def ask(self, prompt_tokens: int, output_tokens: int, due_s: float = 0.0) -> Ask:
        if self._words is not None:
            return Ask(self._words.text(prompt_tokens, self._random), output_tokens, due_s)
        ids = tuple(self._random.randint(_FIRST_ID, _LAST_ID) for _ in range(prompt_tokens))
        return Ask(ids, output_tokens, due_s)


def _vocabulary(directory: Path) -> VocabularyWords | None:
    """None where the tokenizer is missing or knows too few words."""
    file = directory / "tokenizer.json"
    try:
        return VocabularyWords(file) if file.is_file() else None
    except ValueError:
        return None
