"""Ranks for tests: processes that are started once and take any place of any instance, over gloo.

They are forked from a server that has imported torch, so that eight of them cost little more than one.
"""

from __future__ import annotations

import multiprocessing
import queue
from collections.abc import Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from distserve.core.types import InstanceRef, ModelSpec, StepPlan, Ticket
from distserve.engine import native_stage
from distserve.engine.collectives import open_groups
from distserve.engine.config import EngineConfig
from distserve.engine.runner import StepOutput
from distserve.engine.shard import ShardEngine
from distserve.instance.ranks.frames import step_frame, step_plan
from distserve.instance.ranks.moves import Tally
from distserve.kv.shard import Parallel
from distserve.transfer import Mover, MoverEvent, StageSent, StageStored, TransferConfig
from distserve.transfer.address import data_address
from distserve_kernels.native.library import NativeUnavailable

HOST = "127.0.0.1"
WAIT_S = 100.0
HANDSHAKE_S = 30.0
"""A store of torch.distributed looks up the name of who connects; a name server that does not answer costs 5 s."""


class Ranks:
    """``count`` processes; ``load`` makes an instance of some of them."""

    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._ends: list[Connection] = []
        self._processes = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._ends.append(ours)
            self._processes.append(process)

    def load(
        self, model: Path | str, layout: Parallel, *, first: int = 0, name: str = "one", **settings: Any
    ) -> Ranked:
        """An instance of processes ``first`` …, each with its share of a model. Raises what a rank raised.

        ``settings`` are an ``EngineConfig``'s, and ``messages`` (lanes share no memory), ``no_compiler_at`` (a rank),
        ``most_rows`` (of native steps, for each rank).
        """
        return Ranked(self._ends[first : first + layout.ranks], str(model), layout, InstanceRef(name, 1), settings)

    def close(self) -> None:
        for end in self._ends:
            end.close()
        for process in self._processes:
            process.join(WAIT_S)
            assert process.exitcode == 0


class Ranked:
    """One instance. Runs plans like an engine and moves KV like a mover."""

    def __init__(
        self, ends: Sequence[Connection], model: str, layout: Parallel, ref: InstanceRef, settings: dict[str, Any]
    ) -> None:
        self.ref, self.layout = ref, layout
        self._ends = ends
        self._store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
        config = {"model": model, "pool_blocks": 96, "threads": 1} | settings
        self.facts: list[dict[str, Any]] = self._ask(
            *(("load", self._store.port, layout, rank, ref, config) for rank in range(layout.ranks))
        )
        self.spec: ModelSpec = self.facts[0]["spec"]
        self.address = data_address(layout, [facts["address"] for facts in self.facts])
        self._events: queue.SimpleQueue[MoverEvent] = queue.SimpleQueue()
        self.tally = Tally(layout.ranks, self._events.put)

    def run(self, plan: StepPlan) -> StepOutput:
        """As an engine's; plans travel as they do between the ranks of an instance."""
        bare, full = (step_frame(plan, sampling=sampling).SerializeToString() for sampling in (False, True))
        sampler = self.layout.sampler
        answers = self._ask(*(("run", full if rank == sampler else bare) for rank in range(self.layout.ranks)))
        names = [item.request_id for item in plan.items if item.sample]
        return StepOutput(tuple(zip(names, answers[sampler], strict=True)), 0.0)

    def open_ticket(self, ticket: Ticket, blocks: tuple[int, ...]) -> None:
        self.tally.storing(ticket)
        self._ask(*[("open_ticket", ticket, blocks)] * self.layout.ranks)

    def send_stage(
        self, ticket: Ticket, address: str, start: int, end: int, blocks: tuple[int, ...], final: bool
    ) -> None:
        self.tally.sending(ticket.move_id, start, end)
        self._ask(*[("send_stage", ticket, address, start, end, blocks, final)] * self.layout.ranks)

    def event(self, kind: type[StageSent] | type[StageStored]) -> Any:
        """Wait until every rank has told of its part of a stage; what that comes to."""
        for rank, event in enumerate(self._ask(*[("event",)] * self.layout.ranks)):
            self.tally.take(rank, event)
        event = self._events.get_nowait()
        assert isinstance(event, kind), event
        return event

    def close(self) -> None:
        """Give the processes back."""
        self._ask(*[("close",)] * self.layout.ranks)

    def _ask(self, *commands: tuple[Any, ...]) -> list[Any]:
        for end, command in zip(self._ends, commands, strict=True):
            end.send(command)
        answers = []
        for end in self._ends:
            assert end.poll(WAIT_S), "a rank does not answer"
            answers.append(end.recv())
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers


