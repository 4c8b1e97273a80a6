"""Two processes with a KV pool each, to measure the data plane with: movers between them, and a bare gloo group.

The KV of one prompt, in SmolLM2-135M's shape, goes through the whole data plane: gather, checksum, lane, verification,
scatter, events. A hand-off is timed from ``send_stage`` at the source to the moment at which the destination reports
``StageStored``: from then on its pool holds the prompt. Both clocks are CLOCK_MONOTONIC, one for the whole machine.

Each process keeps to its own half of the cores: the scheduler may wake a receiver on its sender's core, where the two
run in turns though another core idles. Knows no ratios and no goals.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from distserve.core.types import InstanceRef, Ticket
from distserve.engine.native import native_copies
from distserve.transfer import Mover, MoverEvent, StageSent, StageStored, TransferConfig

LAYERS, KV_HEADS, HEAD_DIM, BLOCK = 30, 3, 64, 16
SOURCE, DESTINATION = InstanceRef("source", 1), InstanceRef("destination", 1)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
EVICT_BYTES = 96 << 20
"""Read before an act that is to find its bytes in memory; more than a core's share of any last-level cache here."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What is moved: so many tokens, in tables of adjacent blocks or of blocks no two of which are adjacent."""

    dtype: str
    tokens: int
    fragmented: bool = False
    destination_block: int = BLOCK

    def table(self, block: int) -> tuple[int, ...]:
        count = -(-self.tokens // block)
        return tuple(range(0, 2 * count, 2)) if self.fragmented else tuple(range(count))

    def pool(self, block: int) -> torch.Tensor:
        """A pool of twice the blocks needed. Every page is there before anything is timed."""
        blocks = 2 * -(-self.tokens // block)
        pool = torch.empty(blocks, LAYERS, 2, KV_HEADS, block, HEAD_DIM, dtype=DTYPES[self.dtype])
        pool.view(torch.uint8).fill_(7)
        return pool


def bare_group(rank: int, port: int) -> tuple[Any, dist.Store]:
    """A plain two-rank gloo group, as anybody would make it."""
    timeout = timedelta(seconds=60)
    store = dist.TCPStore("127.0.0.1", port, is_master=rank == 0, timeout=timeout, wait_for_workers=False)
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # missing in torch's stubs
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout = timeout
    return dist.ProcessGroupGloo(store, rank, 2, options), store


def keep_to(half: int) -> None:
    """This process, with the threads it will start, stays on one half of the cores, if there are two."""
    if hasattr(os, "sched_setaffinity") and len(cores := sorted(os.sched_getaffinity(0))) > 1:
        middle = len(cores) // 2
        os.sched_setaffinity(0, cores[middle:] if half else cores[:middle])


class _Other:
    """The second process: does what the first one says, one command at a time."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._stored: queue.Queue[float] = queue.Queue()
        self._pool = torch.empty(0)
        self._movers: list[Mover] = []
        self._group: Any = None

    def pool(self, shape: Shape) -> None:
        self._pool = shape.pool(shape.destination_block)

    def mover(self, kind: str, config: TransferConfig) -> tuple[int, str]:
        block = self._pool.shape[4]
        mover = Mover(
            DESTINATION, self._pool, block,
            fingerprint="model", report=self._report, kind=kind, config=config, native=native_copies("auto"),
        )  # fmt: skip
        self._movers.append(mover)
        return len(self._movers) - 1, mover.address

    def open(self, mover: int, ticket: Ticket, blocks: tuple[int, ...]) -> None:
        self._movers[mover].open_ticket(ticket, blocks)

    def close(self) -> None:
        for mover in self._movers:
            mover.close()
        self._movers.clear()

    def stored(self) -> float:
        return self._stored.get(timeout=60)

    def group(self, port: int) -> None:
        self._group, _ = bare_group(1, port)

    def receive(self, nbytes: int) -> float:
        """Take a bare message into the pool; when it was there."""
        flat = self._pool.view(torch.uint8).view(-1)[:nbytes]
        work = self._group.recv([flat], 0, 0)
        self._pipe.send("posted")
        work.wait()
        return time.perf_counter()

    def _report(self, event: MoverEvent) -> None:
        if isinstance(event, StageStored):
            self._stored.put(time.perf_counter())

    def run(self) -> None:
        while (message := self._pipe.recv())[0] != "end":
            self._pipe.send(getattr(self, message[0])(*message[1:]))
        self.close()


def _second_process(pipe: Connection, pinned: bool) -> None:
    torch.set_num_threads(1)
    if pinned:
        keep_to(1)
    _Other(pipe).run()


class Pair:
    """This process and the second one, with a pool of one shape each and a bare group between them."""

    def __init__(self, pipe: Connection, pid: int) -> None:
        self.pid = pid
        self.pool = torch.empty(0)
        self._pipe = pipe
        self._scratch = torch.ones(EVICT_BYTES, dtype=torch.uint8)
        port = 20000 + os.getpid() % 20000
        self._pipe.send(("group", port))
        self._group, self._store = bare_group(0, port)
        self._pipe.recv()

    def ask(self, *message: Any) -> Any:
        self._pipe.send(message)
        return self._pipe.recv()

    def take(self, shape: Shape) -> None:
        """Pools of this shape at both ends; movers over the ones before are closed at the other end."""
        self.ask("close")
        self.pool = shape.pool(BLOCK)
        self.ask("pool", shape)

    def evict(self) -> None:
        """Afterwards no pool is in a cache."""
        self._scratch.view(torch.int64).sum()

    def bare(self, nbytes: int) -> float:
        """Seconds of one bare gloo message of the pool's first bytes, from the send until the receiver has it all."""
        self._pipe.send(("receive", nbytes))
        assert self._pipe.recv() == "posted"
        flat = self.pool.view(torch.uint8).view(-1)[:nbytes]
        began = time.perf_counter()
        self._group.send([flat], 1, 0).wait()
        return float(self._pipe.recv()) - began


@contextlib.contextmanager
def two_processes(pinned: bool = True) -> Iterator[Pair]:
    """The pair; the second process ends with the block."""
    torch.set_num_threads(1)
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=_second_process, args=(there, pinned), daemon=True)
    child.start()
    if pinned:
        keep_to(0)
    assert child.pid is not None
    try:
        yield Pair(here, child.pid)
    finally:
        here.send(("end",))
        child.join(10)


class Handoffs:
    """One way of moving the shape's KV: a mover at each end. Several may share the pair's pools."""

    def __init__(self, pair: Pair, shape: Shape, kind: str, config: TransferConfig) -> None:
        self._pair = pair
        self._shape = shape
        self._events: queue.Queue[MoverEvent] = queue.Queue()
        self._mover = Mover(
            SOURCE, pair.pool, BLOCK,
            fingerprint="model", report=self._events.put, kind=kind, config=config, native=native_copies("auto"),
        )  # fmt: skip
        self._there, self._address = pair.ask("mover", kind, config)
        self._number = 0
        self.nbytes = 0  # of one hand-off, known after the first
        self.once()  # opens the link

    def once(self) -> float:
        """Seconds of one hand-off."""
        shape, self._number = self._shape, self._number + 1
        ticket = Ticket(
            f"m{self._number}", "r", 1 << 16, SOURCE, DESTINATION, "model", self._number, 0, shape.tokens, 60.0
        )
        self._pair.ask("open", self._there, ticket, shape.table(shape.destination_block))
        blocks = shape.table(BLOCK)
        began = time.perf_counter()
        self._mover.send_stage(ticket, self._address, 0, shape.tokens, blocks, True)
        event = self._events.get(timeout=60)
        assert isinstance(event, StageSent), event
        self.nbytes = event.nbytes
        return float(self._pair.ask("stored")) - began

    def close(self) -> None:
        self._mover.close()
