"""One token a row from scores, with min-p, top-k, top-p and a given uniform number; as ``paged_reference.sample``.

Nothing is sorted. In falling order of probability, what top-k and top-p keep is always the scores above some threshold
and the first few of those equal to it; and the token that a point falls on is the score at which the mass above first
drops below the point. So each is a search for a score, halving an interval of 32-bit keys: a few dozen passes over a
row that lies in the cache, one program a row. Exponentials are float32, masses float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from distserve_kernels.triton.tuning import interpreted

_BLOCK = 1024 if interpreted() else 4096
LOWEST: tl.constexpr = tl.constexpr(-(1 << 31))


@triton.jit
def _keys(scores):
    """Int32 keys in the order of float32 scores; both zeros alike."""
    bits = (scores + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


@triton.jit
def _weigh(scores, best, heat):
    """exp((score - best) * heat); of the best 1, infinite or not."""
    return tl.where(scores == best, 1.0, tl.exp((scores - best) * heat))


@triton.jit
def _above(row_ptr, vocab, best, heat, least, key, BLOCK: tl.constexpr):
    """Of the scores whose weight is at least ``least``: how many lie above ``key``, how many on it, and both masses."""
    above = tl.zeros([BLOCK], tl.int32)
    on = tl.zeros([BLOCK], tl.int32)
    mass_above = tl.zeros([BLOCK], tl.float64)
    mass_on = tl.zeros([BLOCK], tl.float64)
    for low in range(0, vocab, BLOCK):
        ids = low + tl.arange(0, BLOCK)
        scores = tl.load(row_ptr + ids, mask=ids < vocab, other=float("-inf"))
        weights = _weigh(scores, best, heat)
        kept = (weights >= least) & (ids < vocab)
        keys = _keys(scores)
        higher, equal = kept & (keys > key), kept & (keys == key)
        above += tl.where(higher, 1, 0)
        on += tl.where(equal, 1, 0)
        mass_above += tl.where(higher, weights, 0.0).to(tl.float64)
        mass_on += tl.where(equal, weights, 0.0).to(tl.float64)
    return tl.sum(above, 0), tl.sum(on, 0), tl.sum(mass_above, 0), tl.sum(mass_on, 0)


@triton.jit
def _lowest_key_with_less_above(row_ptr, vocab, best, heat, least, floor, ceiling, mass, BLOCK: tl.constexpr):
    """The lowest key from ``floor`` on above which there is at most ``mass``; at most ``ceiling``."""
    low, high = floor.to(tl.int64), ceiling.to(tl.int64)
    for _ in range(33):
        middle = (low + high) >> 1
        _, _, above, _ = _above(row_ptr, vocab, best, heat, least, middle.to(tl.int32), BLOCK)
        fits = above <= mass
        high = tl.where(fits, middle, high)
        low = tl.where(fits, low, tl.minimum(middle + 1, high))
    return high.to(tl.int32)


@triton.jit
def _key_of_rank(row_ptr, vocab, best, heat, least, ceiling, rank, BLOCK: tl.constexpr):
    """The lowest key above which there are fewer than ``rank`` scores: that of the rank-th, were they sorted."""
    low, high = tl.full([], LOWEST, tl.int64), ceiling.to(tl.int64)
    for _ in range(33):
        middle = (low + high) >> 1
        above, _, _, _ = _above(row_ptr, vocab, best, heat, least, middle.to(tl.int32), BLOCK)
        fits = above < rank
        high = tl.where(fits, middle, high)
        low = tl.where(fits, low, tl.minimum(middle + 1, high))
    return high.to(tl.int32)


@triton.jit
def _best(row_ptr, vocab, BLOCK: tl.constexpr):
    """The largest score and the first id that has it."""
    best = tl.full([], float("-inf"), tl.float32)
    at = tl.zeros([], tl.int32)
    for low in range(0, vocab, BLOCK):
        ids = low + tl.arange(0, BLOCK)
        scores = tl.load(row_ptr + ids, mask=ids < vocab, other=float("-inf"))
        here = tl.max(scores, 0)
        first = tl.min(tl.where((scores == here) & (ids < vocab), ids, vocab), 0)
        at = tl.where(here > best, first, at)
        best = tl.maximum(best, here)
    return best, at


@triton.jit
def _nth_on_key(row_ptr, vocab, key, nth, BLOCK: tl.constexpr):
    """The id of the ``nth`` (from 0) score that has this key."""
    found = tl.full([], -1, tl.int32)
    seen = tl.zeros([], tl.int32)
    for low in range(0, vocab, BLOCK):
        ids = low + tl.arange(0, BLOCK)
        scores = tl.load(row_ptr + ids, mask=ids < vocab, other=float("-inf"))
        equal = tl.where((_keys(scores) == key) & (ids < vocab), 1, 0)
        order = seen + tl.cumsum(equal, 0) - 1
        here = tl.max(tl.where((equal == 1) & (order == nth), ids, -1), 0)
        found = tl.maximum(found, here)
        seen += tl.sum(equal, 0)
    return found


@triton.jit
def _weights(row_ptr, ids, vocab, best, heat, least):
    """Weights of some ids, 0 for those below min-p."""
    scores = tl.load(row_ptr + ids, mask=ids < vocab, other=float("-inf"))
    weights = _weigh(scores, best, heat)
    return tl.where(weights >= least, weights, 0.0).to(tl.float64)


@triton.jit
def _by_id(row_ptr, vocab, best, heat, least, point, BLOCK: tl.constexpr):
    """The first id at which the mass cumulated in the order of ids exceeds ``point`` of all of it."""
    whole = tl.zeros([], tl.float64)
    for low in range(0, vocab, BLOCK):
        ids = low + tl.arange(0, BLOCK)
        whole += tl.sum(_weights(row_ptr, ids, vocab, best, heat, least), 0)
    before = tl.zeros([], tl.float64)
    found = tl.full([], 0, tl.int32) + vocab
    last = tl.zeros([], tl.int32)
    for low in range(0, vocab, BLOCK):
        ids = low + tl.arange(0, BLOCK)
        weights = _weights(row_ptr, ids, vocab, best, heat, least)
        over = (before + tl.cumsum(weights, 0) > point * whole) & (weights > 0)
        found = tl.minimum(found, tl.min(tl.where(over, ids, vocab), 0))
        last = tl.maximum(last, tl.max(tl.where(weights > 0, ids, 0), 0))
        before += tl.sum(weights, 0)
    return tl.minimum(found, last)


@triton.jit
def _by_rank(row_ptr, vocab, best, heat, least, top_k, top_p, point, BLOCK: tl.constexpr):
    """The id that the point falls on among what min-p, top-k and top-p leave, most likely first."""
    ceiling = _keys(best)
    floor = tl.full([], LOWEST, tl.int32)
    most = tl.zeros([], tl.int32) + vocab  # of those on the floor, how many are in
    if top_k > 0:
        floor = _key_of_rank(row_ptr, vocab, best, heat, least, ceiling, top_k, BLOCK)
        above, _, _, _ = _above(row_ptr, vocab, best, heat, least, floor, BLOCK)
        most = top_k - above
    _, on, mass_above, mass_on = _above(row_ptr, vocab, best, heat, least, floor, BLOCK)
    most = tl.minimum(most, on)
    mass = mass_above + mass_on * (most.to(tl.float64) / tl.maximum(on, 1).to(tl.float64))
    if top_p < 1.0:
        wanted = top_p * mass
        # At most just below: an id is kept only when the mass before it is *less* than what is wanted.
        cut = _lowest_key_with_less_above(
            row_ptr, vocab, best, heat, least, floor, ceiling, wanted * (1.0 - 1e-15), BLOCK
        )
        _, on, mass_above, mass_on = _above(row_ptr, vocab, best, heat, least, cut, BLOCK)
        bound = tl.where(cut == floor, most, on)
        each = mass_on / tl.maximum(on, 1).to(tl.float64)
        needed = tl.ceil((wanted - mass_above) / tl.where(each > 0, each, 1.0)).to(tl.int32)
        most = tl.minimum(tl.maximum(needed, 1), tl.maximum(bound, 1))
        floor = cut
        mass = mass_above + each * most.to(tl.float64)
    target = point * mass
    key = _lowest_key_with_less_above(row_ptr, vocab, best, heat, least, floor, ceiling, target, BLOCK)
    _, on, mass_above, mass_on = _above(row_ptr, vocab, best, heat, least, key, BLOCK)
    each = mass_on / tl.maximum(on, 1).to(tl.float64)
    nth = tl.floor((target - mass_above) / tl.where(each > 0, each, 1.0)).to(tl.int32)
    bound = tl.maximum(tl.where(key == floor, most, on), 1)
    return _nth_on_key(row_ptr, vocab, key, tl.maximum(tl.minimum(nth, bound - 1), 0), BLOCK)


@triton.jit
def _sample(
    scores_ptr, ids_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, points_ptr, row_stride, vocab,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = scores_ptr + row * row_stride
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    least = tl.load(min_p_ptr + row).to(tl.float32)
    point = tl.load(points_ptr + row)
    best, chosen = _best(row_ptr, vocab, BLOCK)
    if (temperature > 0) & (best > float("-inf")):
        heat = (1.0 / temperature).to(tl.float32)
        if (top_k > 0) | (top_p < 1.0):
            chosen = _by_rank(row_ptr, vocab, best, heat, least, top_k, top_p, point, BLOCK)
        else:
            chosen = _by_id(row_ptr, vocab, best, heat, least, point, BLOCK)
    tl.store(ids_ptr + row, chosen.to(tl.int64))


def sample(scores: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, points: Tensor) -> Tensor:
    """As the reference; rows of ``scores`` are contiguous."""
    rows, vocab = scores.shape
    ids = torch.empty(rows, dtype=torch.int64, device=scores.device)
    if rows:
        _sample[(rows,)](
            scores, ids, temperature, top_k, top_p, min_p, points, scores.stride(0), vocab, BLOCK=_BLOCK, num_warps=8
        )
    return ids
