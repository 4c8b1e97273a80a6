"""The instance process from start to end: bind, load, join, serve, drain, release.

Threads: the main one runs asyncio (server, streams, signals); one thread loads the model and then runs the step loop,
so that the engine lives and dies on one thread (with several steps in flight on a CPU it computes on another, which it
starts and ends itself); the mover has its own. Exit codes: 0 asked to stop; 1 broke; 2 could not start; 3 refused by
the controller.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
import os
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, closing
from typing import TypeVar

import grpc.aio

from distserve import __version__
from distserve.core.events import StageCorrupt, StageFailed, StageSent, StageStored
from distserve.core.types import Endpoint, InstanceRef, Member
from distserve.engine.native import native_copies
from distserve.engine.runner import Engine
from distserve.instance.inbox import Inbox
from distserve.instance.loading import engine_config, machine_config
from distserve.instance.loop import StepLoop, Turn
from distserve.instance.network import Answers, Network
from distserve.instance.ops import Operations
from distserve.instance.options import InstanceOptions
from distserve.instance.progress import LoadProgress
from distserve.instance.ranks.crew import RankLost
from distserve.instance.ranks.engine import RankedEngine
from distserve.instance.ranks.instance import RankedInstance
from distserve.instance.ranks.moves import RankedDataPlane
from distserve.instance.ranks.muster import Orders, started_place
from distserve.instance.ranks.place import Place, place_of
from distserve.instance.ranks.worker import run_placed
from distserve.instance.views import inspect, kv_check
from distserve.instance.watchdog import WatchedEngine
from distserve.kv.shard import Parallel
from distserve.models.errors import ModelError
from distserve.observe import codec
from distserve.observe.journal import Journal
from distserve.observe.log import set_up
from distserve.observe.startup import Startup, process_age_s
from distserve.sched.instance import InstanceState
from distserve.transfer import Mover, MoverEvent, TransferConfig
from distserve.transfer import events as mover_events
from distserve.wire.channels import PortTaken, address_of, bind, own_host
from distserve.wire.life import Ending, fresh_incarnation, tell
from distserve.wire.loop import run_loop
from distserve.wire.secret import ClusterSecret
from distserve.wire.trust import OPEN, Trust
from distserve_kernels.cores import keep_to

log = logging.getLogger(__name__)
T = TypeVar("T")
STOPPED, BROKE, CANNOT_START, REFUSED = 0, 1, 2, 3
LAST_STEP_S = 3.0
"""How long the step that runs when the process ends may still take."""

RELEASE_S = 5.0
"""How long the data plane may take to let go of its links, memory and threads."""


def main(options: InstanceOptions) -> int:
    """Run an instance until it is told to stop; returns the process's exit code."""
    set_up(f"instance {options.id}", options.log_level)
    try:
        place = place_of(os.environ, options_parallel(options))
        if place is not None and place.rank > 0:
            return run_placed(place, rank_key(Trust.of(options.security).secret), options.host, options.cores)
    except ValueError as error:
        log.error("%s", error)
        return CANNOT_START
    return run_loop(InstanceProcess(options, place).run())


