"""How rank 0 brings an instance of several ranks together: the others are started or awaited, told what to load, and
everybody joins the process groups. What comes of it is an engine and a data plane like those of one rank.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from distserve import __version__
from distserve.core.types import InstanceRef
from distserve.engine.collectives import open_groups
from distserve.engine.config import EngineConfig
from distserve.engine.memory import sized_for_ranks
from distserve.engine.runner import max_model_len
from distserve.engine.shard import ShardEngine
from distserve.instance.ranks.crew import Crew
from distserve.instance.ranks.link import LinkClosed, RankLink, fresh_nonce, proof
from distserve.instance.ranks.place import ADDRESS_KEY, BadPlace, Place, rank_device
from distserve.instance.ranks.worker import LINK_VARIABLE, MEET_S, SEND_S
from distserve.kv.shard import Parallel
from distserve.models.catalog import resolve_model
from distserve.models.config import read_config
from distserve.models.shard import Shard
from distserve.models.weights import Progress
from distserve.observe.startup import Mark, unmarked
from distserve.transfer import MoverEvent
from distserve.v1 import ranks_pb2 as pb
from distserve.wire.channels import address_of
from distserve.wire.convert import to_message
from distserve_kernels.cores import as_process

log = logging.getLogger(__name__)
LOOPBACK = "127.0.0.1"
GREET_S = 10.0
"""How long a connection may take to say who it is."""

LOAD_S = 3600.0
"""How long the slowest rank may take to load its share."""

END_S = 3.0
"""How long a rank we started may take to end when we do."""


@dataclass(frozen=True, slots=True)
class Orders:
    """What every rank is told besides the engine's own settings."""

    ref: InstanceRef
    parallel: Parallel
    transfer: str
    timeout_s: float
    log_level: str
    key: bytes  # that placed ranks must know; empty: none
    data_keys: tuple[bytes, ...]
    data_port: int  # of rank 0's data plane; rank n's is n further; 0: any
    cores: tuple[int, ...] = ()  # that the ranks of this machine keep to; none: any


@dataclass(slots=True)
class Mustered:
    """An instance's ranks, together."""

    engine: ShardEngine
    crew: Crew
    data_addresses: tuple[str, ...]  # of ranks 1, 2, …
    store: dist.Store  # the groups may go on using it


class Processes:
    """The ranks that we started on this machine; none where others did."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, environ: Mapping[str, str], keep_fd: int) -> None:
        """One more rank, which keeps this descriptor open."""
        process = subprocess.Popen(
            [sys.executable, "-m", "distserve.instance.ranks.worker"],
            stdin=subprocess.DEVNULL,
            env=os.environ | dict(environ),
            pass_fds=(keep_fd,),
        )
        self._processes.append(process)

    def kill(self) -> None:
        """End them now: the instance cannot go on."""
        for process in self._processes:
            process.kill()

    def close(self) -> None:
        """Wait until they have ended by themselves; kill those that do not."""
        deadline = time.monotonic() + END_S
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, deadline - time.monotonic()))
            process.kill()
            process.wait()


def muster(
    config: EngineConfig,
    orders: Orders,
    place: Place | None,
    processes: Processes,
    progress: Progress,
    *,
    lost: Callable[[str], None],
    asked: Callable[[], None],
    report: Callable[[int, MoverEvent], None],
    mark: Mark = unmarked,
) -> Mustered:
    """Bring the ranks together and load. ``place`` is None when we start the others, on this machine.

    Raises ModelError, BadPlace, LinkClosed or RankLost with a sentence; see ``Crew`` for the callables.
    """
    shape = read_config(resolve_model(config.model))
    Shard(orders.parallel, 0, None).check(shape)  # before anything is started
    length = max_model_len(shape, config.max_model_len)
    local = orders.parallel.ranks if place is None else place.local_world
    config = sized_for_ranks(config, shape, length, orders.parallel, local)
    started = place is None
    if place is None:
        keeper = dist.TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False)
        place = started_place(orders.parallel, keeper.port)
        store: dist.Store = place.prefixed(keeper)
        links = _start(place, processes)
    else:
        store = place.store(MEET_S)
        links = _await(place, store, orders)
    try:
        for rank, link in links.items():
            told = replace(place, rank=rank, local_rank=rank).cores(orders.cores, config.threads) if started else ()
            link.send(pb.RankFrame(welcome=welcome_of(config, orders, told)))
    except LinkClosed as error:
        raise BadPlace(f"a rank ended before it was told what to do: {error}") from None
    crew = Crew(links, orders.parallel, orders.timeout_s, lost=lost, asked=asked, report=report)
    device = rank_device(config.device, place.local_rank)
    lanes, pipe = open_groups(
        store,
        orders.parallel,
        0,
        interface=place.interface,
        device=torch.device(device),
        timeout_s=orders.timeout_s,
    )
    mark("ranks")
    engine = ShardEngine.load(replace(config, device=device), orders.parallel, 0, lanes, pipe, progress, mark)
    ready = crew.ready(LOAD_S)
    mark("slowest_rank")
    for rank, facts in ready.items():
        if facts.fingerprint != engine.spec.fingerprint:
            raise BadPlace(f"rank {rank} loaded another model than rank 0; give every rank the same files")
        share, pool = facts.weight_bytes / 1e6, facts.pool_bytes / 1e6
        log.info("rank %d: %.0f MB of weights, %.0f MB of KV, ready in %.1f s", rank, share, pool, facts.load_s)
    return Mustered(engine, crew, tuple(ready[rank].data_address for rank in sorted(ready)), store)


def started_place(parallel: Parallel, port: int) -> Place:
    """Rank 0's place where it starts all others itself."""
    return Place(0, parallel.ranks, LOOPBACK, port, 0, keeper=True, local_world=parallel.ranks)