class _Rank:
    """What runs in a process: one rank of the present instance."""

    def __init__(self) -> None:
        self._engine: ShardEngine | None = None
        self._mover: Mover | None = None
        self._events: queue.Queue[MoverEvent] = queue.Queue()

    def load(
        self, port: int, layout: Parallel, rank: int, ref: InstanceRef, settings: dict[str, Any]
    ) -> dict[str, Any]:
        self.close()
        settings = dict(settings)
        messages, torchless = settings.pop("messages", False), settings.pop("no_compiler_at", None) == rank
        most_rows = settings.pop("most_rows", None)
        store = dist.TCPStore(HOST, port, is_master=False, wait_for_workers=False)
        lanes, pipe = open_groups(store, layout, rank, interface=HOST, device=torch.device("cpu"), timeout_s=WAIT_S)
        read: list[int] = []
        with ExitStack() as held:
            if messages:
                held.enter_context(mock.patch.object(native_stage, "share_memory", lambda group, *_: group))
            if most_rows is not None:
                held.enter_context(mock.patch.object(native_stage, "most_native_rows", lambda _: most_rows[rank]))
            if torchless:
                held.enter_context(mock.patch.object(native_stage, "load", _no_compiler))
            engine = ShardEngine.load(
                EngineConfig(**settings), layout, rank, lanes, pipe, lambda done, total, what: read.append(done)
            )
        tensor = engine.pool.tensor
        self._engine = engine
        self._mover = Mover(
            ref,
            tensor,
            engine.spec.block_size,
            fingerprint=engine.spec.fingerprint,
            report=self._events.put,
            kind="gloo",
            config=TransferConfig(handshake_s=HANDSHAKE_S),
            cut=engine.cut,
            rank=rank,
        )
        return {
            "spec": engine.spec,
            "read": read[-1],
            "weights": engine.weight_bytes,
            "pool": tuple(tensor.shape),
            "stage": type(engine.stage).__name__,
            "lanes": type(engine.lanes).__name__,
            "address": self._mover.address,
        }

    def run(self, frame: bytes) -> Sequence[Any]:
        assert self._engine is not None
        message = step_frame(StepPlan(0, ()), sampling=False)
        message.ParseFromString(frame)
        return self._engine.run(step_plan(message.step))

    def open_ticket(self, *arguments: Any) -> None:
        assert self._mover is not None
        self._mover.open_ticket(*arguments)

    def send_stage(self, *arguments: Any) -> None:
        assert self._mover is not None
        self._mover.send_stage(*arguments)

    def event(self) -> MoverEvent:
        return self._events.get(timeout=WAIT_S)

    def close(self) -> None:
        if self._mover is not None:
            self._mover.close()
        self._engine = self._mover = None


def _no_compiler(*_: object) -> None:
    raise NativeUnavailable("there is no compiler")


def _serve(end: Connection) -> None:
    torch.set_num_threads(1)
    rank = _Rank()
    while True:
        try:
            command, *arguments = end.recv()
        except EOFError:
            rank.close()
            return
        try:
            end.send(getattr(rank, command)(*arguments))
        except Exception as error:
            end.send(error)
