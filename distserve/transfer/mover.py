"""The KV data plane of one instance, or of one of its ranks: it owns the links, their staging and threads, and moves
what it is told to.

An instance's step loop calls it; no call waits for a peer. ``close_ticket`` and ``abort_send`` are fences: they wait
for one piece (about a millisecond) at most. What comes of a stage is reported, from the mover's own threads, as a
MoverEvent. It decides nothing: which stage to send, whether to try again and what an event means is the instance's
concern.

Threads: one that accepts, one for each link that comes in, one for each rank that something was sent to lately. Where
KV is on a GPU each of them has a CUDA stream of its own. Who waits for whom there:
- gather after the step that writes: ``send_stage`` is called when the device has finished it (``Engine.wait`` says so).
- scatter before the first step that reads: it is done on the device before StageStored is reported.
- a block given to another: gather and scatter are done on the device before the lock is left that a fence takes.
"""

from __future__ import annotations

import ctypes
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from weakref import WeakValueDictionary

from torch import Tensor

from distserve.core.types import InstanceRef, Ticket
from distserve.kv.shard import KvCut, KvPart, Parallel, routes
from distserve.transfer.address import DataAddress
from distserve.transfer.config import TransferConfig
from distserve.transfer.counts import Counts
from distserve.transfer.errors import PeerGone
from distserve.transfer.events import MoverEvent, Reason, StageFailed
from distserve.transfer.grants import Grants
from distserve.transfer.identity import Identity, LaneKind
from distserve.transfer.inbound import Inbound
from distserve.transfer.layout import Layout
from distserve.transfer.outbound import Outbound
from distserve.transfer.sender import Reading, Stage
from distserve.transfer.tally import SendTally
from distserve_kernels.kv_copy import PagedBytes
from distserve_kernels.kv_part import PagedPart
from distserve_kernels.kv_window import PagedWindow
from distserve_kernels.streams import own_stream


