"""KV between instances that are cut differently: every rank's mover sends its part to who needs it; bits are equal."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Iterator

import pytest
import torch

from distserve.core.types import InstanceRef
from distserve.instance.ranks.moves import Tally
from distserve.kv.shard import KvCut, Parallel
from distserve.transfer import (
    FaultInjector,
    Mover,
    MoverEvent,
    StageCorrupt,
    StageFailed,
    StageSent,
    StageStored,
    TransferConfig,
)
from distserve.transfer.address import data_address
from distserve_kernels.kv_copy import PagedBytes
from distserve_kernels.kv_window import PagedWindow
from tests.parallel.ranks import HANDSHAKE_S
from tests.transfer.peers import WAIT_S, make_ticket

LAYERS, KV_HEADS, DIM, BLOCKS = 3, 2, 8, 24
TOKENS = 150
HERE, THERE = InstanceRef("here", 1), InstanceRef("there", 1)


def random_pool(seed: int, block_size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((BLOCKS, LAYERS, 2, KV_HEADS, block_size, DIM), generator=generator)


class Cut:
    """An instance's movers, one a rank, each over its own part of ``whole``."""

    def __init__(self, ref: InstanceRef, whole: torch.Tensor, parallel: Parallel, kind: str, **config: object) -> None:
        self.ref, self.whole, self.block_size = ref, whole, whole.shape[4]
        self.cut = KvCut(parallel, LAYERS, KV_HEADS)
        self.events: queue.Queue[MoverEvent] = queue.Queue()
        self.tally = Tally(parallel.ranks, self.events.put)
        self.pools, self.movers = [], []
        for rank in range(parallel.ranks):
            part = self.cut.part(rank)
            pool = whole[:, part.layers.start : part.layers.stop, :, part.heads.start : part.heads.stop].contiguous()
            mover = Mover(
                ref,
                pool,
                self.block_size,
                fingerprint="model",
                report=lambda event, rank=rank: self.tally.take(rank, event),
                kind=kind,
                config=TransferConfig(**config),  # type: ignore[arg-type]
                cut=self.cut,
                rank=rank,
            )
            self.pools.append(pool)
            self.movers.append(mover)
        self.address = data_address(parallel, [mover.address for mover in self.movers])

    def holds(self, expected: torch.Tensor) -> bool:
        """Whether every rank's pool is its part of ``expected``."""
        parts = [self.cut.part(rank) for rank in range(len(self.pools))]
        return all(
            torch.equal(pool, expected[:, p.layers.start : p.layers.stop, :, p.heads.start : p.heads.stop])
            for pool, p in zip(self.pools, parts, strict=True)
        )

    def close(self) -> None:
        for mover in self.movers:
            mover.close()


@contextlib.contextmanager
def pair(
    source: Parallel, destination: Parallel, kind: str = "shm", sizes: tuple[int, int] = (16, 16), **config: object
) -> Iterator[tuple[Cut, Cut]]:
    one = Cut(HERE, random_pool(1, sizes[0]), source, kind, **config)
    other = Cut(THERE, random_pool(2, sizes[1]), destination, kind, **config)
    try:
        yield one, other
    finally:
        one.close()
        other.close()


