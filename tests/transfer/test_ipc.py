"""The device-memory lane: on a stand-in for a GPU's memory, all of it but CUDA; on a GPU between two processes."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from distserve.core.types import InstanceRef
from distserve.transfer import (
    Mover,
    StageCorrupt,
    StageFailed,
    StageSent,
    StageStored,
    TransferConfig,
    handshake,
    offers,
)
from distserve.transfer.device_memory import HANDLE_BYTES, cuda_memory, gpu_of
from distserve.transfer.errors import LaneFailed
from distserve.transfer.ipc import LENT, PROOF_BYTES, IpcSource, IpcTarget, other_end_closed, slot_places
from distserve.transfer.pinned import PinnedSlots
from tests.transfer.lent import GPU, FakeDevice
from tests.transfer.pairs import TOTAL, A, B, Faults, Pair
from tests.transfer.peers import WAIT_S, Local, Remote, copy_tokens, digest, make_pool, make_ticket, shuffled

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"device_piece_bytes": 13_000}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDevice]:
    """Pools count as being on one GPU; in the end nothing of its memory is held by anybody."""
    fake = FakeDevice()
    monkeypatch.setattr(handshake, "gpu_of", lambda device: GPU)
    monkeypatch.setattr(offers, "memory_of", lambda device: fake)
    yield fake
    LENT.sweep()
    assert not fake.mapped, "unmapped by whoever mapped it"
    assert not fake.owned and not len(LENT), "freed when nobody mapped it any more"


@pytest.fixture
def joined() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The two ends of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        other, _ = listener.accept()
        with one, other:
            yield one, other


# ── links ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("here", "there"), [(16, 16), (16, 24), (32, 7)])
@pytest.mark.parametrize("piece_bytes", [700, 13_000, 1 << 20])
def test_auto_maps_device_memory_and_stages_arrive_bit_for_bit(
    make: Callable[..., Pair], gpu: FakeDevice, here: int, there: int, piece_bytes: int
) -> None:
    pair = make("auto", here, there, have=5, device_piece_bytes=piece_bytes)
    pair.open()
    pair.stored(5, 6)
    pair.stored(6, 128)
    pair.stored(128, TOTAL, final=True)
    assert pair.source.mover.counts()["links_out_ipc"] == pair.target.mover.counts()["links_in_ipc"] == 1
    assert len(gpu.owned) == len(gpu.mapped) == 1
    pair.close()


def test_flipped_and_missing_bytes_are_refused(make: Callable[..., Pair], gpu: FakeDevice) -> None:
    pair = make("auto", **SMALL)
    pair.open()
    pair.faults.flip = {1}
    pair.send(0, TOTAL)
    event = pair.source.event()
    assert isinstance(event, StageFailed) and event.reason == "checksum"
    assert isinstance(pair.target.event(), StageCorrupt)
    pair.faults.flip, pair.faults.shorten = set(), {0}
    pair.send(0, TOTAL)
    event = pair.source.event()
    assert isinstance(event, StageFailed) and event.reason == "checksum"
    assert isinstance(pair.target.event(), StageCorrupt)
    pair.faults.shorten = set()
    pair.send(0, TOTAL)
    assert isinstance(pair.source.event(), StageSent)
    assert pair.source.mover.counts()["links_out_ipc"] == 1
    pair.close()


@pytest.mark.parametrize("refusing", ["allocate", "map"])
def test_memory_that_cannot_be_shared_leaves_the_pair_to_another_lane(
    make: Callable[..., Pair], gpu: FakeDevice, refusing: str
) -> None:
    gpu.fail = {refusing}
    pair = make("auto")
    pair.open()
    pair.stored(0, TOTAL)
    assert pair.target.mover.counts()["links_in_shm"] == 1
    assert not gpu.mapped
    pair.close()


def test_a_copy_that_fails_costs_the_link_and_another_is_made(make: Callable[..., Pair], gpu: FakeDevice) -> None:
    pair = make("auto", **SMALL)
    pair.open()
    pair.stored(0, 16)
    gpu.fail = {"copy"}
    event = pair.fails("peer", 16, TOTAL)
    assert event.retriable and "will not copy" in event.detail
    gpu.fail = set()
    pair.stored(16, TOTAL, final=True)
    assert pair.source.mover.counts()["links_out_ipc"] == 2
    pair.close()


@pytest.mark.parametrize("end", ["source", "target"])
def test_a_lost_peer_leaves_nothing_mapped(make: Callable[..., Pair], gpu: FakeDevice, end: str) -> None:
    """Either end drops the other in the middle of a stage."""
    pair = make("auto", **SMALL)
    pair.open()
    pair.stored(0, 16)
    reached, go_on = pair.faults.pause(1)
    pair.send(16, TOTAL)
    assert reached.wait(WAIT_S)
    if end == "source":
        pair.source.mover.peer_lost(B)
    else:
        pair.target.mover.peer_lost(A)
        for thread in [t for t in threading.enumerate() if t.name == f"kv-in {B}"]:
            thread.join(WAIT_S)
        assert len(gpu.owned) == 1 == len(LENT), "the source, which still maps it, has not let go"
    assert len(gpu.mapped) == 1
    go_on.set()
    assert isinstance(pair.source.event(), StageFailed)
    pair.close()


def test_gpus_of_two_hosts_share_no_memory(
    make: Callable[..., Pair], gpu: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handshake, "host_identity", lambda: threading.current_thread().name)
    pair = make("auto")
    pair.open()
    pair.stored(0, TOTAL)
    assert pair.target.mover.counts()["links_in_gloo"] == 1
    assert not gpu.owned
    pair.close()


def test_a_pool_on_the_host_is_refused_ipc() -> None:
    with pytest.raises(ValueError, match="transfer kind ipc moves KV between GPUs"):
        Mover(A, make_pool(1, 4, 16), 16, fingerprint="model", report=print, kind="ipc")
    with pytest.raises(LaneFailed, match="on cpu, not on a GPU"):
        cuda_memory(CPU)
    assert gpu_of(CPU) == ""


# ── the two ends ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_slots_lie_apart_behind_the_proof() -> None:
    places, size = slot_places(3, 1000)
    assert places == [4096, 5120, 6144] and size == 4096 + 3 * 1024


def test_what_a_peer_names_is_measured_and_proved(gpu: FakeDevice, joined: tuple[socket.socket, socket.socket]) -> None:
    one, other = joined
    target = IpcTarget.create(gpu, other.dup(), 2, 1000)
    assert len(target.handle) == HANDLE_BYTES and len(target.proof) == PROOF_BYTES
    for handle, proof, slots, words in (
        (target.handle, target.proof, 3, "bytes of device memory for slots that need"),
        (target.handle, b"x" * PROOF_BYTES, 2, "not its device memory"),
        (target.handle, b"", 2, "not its device memory"),
        (target.handle[:-1], target.proof, 2, "handle of 63 bytes"),
    ):
        with pytest.raises(LaneFailed, match=words):
            IpcSource.open(gpu, CPU, handle, proof, slots, 1000)
        assert not gpu.mapped
    source = IpcSource.open(gpu, CPU, target.handle, target.proof, 2, 1000)
    source.slots[1].fill_(7)
    source.push(1, 600)
    assert target.slots[1].tolist() == [7] * 600 + [0] * 400 and not target.slots[0].any()
    source.close()
    source.close()
    one.close()
    target.close()
    target.close()


def test_lent_memory_stays_until_the_other_end_has_closed(
    gpu: FakeDevice, joined: tuple[socket.socket, socket.socket]
) -> None:
    """Whatever was shut down at this end: only the other end's closing counts, or its death."""
    one, other = joined
    target = IpcTarget.create(gpu, other.dup(), 1, 100)
    other.shutdown(socket.SHUT_RDWR)
    other.close()
    target.close()
    LENT.sweep()
    assert len(gpu.owned) == 1
    one.shutdown(socket.SHUT_RD)  # as an interrupted source: it is not gone yet
    LENT.sweep()
    assert len(gpu.owned) == 1
    one.close()
    LENT.sweep()
    assert not gpu.owned


