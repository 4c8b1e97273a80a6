"""Sampling of all rows of a batch at once in torch, on any device: what ``paged_reference.sample`` means, fast.

Nothing loops over rows. The whole vocabulary is sorted only for rows whose nucleus does not end among their ``TRIAL``
most likely; all others take a top-k and two sums. Sums are made in an order that depends on the row alone: neither the
number of rows nor that of threads changes a bit.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

TRIAL = 512
"""Top-k and top-p look at so many candidates before they sort the whole vocabulary; most often these suffice."""

_GROUP = 64  # a row's length is made a multiple of it
_LISTS = 16  # a row's largest are sought among the largest of so many scores each
_COLDEST = 1e-38  # below this temperature a float32 quotient of 0 is none


def first_of_largest(scores: Tensor) -> Tensor:
    """[rows] int64, of scores [rows, vocab] of any floating dtype. What is not a number is never the largest.

    A group's maxima first: ``max`` with indices is five times as slow a pass as without.
    """
    rows, vocab = scores.shape
    if vocab % _GROUP or not rows:
        found = scores.max(-1)
        values, ids = found.values, found.indices
    else:
        grouped = scores.unflatten(-1, (-1, _GROUP))
        group = grouped.amax(-1).max(-1).indices
        inner = grouped[torch.arange(rows, device=scores.device), group].max(-1)
        values, ids = inner.values, group * _GROUP + inner.indices
    if bool(values.isnan().any()):
        return first_of_largest(without_nan(scores))
    return ids


def without_nan(scores: Tensor) -> Tensor:
    """A copy in which minus infinity stands for what is not a number."""
    infinity = float("inf")
    return torch.nan_to_num(scores, nan=-infinity, posinf=infinity, neginf=-infinity)


def sample(scores: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, points: Tensor) -> Tensor:
    """As ``paged_reference.sample``; equal scores by rising id. scores: [rows, vocab] float32, without NaN."""
    ids = torch.zeros(len(scores), dtype=torch.int64, device=scores.device)
    drawn = temperature > 0
    ranked = drawn & ((top_k > 0) | (top_p < 1))
    for chosen, choose in ((~drawn, None), (drawn & ~ranked, _by_id), (ranked, _by_rank)):
        at = chosen.nonzero().flatten()
        if not len(at):
            continue
        own = scores if len(at) == len(scores) else scores[at]
        if choose is None:
            ids[at] = first_of_largest(own)
        else:
            ids[at] = choose(*_prepared(own), *(t[at].unsqueeze(1) for t in (temperature, min_p, points, top_k, top_p)))
    return ids


def _prepared(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [rows, a multiple of 64] below the best, which is 0, and the best [rows, 1]; both finite where they count.

    Where something is infinitely likely, that alone counts; where nothing is possible, it is id 0.
    """
    if short := -scores.shape[1] % _GROUP:
        scores = pad(scores, (0, short), value=-float("inf"))
    best = scores.amax(-1, keepdim=True)
    if bool(best.isinf().any()):
        infinite = (best == float("inf")) & (scores == best)
        infinite[:, :1] |= best == -float("inf")
        odd = torch.where(infinite, 0.0, -float("inf"))
        scores, best = torch.where(best.isinf(), odd, scores), torch.where(best.isinf(), 0.0, best)
    return scores, best


def _weights(scores: Tensor, best: Tensor, temperature: Tensor, min_p: Tensor) -> Tensor:
    """exp((score - best) / temperature), 0 below min-p; 1 for the best."""
    scaled = (scores - best).div_(temperature.float().clamp_min(_COLDEST))
    if bool((min_p > 0).any()):
        scaled.masked_fill_(scaled < torch.log(min_p).clamp_max(0.0).float(), -float("inf"))
    return scaled.exp_()


def _by_id(
    scores: Tensor, best: Tensor, temperature: Tensor, min_p: Tensor, points: Tensor, _top_k: Tensor, _top_p: Tensor
) -> Tensor:
    """By the inverse of the probabilities cumulated by rising id: first the group, then the id in it."""
    weights = _weights(scores, best, temperature, min_p).unflatten(-1, (-1, _GROUP))
    groups = weights.sum(-1).cumsum(-1, dtype=torch.float64)
    group = _invert(groups, points, groups[:, -1:])
    rows = torch.arange(len(scores), device=scores.device)
    inner = weights[rows, group].cumsum(-1, dtype=torch.float64)
    before = groups[rows, group] - inner[:, -1]
    return group * _GROUP + _above(inner, points * groups[:, -1:] - before.unsqueeze(1), inner[:, -1:])