class InstanceProcess:
    """One life of an instance."""

    def __init__(self, options: InstanceOptions, place: Place | None = None) -> None:
        """``place``: rank 0's, where somebody else starts the other ranks."""
        self._options = options
        self._place = place
        self._ranks: RankedInstance | None = None
        self._ref = InstanceRef(options.id, fresh_incarnation())
        first = place or started_place(options_parallel(options), 0)
        self._cores = first.cores(options.cores, options.threads)
        self._thread = ThreadPoolExecutor(1, "step", initializer=keep_to, initargs=(self._cores,))
        self._seed = secrets.randbits(63)  # of ticket nonces
        self._startup = Startup(process_age_s())
        self._code = STOPPED
        self._own = Endpoint(self._ref, "", "")  # where it listens; what it advertises may be before a translator
        self._trust = OPEN

    async def run(self) -> int:
        """Start, serve, end. Returns the exit code."""
        ending = Ending(self._options.parent_fd)
        inbox = Inbox()
        async with AsyncExitStack() as held:
            held.callback(ending.close)
            try:
                self._options.check()
                self._trust = Trust.of(self._options.security)
                server, port = bind(self._options.host, self._options.port, self._trust)
                if options_parallel(self._options).ranks > 1:
                    self._ranks = self._ranked(ending, inbox)
                engine = await self._load(ending)
                mover = self._mover(engine, inbox)
                held.push_async_callback(self._release, mover)
                self._startup.mark("data_plane")
                member = self._member(engine, mover, port)
                journals = [held.enter_context(closing(journal)) for journal in self._journals(member)]
            except (PortTaken, ModelError, ValueError, OSError) as error:
                log.error("%s", error)
                return CANNOT_START
            await self._serve(ending, server, member, engine, mover, inbox, journals)
        return self._code

    # ── start ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _ranked(self, ending: Ending, inbox: Inbox) -> RankedInstance:
        options, loop = self._options, asyncio.get_running_loop()
        transfer = self._transfer()
        orders = Orders(
            ref=self._ref,
            parallel=options_parallel(options),
            transfer=options.transfer,
            timeout_s=options.rank_timeout_s,
            log_level=options.log_level,
            key=rank_key(self._trust.secret),
            data_keys=transfer.keys,
            data_port=transfer.port,
            cores=options.cores,
        )

        def lost(words: str) -> None:
            loop.call_soon_threadsafe(self._hung, ending, words)

        def asked() -> None:
            loop.call_soon_threadsafe(ending.ask)

        return RankedInstance(
            orders, self._place, lost=lost, asked=asked, report=lambda event: inbox.put(stage_event(event))
        )

    async def _load(self, ending: Ending) -> Engine | RankedEngine:
        """Load the model on the step thread. A process that is told to end meanwhile has nothing to release."""
        options = self._options
        config = dataclasses.replace(engine_config(options), cores=self._cores)
        self._startup.mark("python")
        began = time.monotonic()
        load: Callable[..., Engine | RankedEngine] = Engine.load if self._ranks is None else self._ranks.load
        loading = asyncio.get_running_loop().run_in_executor(
            self._thread, load, config, LoadProgress(options.model), self._startup.mark
        )
        if not await first_of(loading, ending.asked):
            log.info("told to stop while loading %s", options.model)
            leave_at_once(self._code)
        engine = loading.result()
        log.info("loaded %s in %.1f s", options.model, time.monotonic() - began)
        return engine

    def _mover(self, engine: Engine | RankedEngine, inbox: Inbox) -> Mover | RankedDataPlane:
        options = self._options
        if self._ranks is not None:
            return self._ranks.data_plane(self._transfer())
        return Mover(
            self._ref,
            engine.pool.tensor,
            engine.spec.block_size,
            fingerprint=engine.spec.fingerprint,
            report=lambda event: inbox.put(stage_event(event)),
            kind=options.transfer,
            config=self._transfer(),
            native=native_copies(options.kernels),
        )

    def _transfer(self) -> TransferConfig:
        """Settings of the data plane. Chaos runs override this to reach into staging."""
        options = self._options
        secret = self._trust.secret
        return TransferConfig(
            bind_host=options.host,
            port=options.data_port,
            advertise_host=self._advertised(),
            cores=self._cores,
            keys=secret.derive("transfer") if secret is not None else (),
        )

    def _advertised(self) -> str:
        return self._options.advertise_host or own_host(self._options.host, self._options.controller)

    def _member(self, engine: Engine | RankedEngine, mover: Mover | RankedDataPlane, port: int) -> Member:
        options = self._options
        self._own = Endpoint(self._ref, address_of(self._advertised(), port), mover.address)
        address, data_address = options.advertise or self._own.address, options.advertise_data or mover.address
        return Member(Endpoint(self._ref, address, data_address), options.role, engine.spec, __version__)

    # ── serve ────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _serve(
        self,
        ending: Ending,
        server: grpc.aio.Server,
        member: Member,
        engine: Engine | RankedEngine,
        mover: Mover | RankedDataPlane,
        inbox: Inbox,
        journals: Sequence[Journal],
    ) -> None:
        options, asyncio_loop = self._options, asyncio.get_running_loop()
        machine = InstanceState(member, machine_config(options), self._seed)
        operations = Operations(member, machine, inbox)

        def welcomed() -> None:
            if "join" not in self._startup.seconds:  # not when it joins again
                self._startup.mark("join")
                operations.observer.set_startup(self._startup.seconds)
                log.info("ready after %s", self._startup.words())
            operations.ready = True
            seconds = {phase: round(each, 3) for phase, each in self._startup.seconds.items()}
            tell(options.ready_fd, "joined", "instance", options.id, startup_s=seconds)

        def refused(_: str) -> None:
            self._end(ending, REFUSED)

        network = Network(
            options.controller,
            member,
            machine.load(),
            inbox,
            welcomed=welcomed,
            refused=refused,
            broke=lambda _: self._end(ending, BROKE),
            trust=self._trust,
        )

        def outward(turn: Turn) -> None:
            asyncio_loop.call_soon_threadsafe(network.on_turn, turn)

        def late(words: str) -> None:
            asyncio_loop.call_soon_threadsafe(self._hung, ending, words)

        watched = WatchedEngine(engine, options.step_timeout_s or math.inf, late)
        steps = StepLoop(inbox, machine, watched, mover, outward, [*journals, operations.observer])
        stepping = asyncio_loop.run_in_executor(self._thread, run_steps, steps, engine)
        stepping.add_done_callback(lambda _: ending.ask())
        try:
            await network.start(server, Answers(lambda r, now: inspect(machine, r, now), lambda: kv_check(machine)))
            self._announce(member, await self._open_ops(operations, ending))
            await ending.asked.wait()
            operations.ready = False
            if not stepping.done():
                await self._drain(ending, network)
        finally:
            await operations.stop()
            await self._stop(network, inbox, stepping)
            watched.close()

    async def _open_ops(self, operations: Operations, ending: Ending) -> int | None:
        """The operations port, if one is wanted; without it the instance ends, for nobody could watch it."""
        host, port = self._options.host, self._options.ops_port
        if port is None:
            return None
        try:
            return await operations.start(host, port)
        except OSError as error:
            log.error("cannot listen on %s:%d (%s); choose another --ops-port", host, port, error.strerror or error)
            self._end(ending, CANNOT_START)
            return None

    def _journals(self, member: Member) -> list[Journal]:
        if self._options.journal is None:
            return []
        about = {
            "machine": "instance",
            "member": codec.encode(member),
            "config": dataclasses.asdict(machine_config(self._options)),
            "seed": self._seed,
        }
        return [Journal(self._options.journal, about)]

    def _announce(self, member: Member, ops_port: int | None) -> None:
        log.info("%s serves on %s, KV on %s", member.ref, member.endpoint.address, member.endpoint.data_address)
        tell(
            self._options.ready_fd,
            "bound",
            "instance",
            member.ref.id,
            incarnation=member.ref.incarnation,
            role=str(member.role),
            address=member.endpoint.address,
            data_address=member.endpoint.data_address,
            own_address=self._own.address,
            own_data_address=self._own.data_address,
            ops_port=ops_port,
        )

    # ── end ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _hung(self, ending: Ending, words: str) -> None:
        log.critical("%s", words)
        if self._ranks is not None:
            self._ranks.kill()
        self._end(ending, BROKE)

    def _end(self, ending: Ending, code: int) -> None:
        self._code = code
        ending.ask(urgent=True)

    async def _drain(self, ending: Ending, network: Network) -> None:
        """Take nothing new; let what runs finish within the grace."""
        if ending.urgent.is_set():
            return
        log.info("stopping; requests have %.0f s to finish", self._options.grace_s)
        network.refuse_new()
        idle = asyncio.ensure_future(network.idle())
        try:
            async with asyncio.timeout(self._options.grace_s):
                await first_of(idle, ending.urgent)
        except TimeoutError:
            log.warning("requests still ran after %.0f s; they end here", self._options.grace_s)
        finally:
            idle.cancel()

    async def _release(self, mover: Mover | RankedDataPlane) -> None:
        try:
            async with asyncio.timeout(RELEASE_S):
                await asyncio.to_thread(mover.close)
        except TimeoutError:
            log.error("the data plane did not let go within %.0f s; leaving it", RELEASE_S)
            leave_at_once(BROKE)

    async def _stop(self, network: Network, inbox: Inbox, stepping: asyncio.Future[None]) -> None:
        inbox.stop()
        await network.leave()
        await network.close()
        await asyncio.wait([stepping], timeout=LAST_STEP_S)
        if not stepping.done():
            log.error("the last step took over %.0f s; leaving it", LAST_STEP_S)
            leave_at_once(BROKE)
        if (error := stepping.exception()) is not None:
            log.critical("the step loop broke", exc_info=None if isinstance(error, RankLost) else error)
            self._code = BROKE
        self._thread.shutdown()
        log.info("stopped")


