"""Decode steps of a few fixed sizes, each recorded once and replayed: on a GPU as a CUDA graph, one launch for a step.

A graph replays the same launches on the same memory. So a step's integers are copied into buffers that never move, and
its rows are padded to the next size: a row of padding has length 0, so attention reads nothing for it, and slot -1, so
nothing is written for it. Everything here but ``CudaCapture`` runs alike on a CPU, where "recorded" steps simply run.

The next step may be launched while one runs: all that writes the buffers, replays, and what reads the logits go to one
stream, in this order, and the host writes only what ``Upload`` knows to be copied.

Owns the buffers and the recordings. Steps that are not of single, sampling tokens go to the forward pass beside it. A
recorded step cannot be given up: it is one launch, and short.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from distserve.core.types import StepItem, StepPlan
from distserve.engine.chosen import NOBODY, ChosenIds, Followers
from distserve.engine.forward import Forward
from distserve.engine.paged_inputs import NOWHERE, table_width
from distserve.engine.pool import KvPool
from distserve.engine.upload import Upload
from distserve.models.registry import Model
from distserve.models.step import PagedKv, PagedSingles, StepInput

MOST_ROWS = 256
"""Larger batches are not recorded: the device takes longer over such a step than the host over its launches."""

TRIAL_TOKENS = 1024
"""Context of a step that kernels are tuned on."""

Run = Callable[[], Tensor]
Capture = Callable[[Run], Run]
"""Takes what runs a step on fixed buffers; returns what repeats it. The tensor returned is the same one every time."""


def batch_sizes(most: int) -> tuple[int, ...]:
    """The sizes that steps are padded to: powers of two up to ``most``, and ``most``."""
    return (*(1 << n for n in range((most - 1).bit_length())), most)


class DecodeBuffers:
    """A decode step's inputs at addresses that never change: up to ``rows`` sequences of up to ``length`` tokens.

    A block table is sent only when it is not what its row already holds: from step to step few change.
    """

    def __init__(self, rows: int, length: int, block_size: int, device: torch.device) -> None:
        self._size, self._length = block_size, length
        self._upload = Upload(device)
        self._longs = torch.zeros(3, rows, dtype=torch.int64, device=device)  # token ids, positions, slots
        self._longs[2].fill_(NOWHERE)
        self._lengths = torch.zeros(rows, dtype=torch.int32, device=device)
        self._tables = torch.zeros(rows, table_width(-(-length // block_size)), dtype=torch.int32, device=device)
        self._held: list[tuple[int, ...]] = [()] * rows  # the table of each row, as last sent
        self._rows = torch.arange(rows, device=device)

    def fill(self, items: Sequence[StepItem], size: int, followers: Followers = NOBODY) -> None:
        """Write the step's rows, and padding up to ``size`` of them, whose tables stay as they are and are not read."""
        spare = (0,) * (size - len(items))
        longs = array("q", (item.token_ids[0] for item in items))
        longs.extend(spare)
        longs.extend([item.start for item in items])
        longs.extend(spare)
        longs.extend([item.blocks[item.start // self._size] * self._size + item.start % self._size for item in items])
        longs.extend((NOWHERE,) * len(spare))
        lengths = array("i", [item.start + 1 for item in items])
        lengths.extend(spare)
        tables = {i: item.blocks for i, item in enumerate(items) if self._held[i] != item.blocks}
        self._write(longs, lengths, tables, followers)

    def fill_trial(self, size: int, blocks: int) -> None:
        """``size`` rows that write nothing, and read ``TRIAL_TOKENS`` (or what there is) of a pool of ``blocks``."""
        width = max(1, min(TRIAL_TOKENS // self._size, self._tables.shape[1], blocks))
        tokens = min(width * self._size, self._length)
        longs = array("q", (*(0,) * size, *(tokens - 1,) * size, *(NOWHERE,) * size))
        rows = {row: tuple((row * width + i) % blocks for i in range(width)) for row in range(size)}
        self._write(longs, array("i", (tokens,) * size), rows)

    def step(self, size: int) -> StepInput:
        """The input of a step of ``size`` rows: views of the buffers, to be read when the step runs."""
        token_ids, positions, slots = self._longs[:, :size]
        singles = PagedSingles(self._tables[:size], self._lengths[:size], self._length)
        return StepInput(token_ids, positions, self._rows[:size], PagedKv(slots, None, 0, singles))

    def _write(
        self,
        longs: array[int],
        lengths: array[int],
        tables: Mapping[int, tuple[int, ...]],
        followers: Followers = NOBODY,
    ) -> None:
        """``tables``: the block table of each row whose table changes."""
        size = len(lengths)
        width = min(max(map(len, tables.values()), default=0), self._tables.shape[1])
        flat = array("i")
        for blocks in tables.values():
            flat.extend(blocks[:width])
            flat.extend((0,) * (width - len(blocks)))
        fresh_longs, fresh_lengths, rows, fresh, *places = self._upload.send(
            longs, lengths, array("q", tables), flat, *followers.columns
        )
        self._longs[:, :size].copy_(fresh_longs.view(3, size))
        followers.fill(self._longs[0], places)
        self._lengths[:size].copy_(fresh_lengths)
        if tables:
            self._tables[:, :width].index_copy_(0, rows, fresh.view(len(tables), width))
            for row, blocks in tables.items():
                self._held[row] = blocks


class GraphedForward:
    """Steps of single tokens through recordings, others through ``beside``."""

    def __init__(
        self,
        model: Model,
        pool: KvPool,
        beside: Forward,
        length: int,
        capture: Capture,
        most: int = MOST_ROWS,
        chosen: ChosenIds | None = None,
    ) -> None:
        """``chosen``: where items that follow find their ids, the same as for ``beside``."""
        self._model, self._pool, self.beside, self._capture = model, pool, beside, capture
        self.chosen = chosen or ChosenIds()
        self.sizes = batch_sizes(most)
        self._buffers = DecodeBuffers(most, length, pool.block_size, pool.tensor.device)
        self._recorded: dict[int, Run] = {}

    def __call__(self, plan: StepPlan) -> Tensor | None:
        """As any forward pass; logits are valid until the next call."""
        size = self._size_of(plan.items)
        if size is None:
            return self.beside(plan)
        if size not in self._recorded:
            self._record(size)
        followers = self.chosen.followers((row, item.request_id) for row, item in enumerate(plan.items) if item.follows)
        self._buffers.fill(plan.items, size, followers)
        return self._recorded[size]()[: len(plan.items)]

    def record_all(self) -> None:
        """Record every size now, the largest first: the smaller ones then fit in the memory it took."""
        for size in reversed(self.sizes):
            self._record(size)

    def _record(self, size: int) -> None:
        self._buffers.fill_trial(size, self._pool.blocks)
        step = self._buffers.step(size)

        def run() -> Tensor:
            logits = self._model(step, self._pool.layers)
            assert logits is not None
            return logits

        self._recorded[size] = self._capture(run)

    def _size_of(self, items: Sequence[StepItem]) -> int | None:
        """The size to pad a step to; None: it is not one for a recording."""
        if not 0 < len(items) <= self.sizes[-1] or not _all_single(items):
            return None
        return self.sizes[bisect_left(self.sizes, len(items))]


def _all_single(items: Iterable[StepItem]) -> bool:
    return all(len(item.token_ids) == 1 and item.sample for item in items)


def uncaptured(run: Run) -> Run:
    """Not recorded: the step runs anew each time. For devices without graphs."""
    return run


class CudaCapture:
    """Records CUDA graphs that share one pool of memory: they never run at the same time."""

    def __init__(self) -> None:
        self._memory = torch.cuda.graph_pool_handle()

    def __call__(self, run: Run) -> Run:
        """Raises RuntimeError (of CUDA) when the step cannot be recorded."""
        run()  # compiles and tunes kernels and sets up libraries, none of which may happen while recording
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads (the mover's) may use the device meanwhile: only what this one does is recorded, or refused.
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            logits = run()

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay
