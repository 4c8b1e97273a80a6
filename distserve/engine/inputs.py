"""From a ``StepPlan`` to the flat tensors of one forward pass that gathers KV (``GatheredKv``).

Orders the rows: prompt chunks first, then items of one token, longest first, in groups of similar length. Owns no
state; the model and the pool are known only by their sizes.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distserve.core.types import StepItem, StepPlan
from distserve.models.step import GatheredKv, StepInput
from distserve_kernels.paged import DecodeGroup, PrefillChunk, block_rows, token_rows

GROUP_WASTE_TOKENS = 1024
"""Padding that a decode group may hold: about what another group's calls cost, in gathered tokens a layer."""


@dataclass(frozen=True, slots=True)
class KvLayout:
    """The sizes of the pool that row numbers depend on, where tensors go, and what is computed in (``dtype``)."""

    layers: int
    kv_heads: int
    block_size: int
    dtype: torch.dtype
    device: torch.device

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)


def build_step(plan: StepPlan, layout: KvLayout) -> StepInput:
    """The input of one pass over ``plan``'s items. ``sample_rows`` are in the order of the items that sample."""
    chunks = [i for i, item in enumerate(plan.items) if len(item.token_ids) > 1]
    singles = [i for i, item in enumerate(plan.items) if len(item.token_ids) == 1]
    singles.sort(key=lambda i: -plan.items[i].start)
    order = [plan.items[i] for i in (*chunks, *singles)]
    prefill, prefill_tokens = _chunks(order[: len(chunks)], layout)
    positions, write_rows = _places(order, layout)
    return StepInput(
        token_ids=_int64((t for item in order for t in item.token_ids), layout.device),
        positions=positions,
        sample_rows=_sample_rows(plan.items, (*chunks, *singles), layout.device),
        kv=GatheredKv(write_rows, prefill, prefill_tokens, _groups(order[len(chunks) :], layout)),
    )


def begun_blocks(plan: StepPlan, layout: KvLayout) -> Tensor:
    """Blocks [n] that this step begins and does not fill: their rest still holds what the last owner left."""
    size = layout.block_size
    begun = []
    for item in plan.items:
        end = item.start + len(item.token_ids)
        if end % size and end - end % size >= item.start:
            begun.append(item.blocks[end // size])
    return _int64(begun, layout.device)


def _int64(values: Iterable[int], device: torch.device) -> Tensor:
    flat = array("q", values)
    tensor = torch.frombuffer(flat, dtype=torch.int64) if flat else torch.empty(0, dtype=torch.int64)
    return tensor.to(device)


def _sample_rows(items: Sequence[StepItem], order: Sequence[int], device: torch.device) -> Tensor | None:
    """The last row of each item that samples, in item order."""
    last: dict[int, int] = {}
    row = 0
    for i in order:
        row += len(items[i].token_ids)
        last[i] = row - 1
    rows = [last[i] for i, item in enumerate(items) if item.sample]
    return _int64(rows, device) if rows else None


def _places(order: Sequence[StepItem], layout: KvLayout) -> tuple[Tensor, Tensor]:
    """Positions [tokens] of the rows, and the pool rows that their K and V are written to."""
    size = layout.block_size
    positions: list[int] = []
    blocks: list[int] = []
    for item in order:
        span = range(item.start, item.start + len(item.token_ids))
        positions.extend(span)
        blocks.extend(item.blocks[p // size] for p in span)
    where = _int64(positions, layout.device)
    rows = token_rows(_int64(blocks, layout.device), where % size, layout.layers, layout.kv_heads, size)
    return where, rows


def _chunks(items: Sequence[StepItem], layout: KvLayout) -> tuple[tuple[PrefillChunk, ...], int]:
    chunks = []
    first = 0
    for item in items:
        length = len(item.token_ids)
        gather = None
        if item.start > 0:
            table = item.blocks[: layout.blocks_for(item.start + length)]
            gather = block_rows(_int64(table, layout.device), layout.layers, layout.kv_heads).flatten()
        chunks.append(PrefillChunk(first, length, item.start, gather))
        first += length
    return tuple(chunks), first


def _groups(items: Sequence[StepItem], layout: KvLayout) -> tuple[DecodeGroup, ...]:
    """Decode groups over ``items``, longest first; rows count from the first decode row."""
    groups = []
    first = 0
    while first < len(items):
        count = _group_size(items[first:], layout)
        groups.append(_group(items[first : first + count], first, layout))
        first += count
    return tuple(groups)


def _group_size(items: Sequence[StepItem], layout: KvLayout) -> int:
    """How many of ``items`` may be padded to the length of the first before the waste outweighs another group."""
    longest = layout.blocks_for(items[0].start + 1)
    waste = 0
    for n, item in enumerate(items):
        waste += (longest - layout.blocks_for(item.start + 1)) * layout.block_size
        if waste > GROUP_WASTE_TOKENS:
            return n
    return len(items)


def _group(items: Sequence[StepItem], first: int, layout: KvLayout) -> DecodeGroup:
    longest = layout.blocks_for(items[0].start + 1)
    flat: list[int] = []
    for item in items:
        held = item.blocks[: layout.blocks_for(item.start + 1)]
        flat.extend(held)
        flat.extend(held[-1:] * (longest - len(held)))
    tables = _int64(flat, layout.device).view(len(items), longest)
    gather = block_rows(tables, layout.layers, layout.kv_heads).transpose(1, 2).flatten()  # K of all, then V of all
    last = _int64((item.start for item in items), layout.device)
    length = longest * layout.block_size
    hidden = torch.arange(length, device=layout.device) > last.unsqueeze(1)
    mask = torch.zeros(hidden.shape, dtype=layout.dtype, device=layout.device).masked_fill_(hidden, float("-inf"))
    return DecodeGroup(first, len(items), gather, mask.repeat_interleave(layout.kv_heads, 0).unsqueeze(1))
