"""Bans, biases and penalties on all rows of a batch at once, in torch: a few operations, however many rows.

What they touch is few of a vocabulary; each is told as (row, id) pairs, numbered row * vocab + id.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from distserve.core.types import StepItem


def constrain(scores: Tensor, items: Sequence[StepItem]) -> None:
    """Banned ids, bias and penalties on contiguous ``scores`` [items, vocab] float32, in place.

    Raises IndexError when an id is none of the vocabulary.
    """
    vocab, device = scores.shape[1], scores.device
    flat = scores.view(-1)

    def places(named: Iterable[tuple[int, Sequence[int]]]) -> tuple[Tensor, Tensor]:
        """The numbers of the pairs of some rows with ids of theirs, and the row of each."""
        flat_ids, at, lengths = array("q"), array("q"), array("q")
        for row, own in named:
            flat_ids.extend(own)
            at.append(row)
            lengths.append(len(own))
        ids, rows = _tensor(flat_ids), _tensor(at).repeat_interleave(_tensor(lengths))
        if bool(((ids < 0) | (ids >= vocab)).any()):
            raise IndexError(f"a banned, biased or penalised id is none of the {vocab} of the vocabulary")
        return (rows * vocab + ids).to(device), rows

    asked = [item.sampling for item in items]
    if any(item.banned for item in items):
        flat[places((i, item.banned) for i, item in enumerate(items))[0]] = float("-inf")
    if any(s.logit_bias for s in asked):
        biased, _ = places((i, [id for id, _ in s.logit_bias]) for i, s in enumerate(asked))
        flat[biased] += torch.tensor([by for s in asked for _, by in s.logit_bias], dtype=torch.float32).to(device)
    if any(s.repetition_penalty != 1.0 for s in asked):
        seen, rows = places(
            (i, item.prompt + item.output) for i, item in enumerate(items) if item.sampling.repetition_penalty != 1.0
        )
        penalty = _column([s.repetition_penalty for s in asked])[rows].float().to(device)
        chosen = flat[seen]
        flat[seen] = torch.where(chosen > 0, chosen / penalty, chosen * penalty)  # repeats write the same again
    if any(s.presence_penalty or s.frequency_penalty for s in asked):
        _discourage(flat, *places((i, item.output) for i, item in enumerate(items) if _penalises_output(item)), items)


def _discourage(flat: Tensor, numbers: Tensor, rows: Tensor, items: Sequence[StepItem]) -> None:
    """Presence and frequency penalties on what was put out."""
    seen, at, counts = numbers.unique(return_inverse=True, return_counts=True)
    own = torch.empty(len(seen), dtype=torch.int64)
    own[at.cpu()] = rows
    presence = _column([item.sampling.presence_penalty for item in items])[own]
    frequency = _column([item.sampling.frequency_penalty for item in items])[own]
    flat[seen] -= (presence + frequency * counts.cpu()).float().to(flat.device)


def _penalises_output(item: StepItem) -> bool:
    return bool(item.sampling.presence_penalty or item.sampling.frequency_penalty)


def _column(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _tensor(numbers: array[int]) -> Tensor:
    return torch.frombuffer(numbers, dtype=torch.int64) if numbers else torch.empty(0, dtype=torch.int64)