def _start(place: Place, processes: Processes) -> dict[int, RankLink]:
    """Start the other ranks on this machine; each is tied to us by a pair of sockets, which outlives neither end."""
    links: dict[int, RankLink] = {}
    for rank in range(1, place.world):
        ours, theirs = socket.socketpair()
        told = replace(place, rank=rank, local_rank=rank).environ() | {LINK_VARIABLE: str(theirs.fileno())}
        with as_process():  # it loads beside us; which cores its steps keep to it is told later
            processes.start(told, theirs.fileno())
        theirs.close()
        links[rank] = RankLink(ours, SEND_S)
        _challenge(links[rank], b"")
    for rank, link in links.items():
        if _hear(link, b"", b"", MEET_S) != rank:
            raise BadPlace("a rank that was started took another's place")
    return links


def _await(place: Place, store: dist.Store, orders: Orders) -> dict[int, RankLink]:
    """Tell the ranks that others started where we are, and take each of them in once."""
    host = place.interface
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    links: dict[int, RankLink] = {}
    with socket.create_server((host, 0), family=family) as listener:
        store.set(ADDRESS_KEY, address_of(host, listener.getsockname()[1]))
        log.info("rank 0 waits for %d others at %s:%d", place.world - 1, place.host, place.port)
        deadline = time.monotonic() + MEET_S
        while len(links) < place.world - 1:
            listener.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                sock, _ = listener.accept()
            except TimeoutError:
                missing = sorted(set(range(1, place.world)) - set(links))
                raise BadPlace(f"ranks {missing} did not come within {MEET_S:.0f} s; start them") from None
            _take_in(RankLink(sock, SEND_S), links, place, orders)
    return links


def _take_in(link: RankLink, links: dict[int, RankLink], place: Place, orders: Orders) -> None:
    """Whoever dialled becomes a rank, if it knows the key and its place is free."""
    try:
        nonce = fresh_nonce()
        _challenge(link, nonce)
        rank = _hear(link, orders.key, nonce, GREET_S)
        if not 0 < rank < place.world or rank in links:
            raise LinkClosed(f"rank {rank} has no free place here")
    except LinkClosed as error:
        log.warning("a connection was turned away: %s", error)
        with contextlib.suppress(LinkClosed):
            link.send(pb.RankFrame(failed=pb.RankFailed(message=str(error))))
        link.close()
    else:
        links[rank] = link


def _challenge(link: RankLink, nonce: bytes) -> None:
    link.send(pb.RankFrame(challenge=pb.RankChallenge(nonce=nonce)))


def _hear(link: RankLink, key: bytes, nonce: bytes, timeout_s: float) -> int:
    """The rank at the other end. LinkClosed when it does not prove itself, or is of another release."""
    hello = link.receive(timeout_s).hello
    if not hmac.compare_digest(hello.proof, proof(key, nonce, hello.rank)):
        raise LinkClosed("its key is not ours; give every rank the same --cluster-secret-file")
    if hello.version != __version__:
        raise LinkClosed(f"it runs distserve {hello.version}, rank 0 {__version__}; run the same on all ranks")
    return int(hello.rank)


def welcome_of(config: EngineConfig, orders: Orders, cores: Sequence[int]) -> pb.RankWelcome:
    """What a rank is told. ``cores``: its own; empty where it was started by others, who know its machine."""
    return pb.RankWelcome(
        instance=to_message(orders.ref),
        tp=orders.parallel.tp,
        pp=orders.parallel.pp,
        model=config.model,
        dtype=config.dtype,
        kv_dtype=config.kv_dtype,
        device=config.device,
        threads=config.threads,
        pool_blocks=config.blocks,
        block_size=config.block_size,
        max_model_len=config.max_model_len,
        transfer=orders.transfer,
        timeout_s=orders.timeout_s,
        log_level=orders.log_level,
        data_keys=orders.data_keys,
        data_port=orders.data_port,
        kernels=config.kernels,
        cuda_graphs=config.cuda_graphs,
        cores=cores,
    )