def run_steps(steps: StepLoop, engine: Engine | RankedEngine) -> None:
    """Until the loop ends and the engine is done with what was still outstanding."""
    with closing(engine):
        steps.run()


def options_parallel(options: InstanceOptions) -> Parallel:
    return Parallel(options.tp, options.pp)


def rank_key(secret: ClusterSecret | None) -> bytes:
    """What ranks that others start must know; empty in a cluster without a secret."""
    return secret.derive("ranks")[0] if secret is not None else b""


async def first_of(work: asyncio.Future[T], stop: asyncio.Event) -> bool:
    """Wait for work or for the order to stop, whichever comes first. True: the work is done."""
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait((work, stopping), return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()
    return work.done()


def leave_at_once(code: int) -> None:
    """End the process although a thread of it cannot be interrupted."""
    logging.shutdown()
    os._exit(code)


def stage_event(event: MoverEvent) -> StageSent | StageFailed | StageStored | StageCorrupt:
    """What the mover reports, as the machine hears it."""
    match event:
        case mover_events.StageSent(move_id, start, end, nbytes, seconds):
            return StageSent(move_id, start, end, nbytes, seconds)
        case mover_events.StageFailed(move_id, reason, retriable, _, _, detail):
            return StageFailed(move_id, f"{reason}: {detail}" if detail else str(reason), retriable)
        case mover_events.StageStored(move_id, nonce, start, end, nbytes):
            return StageStored(move_id, nonce, start, end, nbytes)
        case mover_events.StageCorrupt(move_id, nonce, reason):
            return StageCorrupt(move_id, nonce, reason)
