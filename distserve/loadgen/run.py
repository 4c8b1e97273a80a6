"""Runs of requests: at given times (open loop), or so many in flight (closed loop). Every task ends with its run."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from distserve.loadgen.client import Client, Record
from distserve.loadgen.workload import Ask

_LEAD_S = 0.05  # between making the tasks and the first due time


@dataclass(slots=True)
class Progress:
    """How far a run is; ``changed`` is called whenever that changes."""

    total: int = 0
    sent: int = 0
    done: int = 0
    failed: int = 0
    changed: Callable[[Progress], None] = field(default=lambda _: None)


async def open_loop(
    client: Client,
    asks: Sequence[Ask],
    progress: Progress | None = None,
    decided: Callable[[Sequence[Record]], bool] = lambda _: False,
) -> tuple[list[Record], float]:
    """Send each ask when it is due, whatever became of those before. Returns records and seconds taken.

    ``decided`` is asked after each end with all records that ended; once true, what is open or unsent is given up and
    counts as ``cut_off``.
    """
    progress = progress or Progress()
    progress.total = len(asks)
    start = time.perf_counter() + _LEAD_S
    ended: list[Record] = []
    stop = asyncio.Event()

    async def one(ask: Ask) -> Record:
        due = start + ask.due_s
        if (wait_s := due - time.perf_counter()) > 0:
            await asyncio.sleep(wait_s)
        progress.sent += 1
        record = await client.send(ask, due)
        _count(progress, record)
        ended.append(record)
        if decided(ended):
            stop.set()
        return record

    tasks = [asyncio.create_task(one(ask)) for ask in asks]
    watch = asyncio.create_task(stop.wait())
    try:
        everything: asyncio.Future[list[Any]] = asyncio.gather(*tasks, return_exceptions=True)
        waited: list[asyncio.Future[Any]] = [everything, watch]
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (*tasks, watch):
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    records = [_record(r, start + a.due_s) for a, r in zip(asks, results, strict=True)]
    finish = max((r.end for r in records if not r.cut_off), default=start)
    return records, finish - start


async def closed_loop(
    client: Client, asks: Iterator[Ask], concurrency: int, count: int, progress: Progress | None = None
) -> tuple[list[Record], float]:
    """Keep ``concurrency`` requests in flight until ``count`` are done."""
    progress = progress or Progress()
    progress.total = count
    numbered = iter(range(count))
    records: list[Record] = []

    async def worker() -> None:
        for _ in numbered:
            progress.sent += 1
            record = await client.send(next(asks))
            _count(progress, record)
            records.append(record)

    start = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(worker())
    return records, time.perf_counter() - start


async def warm_up(client: Client, asks: Iterator[Ask], count: int) -> str:
    """A few requests one after another, not measured. Returns the first error's words, or nothing."""
    for _ in range(count):
        record = await client.send(next(asks))
        if record.error:
            return record.error
    return ""


def _count(progress: Progress, record: Record) -> None:
    progress.done += 1
    progress.failed += bool(record.error)
    progress.changed(progress)


def _record(result: Record | BaseException, due: float) -> Record:
    """A task's record; a cancelled one was cut off; anything else is a bug here and goes on."""
    if isinstance(result, Record):
        return result
    if isinstance(result, asyncio.CancelledError):
        return Record(due, due, end=due, cut_off=True)
    raise result
