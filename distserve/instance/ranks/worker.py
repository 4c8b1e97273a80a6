"""A rank other than 0, from start to end: find rank 0, load the share it names, run steps and orders until it is gone.

Threads: the main one reads rank 0's frames, carries out orders for the data plane and notices the end; one thread loads
and runs steps, so that a fence never waits for a step; the mover has its own. While there is nothing to do all of them
block. Exit codes are those of the instance; the process never outlives rank 0.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

import torch

from distserve import __version__
from distserve.core.effects import AbortSend, CloseTicket, OpenTicket, SendStage
from distserve.core.types import InstanceRef, StepPlan
from distserve.engine.collectives import open_groups
from distserve.engine.config import EngineConfig
from distserve.engine.native import native_copies
from distserve.engine.shard import ShardEngine
from distserve.instance.progress import LoadProgress
from distserve.instance.ranks.frames import Order, moved_frame, order_of, step_plan, tokens_frame
from distserve.instance.ranks.link import LinkClosed, RankLink, proof
from distserve.instance.ranks.place import ADDRESS_KEY, BadPlace, Place, place_of, rank_device
from distserve.kv.shard import Parallel
from distserve.models.errors import ModelError
from distserve.observe.log import set_up
from distserve.transfer import Mover, TransferConfig
from distserve.v1 import ranks_pb2 as pb
from distserve.wire.convert import from_message
from distserve_kernels.cores import keep_to

log = logging.getLogger(__name__)
STOPPED, BROKE, CANNOT_START = 0, 1, 2
LINK_VARIABLE, WORLD_VARIABLE = "DISTSERVE_RANK_LINK", "WORLD_SIZE"
MEET_S = 300.0
"""How long a rank waits for rank 0 to appear: machines start at different times."""

SEND_S = 30.0
RELEASE_S = 2.0
"""How long the data plane may take to let go."""


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What the step thread made."""

    engine: ShardEngine
    mover: Mover


def main() -> int:
    """A rank that rank 0 started: its place and its link are in the environment."""
    fd = int(os.environ[LINK_VARIABLE])
    place = place_of(os.environ, Parallel(int(os.environ[WORLD_VARIABLE])))
    assert place is not None
    set_up(f"rank {place.rank}", "info")
    return run(place, b"", RankLink(socket.socket(fileno=fd), SEND_S), host="127.0.0.1")


def run_placed(place: Place, key: bytes, host: str, cores: Sequence[int] = ()) -> int:
    """A rank that torchrun, Kubernetes or an operator started. ``host`` is where its data plane listens, ``cores`` are
    what the ranks of this machine keep to.
    """
    set_up(f"rank {place.rank}", "info")
    try:
        store = place.store(MEET_S)
        address = store.get(ADDRESS_KEY).decode()
        name, _, port = address.rpartition(":")
        sock = socket.create_connection((name.strip("[]"), int(port)), MEET_S)
    except (BadPlace, RuntimeError, OSError) as error:
        log.error("rank 0 cannot be reached: %s", str(error).splitlines()[0])
        return CANNOT_START
    return run(place, key, RankLink(sock, SEND_S), host, cores)


def run(place: Place, key: bytes, link: RankLink, host: str, cores: Sequence[int] = ()) -> int:
    """Serve rank 0 over a link until it ends. All threads keep to the rank's own cores."""
    try:
        welcome = _greet(link, place, key)
    except LinkClosed as error:
        log.error("rank 0 did not take rank %d in: %s", place.rank, error)
        return CANNOT_START
    instance = from_message(InstanceRef, welcome.instance)
    set_up(f"instance {instance.id} rank {place.rank}", welcome.log_level)
    keep_to(own := tuple(welcome.cores) or place.cores(cores, welcome.threads))
    _Rank(place, link, welcome, instance, host, own).serve()


def _greet(link: RankLink, place: Place, key: bytes) -> pb.RankWelcome:
    nonce = link.receive(MEET_S).challenge.nonce
    hello = pb.RankHello(rank=place.rank, proof=proof(key, nonce, place.rank), version=__version__)
    link.send(pb.RankFrame(hello=hello))
    frame = link.receive(MEET_S)
    if not frame.HasField("welcome"):
        raise LinkClosed(frame.failed.message or "no welcome came")
    return frame.welcome


def told_config(welcome: pb.RankWelcome, local_rank: int) -> EngineConfig:
    """What rank 0 wants this rank's engine to be."""
    return EngineConfig(
        model=welcome.model,
        dtype=welcome.dtype,
        kv_dtype=welcome.kv_dtype,
        device=rank_device(welcome.device, local_rank),
        threads=welcome.threads,
        pool_blocks=welcome.pool_blocks,
        block_size=welcome.block_size,
        max_model_len=welcome.max_model_len,
        kernels=welcome.kernels,
        cuda_graphs=welcome.cuda_graphs,
    )