def _by_rank(
    scores: Tensor, best: Tensor, temperature: Tensor, min_p: Tensor, points: Tensor, top_k: Tensor, top_p: Tensor
) -> Tensor:
    """By the inverse of the probabilities cumulated by falling score."""
    asked = (best, temperature, min_p, points, top_k, top_p)
    if bool((top_k <= 0).any()):
        weights = _weights(scores, best, temperature, min_p)
        # Sums of a group each, then of groups: a lone long row is not cut among threads, which would change the order.
        whole = weights.unflatten(-1, (-1, _GROUP)).sum(-1).sum(-1, dtype=torch.float64).unsqueeze(1)
    else:
        whole = torch.zeros_like(points)
    ids, complete = _among(*_largest(scores, min(TRIAL, scores.shape[1])), scores.shape[1], whole, *asked)
    if not bool(complete.all()):
        at = (~complete).nonzero().flatten()
        rest = scores[at]
        ids[at], _ = _among(*_sorted(rest), scores.shape[1], whole[at], *(t[at] for t in asked))
    return ids


def _among(
    values: Tensor, ids: Tensor, vocab: int, whole: Tensor,
    best: Tensor, temperature: Tensor, min_p: Tensor, points: Tensor, top_k: Tensor, top_p: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The ids drawn, and whether the candidates (``values`` and ``ids``, by falling score) were enough to tell.

    ``whole``: [rows, 1] mass of all ids, where top-k is off. Candidates are enough when what is kept ends among them,
    before the last of them: nothing that equals one of those kept can then be missing.
    """
    rank = torch.arange(values.shape[1], device=values.device)
    limited = top_k > 0
    weights = _weights(values, best, temperature, min_p).double()
    weights.masked_fill_(limited & (rank >= top_k), 0.0)
    mass = weights.cumsum(-1)
    whole = torch.where(limited, mass[:, -1:], whole)
    kept = ((mass - weights < top_p * whole) | (top_p >= 1)) & ~(limited & (rank >= top_k))
    last = kept.sum(-1, keepdim=True).clamp_min(1) - 1
    place = _invert(mass, points, mass.gather(1, last)).unsqueeze(1).minimum(last)
    enough = (values.gather(1, last) > values[:, -1:]) & (top_k <= values.shape[1])
    return ids.gather(1, place).squeeze(1), enough.squeeze(1) | (values.shape[1] == vocab)


def _invert(mass: Tensor, points: Tensor, total: Tensor) -> Tensor:
    """The first index of each row of cumulated ``mass`` [rows, n] above its point [rows, 1] of ``total`` [rows, 1]."""
    return _above(mass, points * total, total)


def _above(mass: Tensor, target: Tensor, total: Tensor) -> Tensor:
    """The first index of each row of ``mass`` above ``target`` [rows, 1]; the last of any weight, should none be."""
    index = torch.searchsorted(mass, target, right=True)
    last = torch.searchsorted(mass, total.contiguous())
    return torch.minimum(index, last).squeeze(1)


def _largest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest, and their ids: by falling score, equal ones by rising id."""
    vocab = scores.shape[1]
    step = vocab // _LISTS
    if count >= step:
        values, ids = scores.topk(count)
    else:
        lists = scores.unflatten(-1, (_LISTS, step)).amax(1).topk(count, sorted=False).indices.unsqueeze(1)
        found = (lists + step * torch.arange(_LISTS, device=scores.device).view(1, -1, 1)).flatten(1)
        values, at = scores.gather(1, found).topk(count)
        ids = found.gather(1, at)
    if bool((values[:, 1:] == values[:, :-1]).any()):
        ids = ids.sort(-1).values
        values, order = scores.gather(1, ids).sort(dim=-1, descending=True, stable=True)
        ids = ids.gather(1, order)
    return values, ids


def _sorted(scores: Tensor) -> tuple[Tensor, Tensor]:
    """All of each row: by falling score, equal ones by rising id."""
    if scores.device.type != "cpu":
        values, ids = scores.sort(dim=-1, descending=True, stable=True)
        return values, ids
    bits = (scores + 0.0).view(torch.int32)
    falling = torch.where(bits < 0, bits & 0x7FFFFFFF, ~bits).long()
    keys = (falling << 32) | torch.arange(scores.shape[1])
    keys.numpy().sort(-1)  # whole numbers: ten times as fast as torch sorts floats
    ids = keys & 0xFFFFFFFF
    return scores.gather(1, ids), ids
