"""A link between movers exists only for an open ticket, between the lives it names, and with the cluster's secret."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from distserve.core.types import InstanceRef, Ticket
from distserve.transfer import StageFailed, StageStored, TransferConfig
from distserve.transfer.channel import Channel
from distserve.transfer.errors import NoTicket, TransferError
from distserve.transfer.pledge import demand, keep, sign
from distserve.transfer.stage import ref_to_wire
from distserve.v1 import transfer_pb2 as pb
from tests.transfer.peers import Local, make_pool, make_ticket

A, B = InstanceRef("a", 1), InstanceRef("b", 7)
TICKET = make_ticket(1, A, B, 64)
WAIT_S = 20.0
ONE, TWO = b"1" * 32, b"2" * 32


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    """A channel, source and destination."""
    listener = socket.create_server(("127.0.0.1", 0))
    source = socket.create_connection(listener.getsockname(), timeout=WAIT_S)
    destination, _ = listener.accept()
    listener.close()
    channels = Channel(source, WAIT_S), Channel(destination, WAIT_S)
    yield channels
    for channel in channels:
        channel.close()


def hello_of(ticket: Ticket, keys: Sequence[bytes] = (), source: InstanceRef = A) -> pb.TransferHello:
    hello = pb.TransferHello(source=ref_to_wire(source), destination=ref_to_wire(B))
    sign(hello, ticket, keys)
    return hello


def meet(
    ends: tuple[Channel, Channel],
    hello: pb.TransferHello,
    held: Ticket,
    granted: Ticket | None,
    keys: tuple[Sequence[bytes], Sequence[bytes]] = ((), ()),
) -> str:
    """Both parts of the handshake; the destination's error, or the source's, or nothing."""
    source, destination = ends
    said: list[str] = []

    def accepting() -> None:
        try:
            demand(destination, hello, granted, B, keys[1], time.monotonic() + WAIT_S)
        except TransferError as error:
            said.append(f"{type(error).__name__}: {error}")
            destination.interrupt()

    thread = threading.Thread(target=accepting)
    thread.start()
    try:
        keep(source, hello, held, keys[0], time.monotonic() + WAIT_S)
    except TransferError as error:
        said.append(f"{type(error).__name__}: {error}")
        source.interrupt()
    thread.join()
    return said[0] if said else ""


@pytest.mark.parametrize("keys", [((), ()), ((ONE,), (ONE,)), ((ONE,), (TWO, ONE)), ((TWO, ONE), (TWO,))])
def test_holders_of_one_ticket_meet(
    ends: tuple[Channel, Channel], keys: tuple[Sequence[bytes], Sequence[bytes]]
) -> None:
    assert meet(ends, hello_of(TICKET, keys[0]), TICKET, TICKET, keys) == ""


@pytest.mark.parametrize("keys", [((), (ONE,)), ((ONE,), ()), ((ONE,), (TWO,)), ((TWO, ONE), (ONE,))])
def test_another_clusters_instance_is_refused(
    ends: tuple[Channel, Channel], keys: tuple[Sequence[bytes], Sequence[bytes]]
) -> None:
    said = meet(ends, hello_of(TICKET, keys[0]), TICKET, TICKET, keys)
    assert said.startswith("NoTicket: a#1 does not know the ticket of move move-1 that it names to b#7")
    assert "cluster secret" in said


@pytest.mark.parametrize(
    "forged",
    [
        {"nonce": 9}, {"epoch": 2}, {"request_id": "r"}, {"fingerprint": "other"}, {"source": InstanceRef("a", 2)},
        {"destination": InstanceRef("b", 8)},
    ],
    ids=str,
)  # fmt: skip
def test_a_ticket_of_another_life_request_or_epoch_is_refused(
    ends: tuple[Channel, Channel], forged: dict[str, Any]
) -> None:
    other = replace(TICKET, **forged)
    assert meet(ends, hello_of(other), other, TICKET).startswith("NoTicket: a#1 does not know the ticket")


def test_a_ticket_that_is_not_open_or_not_the_callers_is_refused(ends: tuple[Channel, Channel]) -> None:
    assert "has no open ticket for move 'move-1' at b#7" in meet(ends, hello_of(TICKET), TICKET, None)


def test_somebody_elses_ticket_is_refused(ends: tuple[Channel, Channel]) -> None:
    thief = hello_of(TICKET, source=InstanceRef("z", 1))
    assert "z#1 has no open ticket" in meet(ends, thief, TICKET, TICKET)


def test_a_repeated_hello_ends_at_the_challenge(ends: tuple[Channel, Channel]) -> None:
    """Who heard a hello can say it again, but not answer the challenge."""
    source, destination = ends
    hello, said = hello_of(TICKET), []

    def accepting() -> None:
        with pytest.raises(NoTicket, match="repeated what another said") as refused:
            demand(destination, hello, TICKET, B, (), time.monotonic() + WAIT_S)
        said.append(refused.value)

    thread = threading.Thread(target=accepting)
    thread.start()
    challenge = source.receive(WAIT_S).challenge
    source.send(pb.TransferFrame(proof=pb.TransferProof(proof=challenge.proof)))
    thread.join()
    assert said


def test_a_false_destination_is_not_told_more(ends: tuple[Channel, Channel]) -> None:
    source, destination = ends
    hello = hello_of(TICKET)
    destination.send(pb.TransferFrame(challenge=pb.TransferChallenge(nonce=b"n" * 16, proof=hello.proof)))
    with pytest.raises(NoTicket, match="who answers for b#7 does not know the ticket"):
        keep(source, hello, TICKET, (), time.monotonic() + WAIT_S)


def test_movers_of_one_cluster_move_kv_and_a_cancelled_move_spoils_no_other() -> None:
    config = TransferConfig(keys=(ONE,))
    source = Local(A, make_pool(1, 20, 16), kind="shm", config=config)
    target = Local(B, make_pool(2, 20, 16), kind="shm", config=config)
    try:
        first, second = make_ticket(1, A, B, 64), make_ticket(2, A, B, 64)
        target.mover.open_ticket(second, (0, 1, 2, 3))
        for ticket in (first, second):  # the first one's grant is gone: it must not fail the second
            source.mover.send_stage(ticket, target.mover.address, 0, 64, (4, 5, 6, 7), True)
        gone, sent = source.event(), source.event()
        assert isinstance(gone, StageFailed) and (gone.move_id, gone.reason) == ("move-1", "ticket")
        assert sent.move_id == "move-2" and not isinstance(sent, StageFailed)
        assert isinstance(target.event(), StageStored)
    finally:
        source.close()
        target.close()


def test_a_mover_without_the_secret_moves_nothing() -> None:
    source = Local(A, make_pool(1, 20, 16), kind="shm")
    target = Local(B, make_pool(2, 20, 16), kind="shm", config=TransferConfig(keys=(ONE,)))
    try:
        target.mover.open_ticket(TICKET, (0, 1, 2, 3))
        source.mover.send_stage(TICKET, target.mover.address, 0, 64, (4, 5, 6, 7), True)
        failed = source.event()
        assert isinstance(failed, StageFailed) and failed.reason == "ticket" and "cluster secret" in failed.detail
    finally:
        source.close()
        target.close()