def test_a_reset_connection_counts_as_closed(joined: tuple[socket.socket, socket.socket]) -> None:
    one, other = joined
    assert not other_end_closed(other)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    one.close()
    assert other_end_closed(other)
    watch = other.dup()
    watch.close()
    assert other_end_closed(watch)


def test_a_lane_that_cannot_be_made_leaves_nothing(
    gpu: FakeDevice, joined: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(address: int) -> bytes:
        raise LaneFailed("no handle")

    monkeypatch.setattr(gpu, "export", fails)
    watch = joined[1].dup()
    with pytest.raises(LaneFailed, match="no handle"):
        IpcTarget.create(gpu, watch, 2, 1000)
    assert not gpu.owned and watch.fileno() == -1


def test_nothing_of_the_host_is_locked_for_a_pool_of_the_host() -> None:
    pinned = PinnedSlots([torch.zeros(100, dtype=torch.uint8)], CPU)
    pinned.release()
    pinned.release()


# ── with a GPU: two processes on one, which is enough for CUDA IPC ───────────────────────────────────────────────────

BLOCKS = 120
HERE = InstanceRef("here", 1)


@pytest.fixture
def other() -> Iterator[Remote]:
    one = Remote(InstanceRef("there", 1), 2, BLOCKS, 24, "auto", SMALL, "cuda")
    yield one
    one.close()


@pytest.fixture
def mine() -> Iterator[Local]:
    one = Local(HERE, make_pool(1, BLOCKS, 16).cuda(), "auto", TransferConfig(**SMALL))
    yield one
    one.close()
    LENT.sweep()


def expected(mine: Local, here: tuple[int, ...], there: tuple[int, ...], start: int, end: int) -> str:
    """The digest of the other's pool after tokens ``[start, end)`` of ours came into it."""
    pool = make_pool(2, BLOCKS, 24)
    copy_tokens(mine.pool.cpu(), here, pool, there, start, end)
    return digest(pool)


@pytest.mark.gpu
def test_two_processes_move_kv_over_one_gpu(mine: Local, other: Remote) -> None:
    """Both ways, between block sizes, in three stages each; bit for bit, and over device memory."""
    here, there = shuffled(3, 400, BLOCKS, 16), shuffled(4, 400, BLOCKS, 24)
    out = make_ticket(1, HERE, other.ref, 400, 5)
    other.open_ticket(out, there)
    for low, high in ((5, 33), (33, 200), (200, 400)):
        mine.mover.send_stage(out, other.address, low, high, here, high == 400)
    assert [type(mine.event()) for _ in range(3)] == [StageSent] * 3
    assert other.digest() == expected(mine, here, there, 5, 400)
    back = make_ticket(2, other.ref, HERE, 400)
    wanted = mine.pool.cpu()
    theirs = make_pool(2, BLOCKS, 24)
    copy_tokens(mine.pool.cpu(), here, theirs, there, 5, 400)
    copy_tokens(theirs, there, wanted, here, 0, 400)
    mine.mover.open_ticket(back, here)
    other.send_stage(back, mine.mover.address, 0, 400, there, True)
    assert isinstance(mine.event(), StageStored)
    assert digest(mine.pool) == digest(wanted)
    assert mine.mover.counts()["links_out_ipc"] == mine.mover.counts()["links_in_ipc"] == 1


@pytest.mark.gpu
def test_a_flipped_byte_on_a_device_is_refused(other: Remote) -> None:
    faults = Faults()
    mine = Local(HERE, make_pool(1, BLOCKS, 16).cuda(), "auto", TransferConfig(**SMALL, faults=faults))
    before = other.digest()
    here, there = shuffled(3, 400, BLOCKS, 16), shuffled(4, 400, BLOCKS, 24)
    ticket = make_ticket(1, HERE, other.ref, 400)
    other.open_ticket(ticket, there)
    faults.flip = {0}
    mine.mover.send_stage(ticket, other.address, 0, 400, here, True)
    event = mine.event()
    mine.close()
    assert isinstance(event, StageFailed) and event.reason == "checksum"
    assert other.digest() == before


@pytest.mark.gpu
@pytest.mark.parametrize("end", ["killed", "closed"])
def test_a_peer_that_goes_gives_the_memory_back(mine: Local, end: str) -> None:
    """Of both roles at once: it lends us memory, and maps ours."""
    here, there = tuple(range(60)), tuple(range(40))
    left = []
    for life in (1, 2):
        other = Remote(InstanceRef("there", life), 2, BLOCKS, 24, "ipc", {"device_piece_bytes": 32 << 20}, "cuda")
        out, back = make_ticket(1, HERE, other.ref, 900), make_ticket(2, other.ref, HERE, 900)
        other.open_ticket(out, there)
        mine.mover.open_ticket(back, here)
        mine.mover.send_stage(out, other.address, 0, 900, here, True)
        other.send_stage(back, mine.mover.address, 0, 900, there, True)
        assert {type(mine.event()) for _ in range(2)} == {StageSent, StageStored}
        if end == "killed":
            other.kill()
        mine.mover.peer_lost(other.ref)
        for thread in [t for t in threading.enumerate() if t.name.startswith(("kv-in", "kv-out"))]:
            thread.join(WAIT_S)
        other.close()
        mine.mover.close_ticket(back.move_id)
        LENT.sweep()
        assert not len(LENT), "what it had mapped is free"
        torch.cuda.empty_cache()
        left.append(torch.cuda.mem_get_info()[0])
    assert left[0] - left[1] < 64 << 20, "less than one lane's staging is missing after the second life"


@pytest.mark.gpu
def test_a_move_waits_for_no_step_and_no_step_for_a_move(mine: Local, other: Remote) -> None:
    """While the default stream, where steps run, is busy for seconds, whole stages are gathered and stored."""
    here, there = shuffled(3, 400, BLOCKS, 16), shuffled(4, 400, BLOCKS, 24)
    ticket = make_ticket(1, HERE, other.ref, 400)
    other.open_ticket(ticket, there)
    mine.mover.send_stage(ticket, other.address, 0, 200, here, False)  # opens the link
    assert isinstance(mine.event(), StageSent)
    torch.cuda._sleep(6_000_000_000)  # some three seconds
    done = torch.cuda.Event()
    done.record()
    mine.mover.send_stage(ticket, other.address, 200, 400, here, True)
    assert isinstance(mine.event(), StageSent)
    assert not done.query(), "the move waited for the step"
    assert other.digest() == expected(mine, here, there, 0, 400)


@pytest.mark.gpu
def test_what_a_fence_has_passed_is_neither_read_nor_written_any_more(mine: Local, other: Remote) -> None:
    """Blocks are overwritten the moment ``abort_send`` returns, again and again: what arrived is all of the old bytes,
    and a ticket that is closed while stages come leaves what is written then as it is."""
    here, there = tuple(range(100)), tuple(range(100))
    old = mine.pool.clone()
    for number in range(20):
        ticket = make_ticket(10 + number, HERE, other.ref, 1600)
        other.open_ticket(ticket, there)
        mine.mover.send_stage(ticket, other.address, 0, 1600, here, True)
        threading.Event().wait(0.0005 * (number % 8))
        mine.mover.abort_send(ticket.move_id)
        mine.pool.fill_(number)  # on the default stream: the step that was given the blocks
        torch.cuda.current_stream().synchronize()
        while not mine.events.empty():
            mine.events.get()
        mine.pool.copy_(old)
        torch.cuda.current_stream().synchronize()
        other.ask("close_ticket", ticket.move_id)
    found = expected_prefix(other, mine, here, there)
    assert found, "tokens of what came after the fence were stored"


def expected_prefix(other: Remote, mine: Local, here: tuple[int, ...], there: tuple[int, ...]) -> bool:
    """Whether the other's pool is its own first bytes with whole blocks of our old ones over them, nothing else."""
    theirs = torch.frombuffer(bytearray.fromhex(str(other.ask("bytes"))), dtype=torch.uint8)
    whole, ours = make_pool(2, BLOCKS, 24), make_pool(2, BLOCKS, 24)
    copy_tokens(mine.pool.cpu(), here, ours, there, 0, 1600)
    before, after = (pool.view(torch.uint8).flatten() for pool in (whole, ours))
    return bool(((theirs == before) | (theirs == after)).all())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["shm", "gloo"])
def test_kv_of_a_gpu_leaves_through_page_locked_memory(other: Remote, kind: str) -> None:
    mine = Local(HERE, make_pool(1, BLOCKS, 16).cuda(), kind, TransferConfig())
    here, there = shuffled(3, 400, BLOCKS, 16), shuffled(4, 400, BLOCKS, 24)
    ticket = make_ticket(1, HERE, other.ref, 400)
    other.open_ticket(ticket, there)
    mine.mover.send_stage(ticket, other.address, 0, 400, here, True)
    event = mine.event()
    assert isinstance(event, StageSent), event
    mine.close()
    assert other.digest() == expected(mine, here, there, 0, 400)
    memory = torch.zeros(100_000, dtype=torch.uint8)
    pinned = PinnedSlots(list(memory.view(4, -1)), torch.device("cuda"))
    assert memory.is_pinned()
    pinned.release()
    assert not memory.is_pinned()
