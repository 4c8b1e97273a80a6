"""A step's tokens by one native call, on the CPU; and the choice of what chooses an engine's tokens.

Owns that choice and the log line that says what was chosen. The rules are those of ``sampler``, for every chooser.
"""

from __future__ import annotations

import functools
import logging
from array import array
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from distserve.core.types import Sampling, StepItem, Token
from distserve.engine.config import EngineConfig
from distserve.engine.sampler import Choose, Draw, choose_tokens, is_plain_greedy
from distserve.models.catalog import default_cache
from distserve_kernels.cores import Threads
from distserve_kernels.native.library import NativeUnavailable, load
from distserve_kernels.native.sampler import Asks, Chosen, RowSampler, pack_ask

log = logging.getLogger(__name__)

_MASK64 = (1 << 64) - 1

MOST_THREADS = 8
"""More do not read logits faster, and each holds scratch of 32 bytes for each id of the vocabulary."""


class PromptArrays:
    """The prompts of the last step as arrays: the same tuples come again with the next, and converting takes long."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[Sequence[int], array[int]]] = {}
        self._next: dict[int, tuple[Sequence[int], array[int]]] = {}

    def turn(self) -> None:
        """A step begins: forget what the last one did not use."""
        self._held, self._next = self._next, {}

    def __call__(self, prompt: Sequence[int]) -> array[int]:
        found = self._held.get(id(prompt)) or (prompt, array("q", prompt))  # held, so that nothing else has its id
        self._next[id(prompt)] = found
        return found[1]


class NativeChooser:
    """``choose_tokens`` in C++. Where rounding decides, it may differ from torch."""

    def __init__(self, rows: RowSampler) -> None:
        self._rows = rows
        self._prompts = PromptArrays()

    def __call__(self, logits: Tensor, items: Sequence[StepItem]) -> list[Token]:
        """One token for each row of ``logits`` [items, vocab], which stay as they are."""
        chosen = self._rows.choose(logits, asks_of(items, self._prompts))
        if not any(item.sampling.logprobs >= 0 for item in items):
            return [Token(id) for id in chosen.ids]
        most = len(chosen.top_ids) // max(len(items), 1)
        return [_token(chosen, i, item.sampling.logprobs, i * most) for i, item in enumerate(items)]


def chooser_of(config: EngineConfig, vocab: int, draw: Draw | None = None) -> Choose:
    """What chooses tokens for this engine: with ``draw`` where a device has one, else native on a CPU, else torch.

    Ready when it returns: compiled, its threads started.
    """
    if draw is not None:
        return functools.partial(choose_tokens, draw=draw)
    if torch.device(config.device).type != "cpu" or config.kernels == "torch":
        return choose_tokens
    count = min(config.threads or torch.get_num_threads(), MOST_THREADS)
    try:
        library = load(default_cache() / "native", log.info)
        rows = RowSampler(library, vocab, Threads(count, config.cores[:count]))
    except (NativeUnavailable, OSError, MemoryError) as why:
        log.info("sampling in torch: %s", why)
        return choose_tokens
    log.info("native sampling, %d threads", count)
    return NativeChooser(rows)


def asks_of(items: Sequence[StepItem], prompts: PromptArrays) -> Asks:
    """What the items ask for, packed: a bit of arithmetic a row, and a copy of the ids that it names."""
    if all(is_plain_greedy(item) for item in items):
        return Asks()
    prompts.turn()
    ids, amounts = array("q"), array("d")
    rows, most = [], 0
    for item in items:
        s = item.sampling
        first, amount = len(ids), len(amounts)
        ids.extend(item.banned)
        if s.logit_bias:
            ids.extend([id for id, _ in s.logit_bias])
            amounts.extend([by for _, by in s.logit_bias])
        prompt, output = _history(s, item)
        if prompt:
            ids.extend(prompts(prompt))
        ids.extend(array("q", output))
        most = max(most, s.logprobs)
        rows.append(
            pack_ask(
                s.temperature, s.top_p, s.min_p, s.repetition_penalty, s.presence_penalty, s.frequency_penalty,
                s.seed & _MASK64, item.output_index, s.top_k, s.logprobs,
                first, len(item.banned), len(s.logit_bias), len(prompt), len(output), amount,
            )
        )  # fmt: skip
    return Asks(b"".join(rows), ids, amounts, most)


_NONE: tuple[int, ...] = ()


def _history(sampling: Sampling, item: StepItem) -> tuple[Sequence[int], Sequence[int]]:
    """Those of the prompt and of the output that a penalty looks at."""
    if sampling.repetition_penalty != 1.0:
        return item.prompt, item.output
    return _NONE, item.output if sampling.presence_penalty or sampling.frequency_penalty else _NONE


def _token(chosen: Chosen, row: int, logprobs: int, first: int) -> Token:
    if logprobs < 0:
        return Token(chosen.ids[row])
    span = slice(first, first + logprobs)
    pairs: Iterable[tuple[int, float]] = zip(chosen.top_ids[span], chosen.top[span], strict=True)
    return Token(chosen.ids[row], chosen.logprobs[row], tuple((id, p) for id, p in pairs if id >= 0))
