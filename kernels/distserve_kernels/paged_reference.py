"""What the fused and paged operations of a GPU mean, in plain torch: the same signatures as the Triton kernels.

Written to be obviously right, for every device; speed is elsewhere. ``kv``: one layer of the pool, ``pool[:, layer]``:
[blocks, 2, kv_heads, block_size, dim] with K at 0 and V at 1 (any stride between blocks). ``tables`` [sequences,
max_blocks] int32 holds each sequence's blocks in order; what lies behind its last block is not read. Positions count
from 0. Query head h reads KV head h // (heads // kv_heads).
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN, _MIX = -7046029254386353131, -4658895280553007687  # 0x9E3779B97F4A7C15 and 0xBF58476D1CE4E5B9 as int64


def rotary_kv_write(qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, kv: Tensor, slots: Tensor) -> None:
    """Rotate Q in place; write the rotated K, and V, into the pool. K and V of ``qkv`` stay as they are.

    qkv: [tokens, heads + 2 * kv_heads, dim], Q before K before V   cos, sin: [length, dim], sin signed
    (``rotary_table``)   positions, slots: [tokens] int64; a slot is block * block_size + offset, or negative: not
    written.
    """
    kv_heads, size, dim = kv.shape[2], kv.shape[3], kv.shape[4]
    heads = qkv.shape[1] - 2 * kv_heads
    both = qkv[:, : heads + kv_heads]
    c, s = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
    rotated = torch.addcmul(both * c, both.roll(dim // 2, -1), s)
    qkv[:, :heads] = rotated[:, :heads]
    kept = slots >= 0
    block, offset = slots[kept] // size, slots[kept] % size
    kv[block, 0, :, offset] = rotated[kept, heads:]
    kv[block, 1, :, offset] = qkv[kept, heads + kv_heads :]


def paged_kv_write(new: Tensor, kv: Tensor, slots: Tensor) -> None:
    """Write K and V as they are: what ``rotary_kv_write`` does for models without rotary positions.

    new: [tokens, 2 * kv_heads, dim], K before V   slots: as there.
    """
    kv_heads, size = kv.shape[2], kv.shape[3]
    kept = slots >= 0
    block, offset = slots[kept] // size, slots[kept] % size
    kv[block, 0, :, offset] = new[kept, :kv_heads]
    kv[block, 1, :, offset] = new[kept, kv_heads:]


def paged_prefill_attention(
    q: Tensor, kv: Tensor, tables: Tensor, firsts: Tensor, starts: Tensor, scale: float, longest: int
) -> Tensor:
    """Causal attention of a chunk of each sequence over all its positions so far, whose KV is in the pool already.

    q: [tokens, heads, dim]; sequence i owns rows firsts[i] .. firsts[i + 1], at positions starts[i] and on
    firsts: [sequences + 1], starts: [sequences] int32   longest: the most rows of one sequence. Returns the like of q.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    bounds = firsts.tolist()
    for i, start in enumerate(starts.tolist()):
        low, high = bounds[i], bounds[i + 1]
        k, v = _keys_and_values(kv, tables[i], start + high - low)
        out[low:high] = _attend(q[low:high], k, v, start, scale)
    return out


def paged_decode_attention(
    q: Tensor, kv: Tensor, tables: Tensor, lengths: Tensor, scale: float, longest: int
) -> Tensor:
    """Attention of one new token a sequence over its ``lengths`` positions, itself the last of them.

    q: [sequences, heads, dim]   lengths: [sequences] int32; 0: a row of padding, answered with zeros
    longest: at least every length. Returns the like of q.
    """
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    for i, length in enumerate(lengths.tolist()):
        if length:
            k, v = _keys_and_values(kv, tables[i], length)
            out[i : i + 1] = _attend(q[i : i + 1], k, v, length - 1, scale)
    return out


