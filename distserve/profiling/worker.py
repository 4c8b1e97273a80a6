"""A process that holds one engine, as an instance does, and does what it is told over a pipe.

``run`` times steps; ``busy`` keeps it computing until ``idle``, for others to be measured beside; ``move`` sends KV to
another worker through the data plane. One command at a time; the pipe's end is the process's end.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from distserve.core.types import InstanceRef, Sampling, StepItem, StepPlan, Ticket
from distserve.engine.config import EngineConfig
from distserve.engine.native import native_copies
from distserve.engine.runner import Engine
from distserve.profiling.shapes import Shape
from distserve.transfer import Mover, StageSent

GREEDY = Sampling(temperature=0.0)
ANSWER_S = 300.0
_MOVE_S = 60.0
_MOVES = 6  # of one size; the first opens the link


class WorkerFailed(RuntimeError):
    """A measuring process ended or did not answer; the text is for the user."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What the parent needs to know of a loaded engine."""

    layers: int
    kv_heads: int
    head_dim: int
    max_len: int
    kv_bytes_per_token: float


class Worker:
    """One process. Use as a context manager; ``ask`` waits for its answer."""

    def __init__(self, config: EngineConfig, name: str) -> None:
        self._config, self._name = config, name
        self._pipe: Connection | None = None

    def __enter__(self) -> Worker:
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_main, args=(there, self._config, self._name), daemon=True)
        with _threads(self._config.threads):
            self._process.start()
        there.close()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._pipe is not None
        self._pipe.close()
        self._process.join(10.0)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def tell(self, *command: Any) -> None:
        assert self._pipe is not None, "the worker has been started"
        try:
            self._pipe.send(command)
        except (BrokenPipeError, OSError):
            raise WorkerFailed(f"the measuring process {self._name} has ended") from None

    def answer(self) -> Any:
        """Raises WorkerFailed; what the process could not do is told in its words."""
        assert self._pipe is not None
        if not self._pipe.poll(ANSWER_S):
            raise WorkerFailed(f"the measuring process {self._name} did not answer for {ANSWER_S:g} s")
        try:
            good, value = self._pipe.recv()
        except EOFError:
            raise WorkerFailed(f"the measuring process {self._name} has ended; see its words above") from None
        if not good:
            raise WorkerFailed(str(value))
        return value

    def ask(self, *command: Any) -> Any:
        self.tell(*command)
        return self.answer()


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """The environment that ``distserve serve`` gives its instances, for a process started within."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(count)
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _main(pipe: Connection, config: EngineConfig, name: str) -> None:
    with contextlib.suppress(EOFError, BrokenPipeError, KeyboardInterrupt):  # whoever started us has what it wants
        _Served(pipe, config, name).serve()


class _Served:
    """The process's side."""

    def __init__(self, pipe: Connection, config: EngineConfig, name: str) -> None:
        self._pipe = pipe
        try:
            self._engine = Engine.load(config)
        except Exception as error:
            pipe.send((False, str(error)))
            raise EOFError from error
        self._ref = InstanceRef(name, 1)
        self._mover: Mover | None = None
        self._events: queue.Queue[Any] = queue.Queue()
        self._moves = 0
        spec, pool = self._engine.spec, self._engine.pool
        each = pool.block_bytes / spec.block_size
        pipe.send((True, Facts(spec.layers, spec.kv_heads, spec.head_dim, spec.max_model_len, each)))

    def serve(self) -> None:
        try:
            while True:
                command, *arguments = self._pipe.recv()
                self._pipe.send(getattr(self, f"_on_{command}")(*arguments))
        finally:
            if self._mover is not None:
                self._mover.close()

    def _on_run(self, shape: Shape, repeats: int) -> tuple[bool, list[float]]:
        plan = _plan(shape, self._engine)
        return True, [_timed(self._engine, plan) for _ in range(repeats)]

    def _on_busy(self, shapes: Sequence[Shape]) -> tuple[bool, None]:
        """Compute these steps over and over until the next command."""
        plans = [_plan(shape, self._engine) for shape in shapes]
        self._pipe.send((True, None))
        while not self._pipe.poll():
            for plan in plans:
                self._engine.run(plan)
        return True, None  # nobody waits for it: taken by ``idle``

    def _on_idle(self) -> tuple[bool, None]:
        return True, None

    def _on_listen(self, kind: str) -> tuple[bool, str]:
        """Let KV come in over this kind of link; returns the address."""
        if self._mover is not None:
            self._mover.close()
        self._mover = Mover(
            self._ref,
            self._engine.pool.tensor,
            self._engine.spec.block_size,
            fingerprint="profile",
            report=self._events.put,
            kind=kind,
            native=native_copies("auto"),
        )
        return True, self._mover.address

    def _on_grant(self, ticket: Ticket, tokens: int) -> tuple[bool, None]:
        assert self._mover is not None, "listen comes first"
        self._mover.open_ticket(ticket, self._table(tokens))
        return True, None

    def _on_send(self, ticket: Ticket, address: str, tokens: int) -> tuple[bool, Any]:
        """Seconds from the ask to the word that all is in place, and bytes."""
        assert self._mover is not None, "listen comes first"
        table = self._table(tokens)
        began = time.perf_counter()
        self._mover.send_stage(ticket, address, 0, tokens, table, True)
        event = self._events.get(timeout=_MOVE_S)
        if not isinstance(event, StageSent):
            return False, f"KV did not arrive: {event}"
        return True, (time.perf_counter() - began, event.nbytes)

    def _table(self, tokens: int) -> tuple[int, ...]:
        return tuple(range(-(-tokens // self._engine.spec.block_size)))


def move(source: Worker, destination: Worker, names: tuple[str, str], kind: str, tokens: Sequence[int]) -> list[Any]:
    """(bytes, seconds) of hand-offs of so many tokens, each size several times, over one kind of link."""
    source.ask("listen", kind)
    address = destination.ask("listen", kind)
    found = []
    for size in tokens:
        for turn in range(_MOVES):
            ends = InstanceRef(names[0], 1), InstanceRef(names[1], 1)
            ticket = Ticket(f"{kind}-{size}-{turn}", "r", 1 << 16, *ends, "profile", turn + 1, 0, size, _MOVE_S)
            destination.ask("grant", ticket, size)
            seconds, nbytes = source.ask("send", ticket, address, size)
            if turn:
                found.append((float(nbytes), seconds))
    return found


def _plan(shape: Shape, engine: Engine) -> StepPlan:
    """The step with tokens drawn at random; whatever KV is in the pool stands for what came before."""
    size, block, items = engine.spec.vocab_size, engine.spec.block_size, []
    generator = torch.Generator().manual_seed(shape.rows)
    at = 0
    parts = [*shape.chunks, *[(1, shape.context - 1)] * shape.decodes]
    for number, (new, before) in enumerate(parts):
        count = -(-(new + before) // block)
        ids = tuple(torch.randint(3, size, (new,), generator=generator).tolist())
        table = tuple(range(at, at + count))
        items.append(StepItem(str(number), before, ids, table, True, int(before > 0), GREEDY))
        at += count
    return StepPlan(1, tuple(items))


def _timed(engine: Engine, plan: StepPlan) -> float:
    began = time.perf_counter()
    engine.run(plan)
    return time.perf_counter() - began
