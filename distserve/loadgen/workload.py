"""What is sent and when: prompts out of a file or a vocabulary, arrival times out of a file or a Poisson process.

A requests file has one JSON object a line (``.gz`` is read too):

``prompt`` (text), ``prompt_token_ids`` (list of ints), ``messages`` (a chat), or ``prompt_tokens`` (a length: random
one-token words are made up) – exactly one of them; ``max_tokens``; and, for replay, ``arrival_s`` (seconds from the
start). ``input_tokens``/``output_tokens`` are read as ``prompt_tokens``/``max_tokens``. Knows no server.
"""

from __future__ import annotations

import gzip
import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from distserve.loadgen.words import WordSource

Prompt = str | tuple[int, ...] | tuple[dict[str, Any], ...]
"""Text, token ids, or the messages of a chat."""

_PROMPT_KEYS = ("prompt", "prompt_token_ids", "messages", "prompt_tokens")
MOST_TOKENS, MOST_SECONDS = 1 << 20, 1e9
_ALIASES = {"input_tokens": "prompt_tokens", "output_tokens": "max_tokens"}


class BadWorkload(ValueError):
    """A requests file, or a wish about arrivals, that cannot be carried out; the text is for the user."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request to send, ``due_s`` after the start of the run."""

    prompt: Prompt
    max_tokens: int
    due_s: float = 0.0

    @property
    def is_chat(self) -> bool:
        return isinstance(self.prompt, tuple) and bool(self.prompt) and isinstance(self.prompt[0], dict)


class FilePrompts:
    """The asks of a file, over and over, in an order drawn from the seed."""

    def __init__(self, asks: Sequence[Ask], seed: int) -> None:
        if not asks:
            raise BadWorkload("the requests file holds no request")
        self._asks = list(asks)
        self._random = random.Random(seed)

    def __iter__(self) -> Iterator[Ask]:
        while True:
            yield from self._random.sample(self._asks, len(self._asks))


class RandomPrompts:
    """Prompts of exactly so many one-token words, never the same twice, so that no prefix cache can help."""

    def __init__(self, words: WordSource, prompt_tokens: int, max_tokens: int, seed: int) -> None:
        self._words = words
        self._prompt_tokens, self._max_tokens = prompt_tokens, max_tokens
        self._random = random.Random(seed)

    def __iter__(self) -> Iterator[Ask]:
        while True:
            yield Ask(self._words.text(self._prompt_tokens, self._random), self._max_tokens)


def read_requests(path: Path, words: WordSource, seed: int, default_max_tokens: int) -> list[Ask]:
    """All asks of a requests file, in its order. Raises ``BadWorkload`` naming the line."""
    rng = random.Random(seed)
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            lines = file.readlines()
    except (OSError, EOFError, zlib.error) as error:
        why = getattr(error, "strerror", None) or error
        raise BadWorkload(f"cannot read the requests file {path}: {why}") from error
    asks = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                asks.append(_ask(orjson.loads(line), words, rng, default_max_tokens))
            except (TypeError, ValueError, LookupError, OverflowError) as error:
                raise BadWorkload(f"{path}:{number}: {_why(error)}") from error
    return asks


def _ask(row: Any, words: WordSource, rng: random.Random, default_max_tokens: int) -> Ask:
    if not isinstance(row, dict):
        raise ValueError("a JSON object is needed on each line")
    row = {_ALIASES.get(key, key): value for key, value in row.items()}
    if "turns" in row:
        row = {**row, **_first_turn(row)}
    given = [key for key in _PROMPT_KEYS if key in row]
    if len(given) != 1:
        raise ValueError(f"exactly one of {', '.join(_PROMPT_KEYS)} is needed, got {given or 'none'}")
    prompt: Prompt
    match given[0]:
        case "prompt":
            prompt = row["prompt"] if isinstance(row["prompt"], str) else tuple(map(int, row["prompt"]))
        case "prompt_token_ids":
            prompt = tuple(map(int, row["prompt_token_ids"]))
        case "messages":
            prompt = tuple(row["messages"])
            if not all(isinstance(message, dict) for message in prompt):
                raise ValueError("messages must be a list of objects with role and content")
        case _:
            prompt = words.text(_within(row, "prompt_tokens", 0, MOST_TOKENS), rng)
    if not prompt:
        raise ValueError("the prompt is empty")
    due_s = float(row.get("arrival_s", 0.0))
    if not 0 <= due_s < MOST_SECONDS:
        raise ValueError(f"arrival_s must be seconds from 0 on, not {due_s}")
    return Ask(prompt, _within(row, "max_tokens", default_max_tokens, MOST_TOKENS), due_s)


def _within(row: dict[str, Any], key: str, default: int, most: int) -> int:
    value = int(row.get(key, default))
    if not 1 <= value <= most:
        raise ValueError(f"{key} must be from 1 to {most}, not {value}")
    return value


def _why(error: Exception) -> str:
    """What was wrong; a missing key's own text is the key alone."""
    return f"{error} is missing" if isinstance(error, LookupError) else str(error)


def _first_turn(row: dict[str, Any]) -> dict[str, Any]:
    """The first turn of a recorded conversation, as a chat or as plain text."""
    user, system = row["turns"][0]["user"], row.get("system")
    if row.get("api") == "completion":
        return {"prompt": (system or "") + user}
    first = [{"role": "system", "content": system}] if system else []
    return {"messages": [*first, {"role": "user", "content": user}]}


def poisson(asks: Iterator[Ask], rate: float, count: int, seed: int) -> list[Ask]:
    """``count`` asks at the times of a Poisson process, stretched so that the realised mean rate is ``rate``."""
    rng = random.Random(seed)
    times, now = [], 0.0
    for _ in range(count):
        now += rng.expovariate(1.0)
        times.append(now)
    scale = count / rate / now if now else 0.0
    return [replace(next(asks), due_s=t * scale) for t in times]


def replayed(asks: Sequence[Ask], duration_s: float | None) -> list[Ask]:
    """The asks at the times of their file, from its first arrival, cut to a duration."""
    if len(asks) > 1 and all(a.due_s == 0.0 for a in asks):
        raise BadWorkload("the requests file has no arrival_s: give --rate, or --concurrency")
    first = min((a.due_s for a in asks), default=0.0)
    moved = sorted((replace(a, due_s=a.due_s - first) for a in asks), key=lambda a: a.due_s)
    return [a for a in moved if duration_s is None or a.due_s <= duration_s]
