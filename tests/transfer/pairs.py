"""A source and a destination in this process with a ticket between them: where most tests of the data plane begin."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from distserve.core.types import InstanceRef, Ticket
from distserve.transfer import FaultInjector, StageFailed, StageSent, StageStored, TransferConfig
from tests.transfer.peers import WAIT_S, Local, copy_tokens, make_pool, make_ticket, shuffled

A, B = InstanceRef("a", 1), InstanceRef("b", 7)
BLOCKS = 60
TOTAL = 300
KINDS = ["shm", "gloo"]


class Faults(FaultInjector):
    """Does what a test puts into it, at the pieces it names."""

    def __init__(self) -> None:
        self.at: dict[int, Callable[[], None]] = {}
        self.flip: set[int] = set()
        self.shorten: set[int] = set()

    def pause(self, index: int) -> tuple[threading.Event, threading.Event]:
        """Hold the source before piece ``index``: (it is there, it may go on)."""
        reached, go_on = threading.Event(), threading.Event()

        def wait() -> None:
            reached.set()
            go_on.wait(WAIT_S)

        self.at[index] = wait
        return reached, go_on

    def on_piece(self, ticket: Ticket, index: int) -> None:
        self.at.get(index, lambda: None)()

    def on_staged(self, ticket: Ticket, index: int, staged: Any) -> None:
        if index in self.flip:
            staged[len(staged) // 2] ^= 4

    def piece_bytes(self, ticket: Ticket, index: int, nbytes: int) -> int:
        return nbytes - 8 if index in self.shorten else nbytes


class Pair:
    """Source and destination, a ticket between them, and what the destination's pool must hold in the end."""

    def __init__(self, kind: str = "shm", here: int = 16, there: int = 16, have: int = 0, **config: Any) -> None:
        self.faults = Faults()
        settings = replace(
            TransferConfig(shm_piece_bytes=13_000, gloo_piece_bytes=13_000, faults=self.faults), **config
        )
        self.source = Local(A, make_pool(1, BLOCKS, here), kind, settings)
        self.target = Local(B, make_pool(2, BLOCKS, there), kind, replace(settings, faults=FaultInjector()))
        self.here = shuffled(3, TOTAL, BLOCKS, here)
        self.there = shuffled(4, TOTAL, BLOCKS, there)
        self.ticket = make_ticket(1, A, B, TOTAL, have)
        self.expected = self.target.pool.clone()

    def open(self) -> None:
        self.target.mover.open_ticket(self.ticket, self.there)

    def send(self, start: int, end: int, final: bool = False, ticket: Ticket | None = None) -> None:
        address = self.target.mover.address
        self.source.mover.send_stage(ticket or self.ticket, address, start, end, self.here, final)

    def stored(self, start: int, end: int, final: bool = False) -> None:
        """Send a stage that must arrive."""
        self.send(start, end, final)
        event = self.source.event()
        assert isinstance(event, StageSent), event
        assert (event.start, event.end) == (start, end)
        there = self.target.event()
        assert there == StageStored(self.ticket.move_id, self.ticket.nonce, start, end, event.nbytes)
        copy_tokens(self.source.pool, self.here, self.expected, self.there, start, end)
        self.unchanged()

    def fails(self, reason: str, start: int, end: int, ticket: Ticket | None = None) -> StageFailed:
        """Send a stage that must not arrive, and see that not one byte of the pool changes."""
        self.send(start, end, ticket=ticket)
        event = self.source.event()
        assert isinstance(event, StageFailed), event
        assert (event.reason, event.start, event.end) == (reason, start, end), event
        self.unchanged()
        return event

    def unchanged(self) -> None:
        assert torch.equal(self.target.pool.view(torch.uint8), self.expected.view(torch.uint8))

    def close(self) -> None:
        self.source.close()
        self.target.close()