class _Rank:
    """One rank's life."""

    def __init__(
        self,
        place: Place,
        link: RankLink,
        welcome: pb.RankWelcome,
        ref: InstanceRef,
        host: str,
        cores: tuple[int, ...],
    ) -> None:
        self._place, self._link, self._welcome, self._ref, self._host = place, link, welcome, ref, host
        self._cores = cores
        self._parallel = Parallel(welcome.tp, welcome.pp)
        self._plans: queue.SimpleQueue[StepPlan] = queue.SimpleQueue()
        self._loaded: _Loaded | None = None

    def serve(self) -> NoReturn:
        """Until rank 0 is gone. A step that runs then is left, with the process."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        threading.Thread(target=self._work, name="step", daemon=True).start()
        try:
            while True:
                self._take(self._link.receive())
        except LinkClosed:
            log.info("rank 0 is gone; so is rank %d", self._place.rank)
        except Exception as error:
            log.exception("rank %d broke", self._place.rank)
            self._fail(error)
        self._leave(STOPPED)

    def _take(self, frame: pb.RankFrame) -> None:
        match frame.WhichOneof("kind"):
            case "step":
                self._plans.put(step_plan(frame.step))
            case "order":
                self._obey(order_of(frame.order))
                if frame.order.number:
                    self._link.send(pb.RankFrame(ack=pb.RankAck(number=frame.order.number)))
            case other:
                raise ValueError(f"rank 0 said a frame of kind {other}")

    def _obey(self, order: Order) -> None:
        if self._loaded is None:
            raise ValueError("an order came before this rank was ready")
        mover = self._loaded.mover
        match order:
            case OpenTicket(ticket, blocks):
                mover.open_ticket(ticket, blocks)
            case CloseTicket(move_id):
                mover.close_ticket(move_id)
            case SendStage(ticket, address, start, end, blocks, final):
                mover.send_stage(ticket, address, start, end, blocks, final)
            case AbortSend(move_id):
                mover.abort_send(move_id)
            case InstanceRef():
                mover.peer_lost(order)

    # ── the step thread ──────────────────────────────────────────────────────────────────────────────────────────────

    def _work(self) -> None:
        try:
            engine = self._load()
            while True:
                plan = self._plans.get()
                tokens = engine.run(plan)
                if engine.samples:
                    self._link.send(tokens_frame(plan.number, tokens))
        except LinkClosed:
            return  # the main thread hears of it, too
        except ModelError as error:
            self._fail(error)
        except Exception as error:
            log.exception("rank %d broke", self._place.rank)
            self._fail(error)
        self._leave(BROKE)

    def _load(self) -> ShardEngine:
        welcome, began = self._welcome, time.monotonic()
        config = replace(told_config(welcome, self._place.local_rank), cores=self._cores)
        interface = self._place.interface
        lanes, pipe = open_groups(
            self._place.store(MEET_S),
            self._parallel,
            self._place.rank,
            interface=interface,
            device=torch.device(config.device),
            timeout_s=welcome.timeout_s,
        )
        what = f"{welcome.model} ({self._parallel}, rank {self._place.rank})"
        engine = ShardEngine.load(config, self._parallel, self._place.rank, lanes, pipe, LoadProgress(what))
        mover = self._mover(engine, interface)
        self._loaded = _Loaded(engine, mover)
        ready = pb.RankReady(
            data_address=mover.address,
            fingerprint=engine.spec.fingerprint,
            weight_bytes=engine.weight_bytes,
            pool_bytes=engine.pool.tensor.nbytes,
            load_s=time.monotonic() - began,
        )
        self._link.send(pb.RankFrame(ready=ready))
        return engine

    def _mover(self, engine: ShardEngine, interface: str) -> Mover:
        return Mover(
            self._ref,
            engine.pool.tensor,
            engine.spec.block_size,
            fingerprint=engine.spec.fingerprint,
            report=self._report,
            kind=self._welcome.transfer,
            config=TransferConfig(
                bind_host=self._host,
                port=self._welcome.data_port + self._place.rank if self._welcome.data_port else 0,
                advertise_host=interface,
                cores=self._cores,
                keys=tuple(self._welcome.data_keys),
            ),
            cut=engine.cut,
            rank=self._place.rank,
            native=native_copies(self._welcome.kernels),
        )

    def _report(self, event: object) -> None:
        with contextlib.suppress(LinkClosed):  # the main thread hears of it, too
            self._link.send(moved_frame(event))  # type: ignore[arg-type]  # a MoverEvent; said so for the mover's sake

    # ── the end ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _on_signal(self, number: int, _: object) -> None:
        """Told to stop: it is the instance that drains. Rank 0 may have been told as well; it minds no second word.

        On a thread of its own, for the main one may hold the link's lock when the signal comes.
        """
        threading.Thread(target=self._fail, args=(RuntimeError("told to stop"), True), daemon=True).start()

    def _fail(self, error: Exception, asked: bool = False) -> None:
        words = str(error).splitlines()[0] if str(error) else type(error).__name__
        with contextlib.suppress(LinkClosed):
            self._link.send(pb.RankFrame(failed=pb.RankFailed(message=words, asked=asked)))

    def _leave(self, code: int) -> NoReturn:
        """End the process, whatever its threads do."""
        if self._loaded is not None:
            closing = threading.Thread(target=self._loaded.mover.close, daemon=True)
            closing.start()
            closing.join(RELEASE_S)
        logging.shutdown()
        os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