class Mover:
    """See the module. ``kind`` is "auto", "shm", "gloo", "nccl" or "ipc"; a kind that cannot be here is a ValueError.

    ``pool`` is the instance's KV, ``[num_blocks, layers, 2, kv_heads, block_size, head_dim]``; where it is cut over
    ranks, that of ``rank`` under ``cut``, and a stage is this rank's part of it. ``report`` is called from the mover's
    threads, must be quick and must not call back into the mover. ``native`` is the library that copies faster.
    """

    def __init__(
        self,
        me: InstanceRef,
        pool: Tensor,
        block_size: int,
        *,
        fingerprint: str,
        report: Callable[[MoverEvent], None],
        kind: str = "auto",
        config: TransferConfig | None = None,
        cut: KvCut | None = None,
        rank: int = 0,
        native: ctypes.CDLL | None = None,
    ) -> None:
        self._config = config or TransferConfig()
        layout = Layout.of(pool, block_size)
        if layout.block_bytes == 0:
            raise ValueError("a KV pool without layers or heads has nothing to move")
        cut = cut or KvCut(Parallel(), layout.layers, layout.kv_heads)
        self._part = cut.part(rank)
        if (layout.layers, layout.kv_heads) != (len(self._part.layers), len(self._part.heads)):
            raise ValueError(f"the KV pool of rank {rank} is not of {self._part}")
        whole = replace(layout, layers=cut.layers, kv_heads=cut.kv_heads)
        self._me = Identity(me, fingerprint, whole, _checked_kind(kind, pool), pool.device, cut, rank)
        self._tensor = pool
        self._pool = PagedBytes(pool, native)
        with own_stream(pool.device):
            self._pool.warm()
        self._report = report
        self._counts = Counts()
        self._grants = Grants(self._pool, self._part)
        self._tally = SendTally(report)
        self._lock = threading.Lock()
        self._closed = False
        self._outbound: dict[InstanceRef, dict[int, Outbound]] = {}  # by rank of the destination
        self._inbound: set[Inbound] = set()
        self._readings: WeakValueDictionary[str, Reading] = WeakValueDictionary()  # alive while a stage refers to them
        self._listener = _listen(self._config)
        self._port = int(self._listener.getsockname()[1])
        self._wake, self._woken = socket.socketpair()
        self._acceptor = threading.Thread(target=self._accept, name=f"kv-accept {me}", daemon=True)
        self._acceptor.start()

    @property
    def address(self) -> str:
        """``host:port`` where sources dial; what the instance publishes as its data address."""
        host = self._config.advertise_host or self._config.bind_host
        return f"[{host}]:{self._port}" if ":" in host else f"{host}:{self._port}"

    def counts(self) -> dict[str, int]:
        """What happened so far: links, stages and bytes; stages refused and failed, and handshakes, by reason."""
        return self._counts.snapshot()

    # ── destination ──────────────────────────────────────────────────────────────────────────────────────────────────

    def open_ticket(self, ticket: Ticket, blocks: tuple[int, ...]) -> None:
        """Let the ticket's holder write. ``blocks`` is this instance's table for tokens ``0 .. total_tokens``.

        The first ``have_tokens`` are never written. ValueError if the ticket is not for this life of this instance, is
        open already, or does not fit the blocks.
        """
        if ticket.destination != self._me.ref:
            raise ValueError(f"ticket {ticket.move_id} is for {ticket.destination}, not {self._me.ref}")
        self._grants.open(ticket, blocks)

    def close_ticket(self, move_id: str) -> None:
        """Fence: when it returns nothing of this move will be written any more. Idempotent."""
        self._grants.close(move_id)

    # ── source ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def send_stage(
        self, ticket: Ticket, destination_address: str, start: int, end: int, blocks: tuple[int, ...], final: bool
    ) -> None:
        """Queue tokens ``[start, end)``, all of whose KV is final; on a GPU, what wrote it is done there. ``blocks`` is
        this instance's table from position 0.

        Stages to one instance are sent in order. Ends in exactly one StageSent or StageFailed, unless aborted. The
        blocks must stay as they are until then, or until ``abort_send`` has returned. ValueError if they do not cover
        the range.
        """
        size = self._pool.block_size
        if not 0 <= start < end <= len(blocks) * size:
            raise ValueError(f"{len(blocks)} blocks of {size} tokens do not cover tokens {start} to {end}")
        used = blocks[start // size : -(-end // size)]
        if min(used) < 0 or max(used) >= self._pool.num_blocks:
            raise ValueError(f"a block id of move {ticket.move_id} is outside of the pool")
        if not 0 <= ticket.nonce < 1 << 64:
            raise ValueError(f"the nonce of ticket {ticket.move_id} is no unsigned 64-bit number")
        try:
            address = DataAddress.parse(destination_address)
            with self._lock:
                reading = self._readings.get(ticket.move_id)
                if reading is None:
                    reading = self._readings[ticket.move_id] = Reading()
                outbounds = self._outbound_to(ticket.destination, address.parallel)
            if any(there >= len(address.movers) for there in outbounds):
                raise PeerGone(f"{ticket.destination} has other ranks than {destination_address!r} names")
        except (PeerGone, ValueError) as error:
            self._report(StageFailed(ticket.move_id, Reason.PEER, Reason.PEER.retriable, start, end, str(error)))
            return
        if len(outbounds) != 1:
            self._tally.expect(ticket.move_id, start, end, len(outbounds))
        deadline = time.monotonic() + self._config.stage_s
        for there, outbound in outbounds.items():
            outbound.submit(Stage(ticket, address.movers[there], start, end, blocks, final, reading, deadline))

    def abort_send(self, move_id: str) -> None:
        """Fence: when it returns nothing is read for this move any more; its queued stages are dropped unreported."""
        with self._lock:
            reading = self._readings.pop(move_id, None)
        self._tally.forget(move_id)
        if reading is not None:
            reading.abort()

    # ── both ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def peer_lost(self, peer: InstanceRef) -> None:
        """Drop the links with this life of an instance; what waits for them fails."""
        with self._lock:
            outbounds = self._outbound.pop(peer, {})
            inbound = [each for each in self._inbound if each.peer == peer]
        for outbound in outbounds.values():
            outbound.close(Reason.PEER)
        for each in inbound:
            each.interrupt()

    def close(self) -> None:
        """Release everything: tickets, links, memory, sockets, threads. Waits for the threads; idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            outbound = [each for ranks in self._outbound.values() for each in ranks.values()]
            inbound = list(self._inbound)
        self._grants.close_all()
        for out in outbound:
            out.close(Reason.CLOSED)
        for each in inbound:
            each.interrupt()
        self._wake.close()
        threads = [self._acceptor, *(o.thread for o in outbound), *(i.thread for i in inbound)]
        deadline = time.monotonic() + self._config.handshake_s + self._config.stall_s
        for thread in threads:
            if thread is not None:
                thread.join(max(0.0, deadline - time.monotonic()))

    def _outbound_to(self, destination: InstanceRef, parallel: Parallel) -> dict[int, Outbound]:
        """The ways to those ranks of an instance that this one sends to. ValueError for a cut that cannot be."""
        found = self._outbound.get(destination)
        if found is None:
            mine = [r for r in routes(self._me.cut, self._me.cut.recut(parallel)) if r.source == self._me.rank]
            report = self._report if len(mine) == 1 else self._tally.take
            found = {
                route.destination: Outbound(
                    self._me,
                    destination,
                    route,
                    parallel,
                    self._window(route.part),
                    report,
                    self._counts,
                    self._config,
                )
                for route in mine
            }
            self._outbound[destination] = found
            if self._closed:
                for outbound in found.values():
                    outbound.close(Reason.CLOSED)
        return found

    def _window(self, part: KvPart) -> PagedPart:
        """A part of our own KV, as bytes."""
        if part == self._part:
            return self._pool
        layer, head = self._part.layers.start, self._part.heads.start
        layers = range(part.layers.start - layer, part.layers.stop - layer)
        heads = range(part.heads.start - head, part.heads.stop - head)
        return PagedWindow(self._tensor, layers, heads)

    def _accept(self) -> None:
        """Take connections until closed; each gets a thread that owns it."""
        with self._listener, self._woken, selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while all(key.fileobj is not self._woken for key, _ in selector.select()):
                try:
                    sock, _ = self._listener.accept()
                except (ConnectionError, BlockingIOError):
                    continue  # the caller went away before it was taken
                self._take(sock)

    def _take(self, sock: socket.socket) -> None:
        with self._lock:
            if self._closed or len(self._inbound) >= self._config.max_links:
                self._counts.add("connections_refused")
                sock.close()
                return
            inbound = Inbound(
                self._me, sock, self._window, self._grants, self._report, self._counts, self._config, self._forget
            )
            self._inbound.add(inbound)
            inbound.thread.start()  # under the lock, so that close joins no thread that has not started

    def _forget(self, inbound: Inbound) -> None:
        with self._lock:
            self._inbound.discard(inbound)


def _checked_kind(kind: str, pool: Tensor) -> LaneKind:
    if kind not in [*LaneKind]:
        raise ValueError(f"transfer kind {kind!r} is unknown; use one of {', '.join(LaneKind)}")
    found = LaneKind(kind)
    if found.on_device and not pool.is_cuda:
        raise ValueError(f"transfer kind {kind} moves KV between GPUs, but this instance's is in host memory; use auto")
    return found


def _listen(config: TransferConfig) -> socket.socket:
    """The listening socket; OSError with a sentence when the address cannot be had."""
    family = socket.AF_INET6 if ":" in config.bind_host else socket.AF_INET
    try:
        listener = socket.create_server((config.bind_host, config.port), family=family)
    except OSError as error:
        raise OSError(
            error.errno, f"the KV data plane cannot listen on {config.bind_host}:{config.port}: {error.strerror}"
        ) from None
    listener.setblocking(False)
    return listener
