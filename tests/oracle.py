"""The oracle: what `transformers` makes of a prompt, in float32, greedily. Everything is compared to it."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


class Oracle:
    """``oracle(prompt, count)``: the first ``count`` tokens of the answer. Each prompt is computed once a length."""

    def __init__(self, model: Path) -> None:
        self._reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self._known: dict[tuple[int, ...], list[int]] = {}

    def __call__(self, prompt: list[int], count: int) -> list[int]:
        key = tuple(prompt)
        if len(self._known.get(key, ())) < count:
            self._known[key] = self._answer(prompt, count)
        return self._known[key][:count]

    def _answer(self, prompt: list[int], count: int) -> list[int]:
        ids = torch.tensor([prompt])
        out = self._reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        answer: list[int] = out[0, len(prompt) :].tolist()
        return answer
