"""Addresses, ports and pauses of control connections."""

from __future__ import annotations

import socket

import pytest

from distserve.core.types import Endpoint, GatewayRef, InstanceRef
from distserve.wire.channels import (
    LONGEST_PAUSE_S,
    Backoff,
    Hello,
    PortTaken,
    address_of,
    bind,
    own_host,
    read_hello,
)

ME = InstanceRef("me", 2**62)


def test_a_wildcard_is_advertised_as_the_address_that_faces_the_controller() -> None:
    assert own_host("10.1.2.3", "nowhere:1") == "10.1.2.3"
    assert own_host("0.0.0.0", "127.0.0.1:50052") == "127.0.0.1"
    with pytest.raises(ValueError, match=r"faces the controller at no.such.host.invalid:1 .*--advertise-host"):
        own_host("0.0.0.0", "no.such.host.invalid:1")


def test_an_ipv6_host_is_bracketed() -> None:
    assert address_of("::1", 80) == "[::1]:80"
    assert address_of("localhost", 80) == "localhost:80"


async def test_a_port_in_use_is_named() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(PortTaken, match=rf"cannot listen on 127.0.0.1:{port}: is another process"):
            bind("127.0.0.1", port)


async def test_two_servers_do_not_share_a_port() -> None:
    server, port = bind("127.0.0.1", 0)
    await server.start()
    with pytest.raises(PortTaken):
        bind("127.0.0.1", port)
    await server.stop(None)


@pytest.mark.parametrize(
    "hello",
    [
        Hello(GatewayRef("g", 1), ME),
        Hello(InstanceRef("other", 2**63), ME, Endpoint(InstanceRef("other", 2**63), "h:1", "h:2")),
    ],
)
def test_a_hello_survives_its_metadata(hello: Hello) -> None:
    assert read_hello([("user-agent", "x"), *hello.metadata()], ME) == hello


def test_pauses_grow_to_a_bound_differ_and_start_again() -> None:
    backoff, other = Backoff(1), Backoff(2)
    pauses = [backoff.pause_s() for _ in range(12)]
    assert pauses != [other.pause_s() for _ in range(12)]
    assert pauses[0] <= 0.1
    assert LONGEST_PAUSE_S / 2 <= pauses[-1] <= LONGEST_PAUSE_S
    backoff.reset()
    assert backoff.pause_s() <= 0.1