def _keys_and_values(kv: Tensor, table: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """[length, kv_heads, dim] each."""
    size = kv.shape[3]
    found = kv[table[: -(-length // size)].long()].permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :length]
    return found[0], found[1]


def _attend(q: Tensor, k: Tensor, v: Tensor, start: int, scale: float) -> Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = (each.float().repeat_interleave(group, 1) for each in (k, v))
    scores = torch.einsum("thd,shd->hts", q.float(), k) * scale
    seen = torch.arange(k.shape[0], device=q.device)
    hidden = seen > start + torch.arange(q.shape[0], device=q.device).unsqueeze(1)
    mixed = torch.einsum("hts,shd->thd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)
    return mixed.to(q.dtype)


# ── moving KV ────────────────────────────────────────────────────────────────────────────────────────────────────────


def kv_gather(pool: Tensor, blocks: Tensor, layers: range, heads: range, staging: Tensor, checksum: bool) -> Tensor:
    """Copy a rectangle of each block, in this order, to staging; returns its checksum as [1] int64, or 0 for none.

    pool: [blocks, layers, 2, kv_heads, block_size, dim]   blocks: [n] int32
    staging: [n, len(layers), 2, len(heads), block_size, dim], contiguous.
    """
    part = pool[blocks.long()][:, layers.start : layers.stop, :, heads.start : heads.stop]
    staging.copy_(part)
    return staging_checksum(staging) if checksum else torch.zeros(1, dtype=torch.int64, device=pool.device)


def kv_scatter(pool: Tensor, blocks: Tensor, layers: range, heads: range, staging: Tensor, checksum: bool) -> Tensor:
    """The way back: staging into the same rectangle of each block; no other byte of the pool changes.

    Returns the checksum of what was in staging, or 0. A caller that must not write unverified bytes takes
    ``staging_checksum`` first: this one is for what is trusted.
    """
    found = staging_checksum(staging) if checksum else torch.zeros(1, dtype=torch.int64, device=pool.device)
    for i, block in enumerate(blocks.tolist()):
        pool[block, layers.start : layers.stop, :, heads.start : heads.stop] = staging[i]
    return found


def staging_checksum(staging: Tensor) -> Tensor:
    """[1] int64: Σ mix(wordᵢ, i) mod 2⁶⁴ over the 32-bit words of contiguous bytes (a multiple of four of them).

    mix is a bijection of the word for each place: a change within one word is always noticed, any other but for one in
    2⁶⁴. A sum, so that it can be made in any order by any number of threads.
    """
    words = staging.reshape(-1).view(torch.int32).to(torch.int64)
    places = torch.arange(1, len(words) + 1, dtype=torch.int64, device=words.device) * _GOLDEN
    mixed = (words ^ places) * _MIX
    mixed = mixed ^ ((mixed >> 29) & ((1 << 35) - 1))
    return (mixed * _GOLDEN).sum().reshape(1)


# ── sampling ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def sample(scores: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, points: Tensor) -> Tensor:
    """One token id a row, [rows] int64, of scores [rows, vocab] float32 with bans, biases and penalties in them.

    temperature, top_p, min_p, points: [rows] float64; top_k: [rows] int32. temperature 0: the first of the largest.
    Otherwise min-p, top-k and top-p in this order, then the inverse of the cumulated probabilities at ``points``, the
    uniform numbers in [0, 1) of (seed, output index): by falling probability, equal ones by rising id; in the order of
    ids where neither top-k nor top-p truncates. So it is the sampler of ``distserve.engine.sampler``, draw for draw,
    but for points within rounding (1e-6 of the mass) of a border between two tokens. Scores are numbers; where all are
    minus infinity it is id 0, and where some are infinite, one of these.
    """
    rows = zip(scores, *(t.tolist() for t in (temperature, top_k, top_p, min_p, points)), strict=True)
    return torch.tensor([_sample_row(*row) for row in rows], dtype=torch.int64, device=scores.device)


def _sample_row(row: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, point: float) -> int:
    if temperature == 0:
        return int(row.argmax())
    best = row.max()
    if best == -float("inf"):
        return 0
    weights = torch.where(row == best, 1.0, torch.exp((row.double() - best) / temperature))
    order = torch.arange(len(row), device=row.device)
    if top_k > 0 or top_p < 1:
        order = torch.sort(weights, descending=True, stable=True).indices
    order = order[weights[order] >= min_p][: top_k or None]
    if top_p < 1:
        before = weights[order].cumsum(0) - weights[order]
        order = order[: max(1, int((before < top_p * weights[order].sum()).sum()))]
    mass = weights[order].cumsum(0)
    index = int(torch.searchsorted(mass, point * mass[-1:], right=True))
    return int(order[min(index, int(torch.searchsorted(mass, mass[-1:])))])