def tables(seed: int, *sizes: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randperm(BLOCKS, generator=generator).tolist()[: -(-TOKENS // size)]) for size in sizes]


def move(one: Cut, other: Cut, have: int, stages: list[int], number: int = 1) -> torch.Tensor:
    """Send tokens ``have`` … in stages, and what the destination's whole pool must then be."""
    here, there = tables(number, one.block_size, other.block_size)
    ticket = make_ticket(number, HERE, THERE, TOKENS, have)
    other.tally.storing(ticket)
    for mover in other.movers:
        mover.open_ticket(ticket, there)
    for low, high in zip([have, *stages], stages, strict=False):
        one.tally.sending(ticket.move_id, low, high)
        for mover in one.movers:
            mover.send_stage(ticket, other.address, low, high, here, high == TOKENS)
    expected = other.whole.clone()
    for at in range(have, TOKENS):
        (b, o), (c, p) = divmod(at, one.block_size), divmod(at, other.block_size)
        expected[there[c], :, :, :, p] = one.whole[here[b], :, :, :, o]
    return expected


CUTS = [Parallel(1, 1), Parallel(2, 1), Parallel(1, 2), Parallel(4, 1), Parallel(2, 2), Parallel(1, 3)]


@pytest.mark.parametrize("source", CUTS, ids=str)
@pytest.mark.parametrize("destination", CUTS, ids=str)
def test_any_cut_to_any_other_bit_for_bit(source: Parallel, destination: Parallel) -> None:
    """Two stages from the middle of a block; small pieces; unequal block sizes in every other case."""
    sizes = (16, 16) if (source.ranks + destination.ranks) % 2 else (16, 24)
    with pair(source, destination, sizes=sizes, shm_piece_bytes=4_000) as (one, other):
        expected = move(one, other, 3, [70, TOKENS])
        sent = [one.events.get(timeout=WAIT_S) for _ in range(2)]
        assert [(type(e), e.start, e.end) for e in sent] == [(StageSent, 3, 70), (StageSent, 70, TOKENS)]  # type: ignore[union-attr]
        at, nbytes = 3, 0
        while at < TOKENS:  # what is stored everywhere grows without a gap; ranks may be a stage apart
            event = other.events.get(timeout=WAIT_S)
            assert isinstance(event, StageStored) and event.start == at
            at, nbytes = event.end, nbytes + event.nbytes
        assert other.holds(expected)
        assert nbytes == sum(e.nbytes for e in sent)  # type: ignore[union-attr]
        assert one.events.empty() and other.events.empty()


@pytest.mark.parametrize(
    ("source", "destination"), [(Parallel(2, 2), Parallel(1, 2)), (Parallel(1, 1), Parallel(4, 1))]
)
def test_over_gloo_as_over_shared_memory(source: Parallel, destination: Parallel) -> None:
    with pair(source, destination, "gloo", handshake_s=HANDSHAKE_S) as (one, other):
        expected = move(one, other, 0, [TOKENS])
        assert isinstance(one.events.get(timeout=WAIT_S), StageSent)
        assert isinstance(other.events.get(timeout=WAIT_S), StageStored)
        assert other.holds(expected)


def test_copies_of_heads_cross_once() -> None:
    """4 lanes hold 2 heads twice over; the one rank there gets each once."""
    with pair(Parallel(4, 1), Parallel(1, 1)) as (one, other):
        move(one, other, 0, [TOKENS])
        sent = one.events.get(timeout=WAIT_S)
        assert isinstance(sent, StageSent)
        assert sent.nbytes == -(-TOKENS // 16) * one.whole[0].nbytes


class Flip(FaultInjector):
    """Changes a byte of the first piece that passes."""

    def __init__(self) -> None:
        self.done = False

    def on_staged(self, ticket: object, index: int, staged: object) -> None:
        if not self.done:
            self.done = True
            staged[0] ^= 1  # type: ignore[index]


def test_a_wrong_byte_from_one_rank_fails_the_stage_once() -> None:
    with pair(Parallel(2, 1), Parallel(1, 2), faults=Flip()) as (one, other):
        move(one, other, 0, [TOKENS])
        failed = one.events.get(timeout=WAIT_S)
        assert isinstance(failed, StageFailed) and failed.reason == "checksum"
        assert isinstance(other.events.get(timeout=WAIT_S), StageCorrupt)
    assert one.events.empty() and other.events.empty()


def test_a_dead_rank_fails_the_stage_once() -> None:
    with pair(Parallel(1, 1), Parallel(2, 1)) as (one, other):
        other.movers[1].close()
        move_id = "move-1"
        with contextlib.suppress(ValueError):
            move(one, other, 0, [TOKENS])
        failed = one.events.get(timeout=WAIT_S)
        assert isinstance(failed, StageFailed) and failed.move_id == move_id and failed.retriable
        assert one.events.empty()


def test_the_wrong_rank_is_refused_with_a_sentence() -> None:
    """An address list in another order: every rank checks that it was meant."""
    with pair(Parallel(1, 1), Parallel(2, 1)) as (one, other):
        other.address = data_address(Parallel(2, 1), [mover.address for mover in reversed(other.movers)])
        move(one, other, 0, [TOKENS])
        failed = one.events.get(timeout=WAIT_S)
        assert isinstance(failed, StageFailed) and failed.reason == "refused"
        assert "asked for rank" in failed.detail


def test_a_window_of_a_whole_pool_is_the_pool() -> None:
    pool = random_pool(3, 16)
    whole, window = PagedBytes(pool), PagedWindow(pool, range(LAYERS), range(KV_HEADS))
    one, other = (torch.zeros(5 * whole.block_bytes, dtype=torch.uint8) for _ in range(2))
    blocks = (4, 5, 6, 2, 9)
    sums = whole.gather(blocks, whole.staging(one), seed=5), window.gather(blocks, window.staging(other), seed=5)
    assert torch.equal(one, other)
    assert sums[0] == sums[1] > 0
    with pytest.raises(ValueError, match="are not in a pool"):
        PagedWindow(pool, range(LAYERS + 1), range(KV_HEADS))
