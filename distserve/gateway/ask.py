"""What a client asked for, in no front end's words: every field as given, nothing filled in, nothing checked.

Owns the shape alone. ``None`` means that the client said nothing, which is not the same as a default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation, to be rendered by the model's chat template. Each message has ``role`` and ``content``."""

    messages: tuple[Mapping[str, Any], ...]
    add_generation_prompt: bool = True
    variables: Mapping[str, Any] = field(default_factory=dict)


Prompt = str | tuple[int, ...] | Chat


@dataclass(frozen=True, slots=True)
class Ask:
    """A generate request. ``prompts`` are answered independently, each ``n`` times.

    ``names`` says what this front end's clients call a field, where that differs from the name here; errors use it.
    """

    prompts: tuple[Prompt, ...]
    model: str = ""
    request_id: str = ""
    drawn_id_prefix: str = "req"  # of the name drawn when request_id is empty
    add_special_tokens: bool = True
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    n: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None  # how many alternatives; None: no log probabilities
    max_tokens: int | None = None
    min_tokens: int | None = None
    default_max_tokens: int | None = None  # when max_tokens is None; None: as many as fit
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop: bool = False
    skip_special_tokens: bool = True
    timeout_s: float | None = None
    priority: int = 0
    tenant: str = ""
    slo_class: str = ""
    trace: str = ""
    names: Mapping[str, str] = field(default_factory=dict)

    def name_of(self, name: str) -> str:
        """What this front end's clients call the field."""
        return self.names.get(name, name)
