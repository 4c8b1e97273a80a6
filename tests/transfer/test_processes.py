"""Movers in processes of their own: bits across the border, deaths, stalls, and what is left behind."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from distserve.core.types import InstanceRef, Ticket
from distserve.transfer import FaultInjector, StageFailed, StageSent, StageStored, TransferConfig
from tests.transfer.peers import WAIT_S, Local, Remote, copy_tokens, digest, make_pool, make_ticket, shuffled

HERE = InstanceRef("here", 1)
BLOCKS = 120
SMALL = {"shm_piece_bytes": 13_000, "gloo_piece_bytes": 13_000}
KINDS = ["shm", "gloo"]


class AtPiece(FaultInjector):
    """Does something when a piece of a move is about to be gathered, once."""

    def __init__(self) -> None:
        self.move_id, self.index = "", 0
        self.act: Callable[[], None] = lambda: None

    def on_piece(self, ticket: Ticket, index: int) -> None:
        if (ticket.move_id, index) == (self.move_id, self.index):
            self.move_id = ""
            self.act()


@pytest.fixture
def start() -> Iterator[Callable[..., Any]]:
    """Starts movers, here (``Local``) or in processes of their own (``Remote``), and ends them."""
    made: list[Any] = []

    def build(kind: type[Any], *args: Any, **kwargs: Any) -> Any:
        made.append(kind(*args, **kwargs))
        return made[-1]

    yield build
    for each in reversed(made):
        each.close()
    assert [t.name for t in threading.enumerate() if t.name.startswith("kv-")] == []


@pytest.fixture(scope="module")
def process() -> Iterator[Remote]:
    """One process for all tests that do not kill it, as starting takes seconds; it uses the lane it is asked for."""
    one = Remote(InstanceRef("there", 1), 2, BLOCKS, 24, "auto", SMALL)
    yield one
    one.close()


@pytest.fixture
def other(process: Remote) -> Remote:
    """That process with a fresh mover and pool."""
    process.restart(InstanceRef("there", process.ref.incarnation + 1))
    return process


def local(start: Callable[..., Any], kind: str, **config: Any) -> Local:
    settings = TransferConfig(**(SMALL | {"faults": AtPiece()} | config))
    one: Local = start(Local, HERE, make_pool(1, BLOCKS, 16), kind, settings)
    return one


def victim(start: Callable[..., Any], life: int) -> Remote:
    one: Remote = start(Remote, InstanceRef("victim", life), 2, BLOCKS, 24, "auto", SMALL)
    return one


def expected_there(mine: Local, here: tuple[int, ...], there: tuple[int, ...], start: int, end: int) -> str:
    """The digest of the other's pool after tokens ``[start, end)`` came into it."""
    pool = make_pool(2, BLOCKS, 24)
    copy_tokens(mine.pool, here, pool, there, start, end)
    return digest(pool)


