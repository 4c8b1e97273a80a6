"""The process-group lanes: torch.distributed groups of two ranks for one link, with no default and no global group.

The destination (rank 0) keeps the link's own store; the keys' prefix names the pair, the generation and a secret.
Sending and receiving are in order, a piece a call; every wait has a deadline. gloo cannot abort what is under way: a
broken lane is dropped whole, with its staging, and its group is destroyed with the last reference to it.

gloo's ``send`` copies into the socket on the caller's thread where a receive is known already, so that what was just
gathered is read from the cache; where none is known, gloo's own thread copies, later. So the destination posts the next
receive of a slot as soon as the slot is free, with room for all of it: gloo takes shorter messages, and a longer one
ends the process. It copies under a lock without which its own thread spins in epoll as long as anything is to be read
on the connection, such as word of the next receive: so each slot has a connection of its own, where nothing comes
meanwhile. NCCL takes none of another length: there the receive is posted when the piece is announced.

Not tried: the NCCL lane needs two GPUs.
"""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distserve.transfer.errors import LaneFailed, Stalled

_TAG = 1
_DESTINATION_RANK, _SOURCE_RANK = 0, 1


def open_store(bind_host: str, timeout_s: float) -> tuple[dist.TCPStore, int]:
    """The link's store, kept by the destination at a free port of ``bind_host``; and that port."""
    listener = socket.create_server((bind_host, 0), family=_family(bind_host))
    port = int(listener.getsockname()[1])
    store = dist.TCPStore(
        bind_host,
        port,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return store, port


def join_store(host: str, port: int, timeout_s: float) -> dist.TCPStore:
    """The destination's store, seen from the source; LaneFailed if it cannot be reached."""
    try:
        return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)
    except (RuntimeError, ValueError) as error:
        raise LaneFailed(f"the peer's store cannot be reached: {_first_line(error)}") from None


class GroupLane:
    """Either end of a process-group lane. ``open`` builds it; both ends must be in ``open`` at the same time."""

    def __init__(self, groups: list[Any], store: dist.Store, peer: int, slots: list[Tensor]) -> None:
        self.slots = slots
        self._groups = groups
        self._store = store  # NCCL goes on using it
        self._peer = peer
        self._works: list[Any] = [None] * len(slots)

    @classmethod
    def open(
        cls,
        store: dist.TCPStore,
        prefix: str,
        *,
        is_source: bool,
        interface: str,
        slots: int,
        slot_bytes: int,
        device: torch.device,
        timeout_s: float,
    ) -> GroupLane:
        """Join the two ranks: NCCL for staging on a GPU, else gloo at this ``interface``. LaneFailed if it fails."""
        rank, peer = (_SOURCE_RANK, _DESTINATION_RANK) if is_source else (_DESTINATION_RANK, _SOURCE_RANK)
        keys = dist.PrefixStore(prefix, store)
        try:
            if device.type == "cuda":
                groups = [_nccl_group(keys, rank, interface, timeout_s)]
            else:
                stores = [dist.PrefixStore(str(slot), keys) for slot in range(slots)]
                groups = [_gloo_group(each, rank, interface, timeout_s) for each in stores]
        except RuntimeError as error:
            raise LaneFailed(f"the process group could not be made: {_first_line(error)}") from None
        memory = torch.zeros(slots, slot_bytes, dtype=torch.uint8, device=device)  # one run, with its pages in place
        lane = cls(groups, keys, peer, list(memory))
        if not is_source:
            for slot in range(slots):
                lane.free(slot)
        return lane

    def push(self, slot: int, nbytes: int) -> None:
        """Send the first ``nbytes`` of a slot."""
        try:
            self._works[slot] = self._group(slot).send([self.slots[slot][:nbytes]], self._peer, _TAG)
        except RuntimeError as error:
            raise LaneFailed(f"the process group broke: {_first_line(error)}") from None

    def expect(self, slot: int, nbytes: int) -> None:
        """NCCL: post the receive of an announced piece. gloo's is posted already."""
        if self.slots[slot].is_cuda:
            self._receive(slot, nbytes)

    def free(self, slot: int) -> None:
        """gloo: post the receive of the slot's next piece, whatever its length will be."""
        if not self.slots[slot].is_cuda:
            self._receive(slot, len(self.slots[slot]))

    def take(self, slot: int, timeout_s: float) -> None:
        """Wait for the expected piece."""
        try:
            done = self._works[slot].wait(timedelta(seconds=timeout_s))
        except RuntimeError as error:
            if "imed out" in str(error):
                raise Stalled(f"a piece that was announced did not arrive within {timeout_s:g} s") from None
            raise LaneFailed(f"the process group broke: {_first_line(error)}") from None
        if not done:
            raise LaneFailed("the process group broke")
        if self.slots[slot].is_cuda:
            torch.cuda.current_stream().synchronize()

    def close(self) -> None:
        """Drop the group; what is under way ends in this lane's own staging."""
        self._works = []
        self._groups = []
        self.slots = []

    def _receive(self, slot: int, nbytes: int) -> None:
        try:
            self._works[slot] = self._group(slot).recv([self.slots[slot][:nbytes]], self._peer, _TAG)
        except RuntimeError as error:
            raise LaneFailed(f"the process group broke: {_first_line(error)}") from None

    def _group(self, slot: int) -> Any:
        return self._groups[slot % len(self._groups)]


def _gloo_group(store: dist.Store, rank: int, interface: str, timeout_s: float) -> Any:
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # missing in torch's stubs
    options._timeout = timedelta(seconds=timeout_s)
    options._threads = 1
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=interface)]
    return dist.ProcessGroupGloo(store, rank, 2, options)


def _nccl_group(store: dist.Store, rank: int, interface: str, timeout_s: float) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=timeout_s)
    return dist.ProcessGroupNCCL(store, rank, 2, options)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
