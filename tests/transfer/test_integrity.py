"""Whatever changes on the way of a stage, its payload or what is said of it, is noticed: nothing is stored or hangs.

Payload is changed in staging after its checksum was taken; what is said, by a man in the middle of the control
connection. After every change the same stage is sent again unharmed, or must be refused.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from distserve.core.types import Ticket
from distserve.transfer import FaultInjector, StageCorrupt, StageFailed, StageSent, StageStored, TransferConfig
from tests.transfer.pairs import KINDS, A, B
from tests.transfer.peers import Local, copy_tokens, make_pool, make_ticket
from tests.transfer.tap import Edit, Tap, unchanged

TOKENS = 3
SMALL = {"slice_bytes": 192, "shm_piece_bytes": 768, "gloo_piece_bytes": 768}
"""With blocks of one token, 384 bytes: two slices a token, pieces of one, two, three slices."""


class Spoiler(FaultInjector):
    """Changes the staged bytes of a stage, by their offset in it."""

    def __init__(self, slice_bytes: int) -> None:
        self.slice_bytes = slice_bytes
        self.flips: dict[int, int] = {}  # offset → bits
        self.change: Callable[[int, Any], None] = lambda index, staged: None
        self.missing: dict[int, int] = {}  # index of a piece's first slice → bytes not sent

    def on_staged(self, ticket: Ticket, index: int, staged: Any) -> None:
        first = index * self.slice_bytes
        for offset, bits in self.flips.items():
            if first <= offset < first + len(staged):
                staged[offset - first] ^= bits
        self.change(index, staged)

    def piece_bytes(self, ticket: Ticket, index: int, nbytes: int) -> int:
        return nbytes - self.missing.get(index, 0)


class Attempts:
    """One stage of ``tokens`` that is sent over and over."""

    def __init__(self, kind: str, tokens: int = TOKENS, block: int = 1, tapped: bool = False, **config: Any) -> None:
        settings = SMALL | {"stall_s": 2.0} | config
        self.spoiler = Spoiler(settings["slice_bytes"])
        self.tokens = tokens
        blocks = -(-tokens // block)
        self.source = Local(A, make_pool(1, blocks, block), kind, TransferConfig(**settings, faults=self.spoiler))
        self.target = Local(B, make_pool(2, blocks, block), kind, TransferConfig(**settings))
        self.table = tuple(range(blocks))
        self.before = self.target.pool.clone()
        self.after = self.target.pool.clone()
        copy_tokens(self.source.pool, self.table, self.after, self.table, 0, tokens)
        self.tap = Tap(self.target.mover.address) if tapped else None
        self._number = 0

    @property
    def nbytes(self) -> int:
        return int(self.source.pool.view(torch.uint8).numel())

    def open(self) -> Ticket:
        self._number += 1
        ticket = make_ticket(self._number, A, B, self.tokens)
        self.target.mover.open_ticket(ticket, self.table)
        return ticket

    def send(self, ticket: Ticket, start: int = 0, end: int | None = None) -> StageSent | StageFailed:
        address = self.tap.address if self.tap else self.target.mover.address
        stop = self.tokens if end is None else end
        self.source.mover.send_stage(ticket, address, start, stop, self.table, stop == self.tokens)
        event = self.source.event()
        assert isinstance(event, StageSent | StageFailed)
        return event

    def arrives(self, ticket: Ticket) -> None:
        """Send it unharmed; it is stored, bit for bit."""
        event = self.send(ticket)
        assert isinstance(event, StageSent), event
        assert isinstance(self.target.event(), StageStored)
        assert torch.equal(self.target.pool.view(torch.uint8), self.after.view(torch.uint8))

    def is_noticed(self, ticket: Ticket) -> None:
        """Send it spoilt: both ends are told of the checksum, and of nothing else."""
        event = self.send(ticket)
        assert isinstance(event, StageFailed) and event.reason == "checksum" and event.retriable, event
        there = self.target.event()
        assert isinstance(there, StageCorrupt) and there.nonce == ticket.nonce, there

    def byte(self, offset: int) -> int:
        """What the destination's pool holds there."""
        return int(self.target.pool.view(torch.uint8).view(-1)[offset])

    def close(self) -> None:
        self.source.close()
        self.target.close()
        if self.tap:
            self.tap.close()
        assert self.source.events.empty() and self.target.events.empty()


@pytest.fixture
def attempt() -> Iterator[Callable[..., Attempts]]:
    """Makes them; in the end nothing may have been said that no test expected."""
    made: list[Attempts] = []

    def build(*args: Any, **kwargs: Any) -> Attempts:
        made.append(Attempts(*args, **kwargs))
        return made[-1]

    yield build
    for each in made:
        each.close()