@pytest.mark.parametrize("kind", KINDS)
def test_moves_cross_in_both_directions_between_block_sizes(
    start: Callable[..., Any], other: Remote, kind: str
) -> None:
    mine = local(start, kind)
    theirs = make_pool(2, BLOCKS, 24)
    here_expected, there_expected = mine.pool.clone(), theirs.clone()
    tables = [(tuple(range(i * 20, i * 20 + 20)), tuple(range(i * 20, i * 20 + 14))[::-1]) for i in range(6)]
    for i, (here, there) in enumerate(tables):
        have, total = i, 300
        if i % 2:
            ticket = make_ticket(i, other.ref, HERE, total, have)
            mine.mover.open_ticket(ticket, here)
            for low, high in ((have, 33), (33, 200), (200, total)):
                other.send_stage(ticket, mine.mover.address, low, high, there, high == total)
            copy_tokens(theirs, there, here_expected, here, have, total)
        else:
            ticket = make_ticket(i, HERE, other.ref, total, have)
            other.open_ticket(ticket, there)
            for low, high in ((have, 33), (33, 200), (200, total)):
                mine.mover.send_stage(ticket, other.address, low, high, here, high == total)
            copy_tokens(mine.pool, here, there_expected, there, have, total)
    here_events = [mine.event() for _ in range(18)]
    there_events = [other.event()["event"] for _ in range(18)]
    both = ["StageSent"] * 9 + ["StageStored"] * 9
    assert sorted(type(e).__name__ for e in here_events) == sorted(there_events) == both
    assert digest(mine.pool) == digest(here_expected)
    assert other.digest() == digest(there_expected)
    assert other.ask("counts")[f"links_in_{kind}"] == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_peer_killed_in_a_transfer_costs_its_pair_only(start: Callable[..., Any], other: Remote, kind: str) -> None:
    mine, first = local(start, kind), victim(start, 1)
    faults = mine.config.faults
    assert isinstance(faults, AtPiece)
    here, there = shuffled(3, 400, BLOCKS, 16), shuffled(4, 400, BLOCKS, 24)
    inward = make_ticket(9, first.ref, HERE, 400)
    mine.mover.open_ticket(inward, here)
    first.send_stage(inward, mine.mover.address, 0, 64, there, False)
    assert isinstance(mine.event(), StageStored)
    lost = make_ticket(1, HERE, first.ref, 400)
    first.open_ticket(lost, there)
    faults.move_id, faults.index, faults.act = lost.move_id, 5, first.kill
    mine.mover.send_stage(lost, first.address, 0, 400, here, True)
    event = mine.event()
    assert isinstance(event, StageFailed) and (event.reason, event.retriable) == ("peer", True)
    for thread in [t for t in threading.enumerate() if t.name.startswith("kv-in")]:
        thread.join(WAIT_S)  # the link on which the victim sent has ended as well
        assert not thread.is_alive()

    unharmed = make_ticket(2, HERE, other.ref, 400)
    other.open_ticket(unharmed, there)
    mine.mover.send_stage(unharmed, other.address, 0, 400, here, True)
    assert isinstance(mine.event(), StageSent)

    second = victim(start, 2)
    mine.mover.peer_lost(first.ref)
    mine.mover.send_stage(lost, second.address, 0, 400, here, True)  # a ticket of the life before
    event = mine.event()
    assert isinstance(event, StageFailed) and event.reason == "refused" and "victim#2" in event.detail
    fresh = make_ticket(3, HERE, second.ref, 400)
    second.open_ticket(fresh, there)
    mine.mover.send_stage(fresh, second.address, 0, 400, here, True)
    assert isinstance(mine.event(), StageSent)
    assert second.digest() == other.digest() == expected_there(mine, here, there, 0, 400)
    named = [*Path("/dev/shm").glob("distserve*"), *Path(tempfile.gettempdir()).glob("distserve-kv-*")]
    assert named == []  # the killed process left no memory with a name


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_peer_ends_in_a_timeout(start: Callable[..., Any], other: Remote, kind: str) -> None:
    mine = local(start, kind, stall_s=0.5)
    faults = mine.config.faults
    assert isinstance(faults, AtPiece)
    here, there = tuple(range(60)), tuple(range(40))
    ticket = make_ticket(1, HERE, other.ref, 900)
    other.open_ticket(ticket, there)
    mine.mover.send_stage(ticket, other.address, 0, 16, here, False)
    assert isinstance(mine.event(), StageSent)
    faults.move_id, faults.index, faults.act = ticket.move_id, 3, other.stop
    mine.mover.send_stage(ticket, other.address, 16, 900, here, True)
    event = mine.event()
    assert isinstance(event, StageFailed) and (event.reason, event.retriable) == ("timeout", True)

    other.go_on()  # late pieces of the dropped link are its own affair
    mine.mover.send_stage(ticket, other.address, 16, 900, here, True)
    assert isinstance(mine.event(), StageSent)
    assert other.digest() == expected_there(mine, here, there, 0, 900)
    assert mine.mover.counts()[f"links_out_{kind}"] == 2


@pytest.mark.parametrize("kind", KINDS)
def test_idle_links_cost_nothing_and_closing_leaves_nothing(
    start: Callable[..., Any], other: Remote, kind: str
) -> None:
    shared_before = set(Path("/dev/shm").iterdir()) if Path("/dev/shm").is_dir() else set()
    mine = local(start, kind)
    table = tuple(range(60))
    out, back = make_ticket(1, HERE, other.ref, 900), make_ticket(2, other.ref, HERE, 900)
    other.open_ticket(out, table)
    mine.mover.open_ticket(back, table)
    mine.mover.send_stage(out, other.address, 0, 900, table, True)
    other.send_stage(back, mine.mover.address, 0, 900, table, True)
    assert {type(mine.event()) for _ in range(2)} == {StageSent, StageStored}
    assert {other.event()["event"] for _ in range(2)} == {"StageSent", "StageStored"}

    before = time.process_time(), other.ask("cpu")
    threading.Event().wait(1.0)  # a second in which nothing happens
    assert time.process_time() - before[0] < 0.05
    assert other.ask("cpu") - before[1] < 0.05

    assert other.ask("close_mover") == []
    mine.close()
    assert [t.name for t in threading.enumerate() if t.name.startswith("kv-")] == []
    assert "distserve-kv" not in Path("/proc/self/maps").read_text()
    assert not [name for fd in os.listdir("/proc/self/fd") if "distserve-kv" in (name := _target(fd))]
    if shared_before:
        assert not [path for path in set(Path("/dev/shm").iterdir()) - shared_before if "distserve" in path.name]


def _target(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:
        return ""


def test_bits_that_are_no_numbers_survive(start: Callable[..., Any], other: Remote) -> None:
    mine = local(start, "shm")
    mine.pool.fill_(float("nan"))
    mine.pool.view(torch.int32)[::2] |= 0x123
    ticket = make_ticket(1, HERE, other.ref, 64)
    other.open_ticket(ticket, (0, 1, 2))
    mine.mover.send_stage(ticket, other.address, 0, 64, (0, 1, 2, 3), True)
    assert isinstance(mine.event(), StageSent)
    assert other.digest() == expected_there(mine, (0, 1, 2, 3), (0, 1, 2), 0, 64)
