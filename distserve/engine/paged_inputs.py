"""From a ``StepPlan`` to the flat tensors of one forward pass over block tables (``PagedKv``).

Orders the rows: prompt chunks first, then items of one token, each in the plan's order. Owns only the buffers that
integers travel in; the pool is known by its sizes. Blocks need no clearing: paged operations read no position that was
not written. The ids of items that follow are put in on the device.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import accumulate

import torch

from distserve.core.types import StepItem, StepPlan
from distserve.engine.chosen import ChosenIds
from distserve.engine.upload import Upload
from distserve.models.step import PagedChunks, PagedKv, PagedSingles, StepInput

NOWHERE = -1
"""The slot of a row whose K and V are not written."""


class PagedInputs:
    """Builds the inputs of steps. One thread uses it."""

    def __init__(self, block_size: int, length: int, device: torch.device, chosen: ChosenIds | None = None) -> None:
        """``length``: of the longest sequence served. How attention is cut depends on it, not on the batch's own.

        ``chosen``: where items that follow find their ids; without, none may.
        """
        self._size, self._length = block_size, length
        self._upload = Upload(device)
        self._chosen = chosen or ChosenIds()

    def __call__(self, plan: StepPlan) -> StepInput:
        """The input of one pass over ``plan``'s items. ``sample_rows`` are in the order of the items that sample."""
        chunks = [item for item in plan.items if len(item.token_ids) > 1]
        singles = [item for item in plan.items if len(item.token_ids) == 1]
        firsts = array("i", accumulate((len(item.token_ids) for item in chunks), initial=0))
        starts = array("i", (item.start for item in chunks))
        lengths = array("i", (item.start + 1 for item in singles))
        followers = self._chosen.followers(
            (row, item.request_id) for row, item in enumerate(singles, firsts[-1]) if item.follows
        )
        token_ids, positions, slots, sampled, *rest = self._upload.send(
            *token_columns((*chunks, *singles), self._size),
            _sample_rows(plan.items),
            *(firsts, starts, lengths),
            *(table_rows(items, self._size) for items in (chunks, singles)),
            *followers.columns,
        )
        followers.fill(token_ids, rest[5:])
        prefill = decode = None
        if chunks:
            longest = max(len(item.token_ids) for item in chunks)
            prefill = PagedChunks(rest[3].view(len(chunks), -1), rest[0], rest[1], longest)
        if singles:
            decode = PagedSingles(rest[4].view(len(singles), -1), rest[2], self._length)
        kv = PagedKv(slots, prefill, firsts[-1], decode)
        return StepInput(token_ids, positions, sampled if len(sampled) else None, kv)

    def trial(self, tokens: int, blocks: int) -> StepInput:
        """A prompt of ``tokens`` that writes nothing: for kernels to be compiled and tuned on before they serve.

        It reads whatever is in a pool of ``blocks`` blocks.
        """
        held = table_width(-(-tokens // self._size))
        token_ids, positions, slots, last, firsts, starts, table = self._upload.send(
            array("q", (0,) * tokens),
            array("q", range(tokens)),
            array("q", (NOWHERE,) * tokens),
            array("q", (tokens - 1,)),
            array("i", (0, tokens)),
            array("i", (0,)),
            array("i", (i % blocks for i in range(held))),
        )
        chunks = PagedChunks(table.view(1, -1), firsts, starts, tokens)
        return StepInput(token_ids, positions, last, PagedKv(slots, chunks, tokens, None))


def token_columns(items: Sequence[StepItem], size: int) -> tuple[array[int], array[int], array[int]]:
    """(token ids, positions, slots) of all tokens of ``items``, in order; ``size``: tokens in a block."""
    ids, positions, slots = array("q"), array("q"), array("q")
    for item in items:
        at, end = item.start, item.start + len(item.token_ids)
        ids.extend(item.token_ids)
        positions.extend(range(at, end))
        while at < end:  # a run in each block
            stop = min(end, (at // size + 1) * size)
            first = item.blocks[at // size] * size + at % size
            slots.extend(range(first, first + stop - at))
            at = stop
    return ids, positions, slots


def table_rows(items: Sequence[StepItem], size: int) -> array[int]:
    """Block tables [items, ``table_width``] flattened, zeros behind each."""
    held = [-(-(item.start + len(item.token_ids)) // size) for item in items]
    width = table_width(max(held, default=0))
    tables = array("i")
    for item, count in zip(items, held, strict=True):
        tables.extend(item.blocks[:count])
        tables.extend((0,) * (width - count))
    return tables


def table_width(blocks: int) -> int:
    """Columns of a table: whole sixteens, since Triton compiles a kernel anew for a row stride that is none."""
    return -(-blocks // 16) * 16


def _sample_rows(items: Sequence[StepItem]) -> array[int]:
    """The last row of each item that samples, in item order."""
    chunk_row = 0
    single_row = sum(len(item.token_ids) for item in items if len(item.token_ids) > 1)
    found = array("q")
    for item in items:
        if len(item.token_ids) > 1:
            chunk_row += len(item.token_ids)
            last = chunk_row - 1
        else:
            last = single_row
            single_row += 1
        if item.sample:
            found.append(last)
    return found