# ── payload ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", KINDS)
def test_each_flipped_byte_of_a_small_payload_is_noticed(attempt: Callable[..., Attempts], kind: str) -> None:
    one = attempt(kind)
    ticket = one.open()
    before = one.before.view(torch.uint8).view(-1).numpy()
    for offset in range(one.nbytes):
        one.spoiler.flips = {offset: 1 << offset % 8}
        one.is_noticed(ticket)
        assert one.byte(offset) == before[offset]  # its slice was not written
    one.spoiler.flips = {}
    one.arrives(ticket)
    assert one.target.mover.counts()["stages_refused_checksum"] == one.nbytes
    assert one.source.mover.counts()[f"links_out_{kind}"] == 1  # the link was not to blame


def test_each_bit_of_a_slice_is_noticed(attempt: Callable[..., Attempts]) -> None:
    one = attempt("shm", tokens=1)
    ticket = one.open()
    for bit in range(192 * 8):
        one.spoiler.flips = {bit // 8: 1 << bit % 8}
        one.is_noticed(ticket)


@pytest.mark.parametrize("kind", KINDS)
def test_flips_anywhere_in_a_large_payload_are_noticed(attempt: Callable[..., Attempts], kind: str) -> None:
    one = attempt(
        kind, tokens=6400, block=16, slice_bytes=512 << 10, shm_piece_bytes=1 << 20, gloo_piece_bytes=1 << 20
    )
    ticket, lots = one.open(), random.Random(5)
    assert one.nbytes > 2 << 20
    places = [0, one.nbytes - 1, *(lots.randrange(one.nbytes) for _ in range(60))]
    one.spoiler.slice_bytes = 85 * 6144  # whole blocks of 6,144 bytes, as many as fit 512 KiB
    for offset in places:
        one.spoiler.flips = {offset: 1 << lots.randrange(8)}
        one.is_noticed(ticket)
    for _ in range(10):  # more than one at once
        one.spoiler.flips = {lots.randrange(one.nbytes): lots.randrange(1, 256) for _ in range(lots.randrange(2, 40))}
        one.is_noticed(ticket)
    one.spoiler.flips = {}
    one.arrives(ticket)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("missing", [1, 8, 191, 192, 193])
def test_a_payload_cut_short_is_noticed(attempt: Callable[..., Attempts], kind: str, missing: int) -> None:
    one = attempt(kind)
    ticket = one.open()
    one.spoiler.missing = {1: missing}  # of the second piece, two slices
    one.send(ticket)
    event = one.target.event()
    assert isinstance(event, StageCorrupt)
    one.spoiler.missing = {}
    one.arrives(ticket)


def _swap_slices(index: int, staged: Any) -> None:
    if len(staged) > 192:
        staged[:192], staged[192:384] = staged[192:384].copy(), staged[:192].copy()


def _zeros(index: int, staged: Any) -> None:
    staged[:] = 0


def _shifted(index: int, staged: Any) -> None:
    staged[:] = np.roll(staged, 8)


@pytest.mark.parametrize("change", [_swap_slices, _zeros, _shifted], ids=["swapped slices", "zeros", "shifted"])
def test_a_payload_in_another_order_is_noticed(
    attempt: Callable[..., Attempts], change: Callable[[int, Any], None]
) -> None:
    one = attempt("shm")
    ticket = one.open()
    one.spoiler.change = change
    one.is_noticed(ticket)
    one.spoiler.change = lambda index, staged: None
    one.arrives(ticket)


def test_the_payload_of_another_stage_or_ticket_is_noticed(attempt: Callable[..., Attempts]) -> None:
    """Staging that was used before, sound then, does not pass for what should be there now."""
    one = attempt("shm")
    old: dict[int, Any] = {}
    one.spoiler.change = lambda index, staged: old.setdefault(index, staged.copy())
    first = one.open()
    one.arrives(first)
    one.source.pool.view(torch.uint8).bitwise_xor_(255)
    second = one.open()

    def put_back(index: int, staged: Any) -> None:
        staged[:] = old[index]

    one.spoiler.change = put_back
    one.is_noticed(second)


# ── what is said of it ───────────────────────────────────────────────────────────────────────────────────────────────


def flip(frame: bytes, offset: int) -> bytes:
    return frame[:offset] + bytes([frame[offset] ^ 1 << offset % 8]) + frame[offset + 1 :]


def flips(number: int, offset: int, done: list[int]) -> Edit:
    """Flips a bit of one byte of one frame."""

    def edit(at: int, frame: bytes) -> list[bytes]:
        if at != number or offset >= len(frame):
            return [frame]
        done.append(offset)
        return [flip(frame, offset)]

    return edit


@pytest.mark.parametrize(("kind", "every"), [("shm", 1), ("gloo", 17)])
def test_each_flipped_byte_of_what_the_source_says_is_noticed(
    attempt: Callable[..., Attempts], kind: str, every: int
) -> None:
    """All of it, from the first byte of the handshake to the last of the stage. Each costs the link, and no more."""
    one = attempt(kind, tapped=True)
    assert one.tap is not None
    one.arrives(one.open())
    lengths = [len(frame) for frame in one.tap.seen]
    assert sum(lengths) > 400 and len(lengths) >= 6
    ticket = one.open()
    for number, offset in [(n, o) for n, length in enumerate(lengths) for o in range(length)][::every]:
        done: list[int] = []
        one.source.mover.peer_lost(B)  # dial anew
        one.tap.outward = flips(number, offset, done)
        event = one.send(ticket)
        assert isinstance(event, StageFailed) and event.reason in ("peer", "protocol"), (number, offset, event)
        assert done == [offset]
    one.tap.outward = unchanged
    while not one.target.events.empty():
        event = one.target.event()
        assert isinstance(event, StageCorrupt) and event.nonce == ticket.nonce
    one.arrives(ticket)


def test_each_flipped_byte_of_what_the_destination_says_is_noticed(attempt: Callable[..., Attempts]) -> None:
    """The source takes no stage for sent whose end it did not hear; stored it may be, and committed never."""
    one = attempt("shm", tapped=True)
    assert one.tap is not None
    one.arrives(one.open())
    lengths, changed = [len(frame) for frame in one.tap.answered], 0
    for number, offset in [(n, o) for n, length in enumerate(lengths) for o in range(length)]:
        done: list[int] = []
        ticket = one.open()
        one.source.mover.peer_lost(B)
        one.tap.back = flips(number, offset, done)
        event = one.send(ticket)
        assert isinstance(event, StageFailed) if done else offset >= lengths[number] - 2, (number, offset, event)
        changed += len(done)
        one.target.mover.close_ticket(ticket.move_id)
    assert changed > 0.95 * sum(lengths)  # numbers in a frame may have a digit less now and then
    while not one.target.events.empty():
        assert isinstance(one.target.event(), StageStored)
    one.tap.back = unchanged
    one.arrives(one.open())


def repeated(held: dict[int, bytes], at: int, frame: bytes) -> list[bytes]:
    return [frame, frame] if at == -2 else [frame]


def lost(held: dict[int, bytes], at: int, frame: bytes) -> list[bytes]:
    return [] if at == -2 else [frame]


def the_last_lost(held: dict[int, bytes], at: int, frame: bytes) -> list[bytes]:
    return [] if at == -1 else [frame]


def swapped(held: dict[int, bytes], at: int, frame: bytes) -> list[bytes]:
    return {-2: [], -1: [frame, held[-2]] if at == -1 else []}.get(at, [frame])


def begun_again(held: dict[int, bytes], at: int, frame: bytes) -> list[bytes]:
    return [frame, held[-4]] if at == -3 else [frame]


def garbage(held: dict[int, bytes], at: int, frame: bytes) -> list[bytes]:
    return [b"\xff" * 5000] if at == -2 else [frame]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", [repeated, lost, the_last_lost, swapped, begun_again, garbage])
def test_frames_repeated_lost_or_out_of_order_store_nothing(
    attempt: Callable[..., Attempts], kind: str, change: Callable[[dict[int, bytes], int, bytes], list[bytes]]
) -> None:
    """The last four frames of the first stage on a connection are its head and three pieces: -4 to -1."""
    one = attempt(kind, tapped=True, stall_s=0.3)
    assert one.tap is not None
    one.arrives(one.open())
    count, held = len(one.tap.seen), {}

    def edit(number: int, frame: bytes) -> list[bytes]:
        held[number - count] = frame
        return change(held, number - count, frame)

    ticket = one.open()
    one.source.mover.peer_lost(B)
    one.tap.outward = edit
    event = one.send(ticket)
    assert isinstance(event, StageFailed) and event.reason in ("peer", "protocol", "timeout"), event
    one.tap.outward = unchanged
    one.source.mover.peer_lost(B)
    assert one.target.mover.counts()["stages_stored"] == 1
    one.target.mover.close_ticket(ticket.move_id)
    while not one.target.events.empty():
        assert isinstance(one.target.event(), StageCorrupt)
    one.arrives(one.open())


@pytest.mark.parametrize("kind", KINDS)
def test_an_old_stage_said_again_stores_nothing(attempt: Callable[..., Attempts], kind: str) -> None:
    """Head and piece of the stage before are put between it and the next: what follows is refused, not misplaced."""
    one = attempt(kind, tapped=True, stall_s=0.3)
    assert one.tap is not None
    ticket = one.open()
    assert isinstance(one.send(ticket, 0, 1), StageSent)
    assert isinstance(one.target.event(), StageStored)
    old, count = one.tap.seen[-3:], len(one.tap.seen)
    one.tap.outward = lambda number, frame: [*old, frame] if number == count else [frame]
    event = one.send(ticket, 1)
    assert isinstance(event, StageFailed), event
    one.tap.outward = unchanged
    one.source.mover.peer_lost(B)
    assert one.target.mover.counts()["stages_stored"] == 1
    one.target.mover.close_ticket(ticket.move_id)
    while not one.target.events.empty():
        assert isinstance(one.target.event(), StageCorrupt)
    one.arrives(one.open())
