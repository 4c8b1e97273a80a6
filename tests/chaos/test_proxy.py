"""The proxy itself: what it is told to break breaks, what it is not told to passes unchanged."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator

import pytest

from tests.chaos.proxy import Proxy, Trouble, Way, owner_of_port

WAIT_S = 20.0


@pytest.fixture
async def proxy() -> AsyncIterator[Proxy]:
    """Before a server that gives back what it gets, in capitals."""

    async def shout(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data.upper())
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(shout, "127.0.0.1", 0)
    made = Proxy("p", lambda port: owner_of_port(port, {os.getpid(): "me"}))
    made.leads_to(f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
    await made.start()
    yield made
    await made.stop()
    server.close()


async def talk(proxy: Proxy) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(b"hello")
    assert await answer(reader, 5) == b"HELLO"
    return reader, writer


async def answer(reader: asyncio.StreamReader, count: int) -> bytes:
    async with asyncio.timeout(WAIT_S):
        return await reader.readexactly(count)


async def test_bytes_pass_both_ways_and_it_is_known_who_dialled(proxy: Proxy) -> None:
    reader, writer = await talk(proxy)
    big = os.urandom(1 << 20).replace(b"\xff", b"a")
    writer.write(big)
    assert await answer(reader, len(big)) == big.upper()
    assert [c.dialler for c in proxy.hit()] == ["me"]
    assert proxy.hit("somebody else") == []
    writer.write_eof()
    async with asyncio.timeout(WAIT_S):
        assert await reader.read() == b""


@pytest.mark.parametrize("way", [Way.OUT, Way.BACK])
async def test_a_partition_holds_one_way_also_for_who_comes_later_and_loses_nothing(proxy: Proxy, way: Way) -> None:
    talks = [await talk(proxy)]
    with proxy.trouble(Trouble((way,), "me", hold=True)):
        talks.append(await asyncio.open_connection("127.0.0.1", proxy.port))
        for _, writer in talks:
            writer.write(b"later")
        reads = [asyncio.ensure_future(answer(reader, 5)) for reader, _ in talks]
        done, _ = await asyncio.wait(reads, timeout=0.3)
        assert done == set()
    assert await asyncio.gather(*reads) == [b"LATER", b"LATER"]


async def test_a_trouble_for_one_dialler_spares_the_others(proxy: Proxy) -> None:
    with proxy.trouble(Trouble(dialler="somebody else", hold=True)):
        await talk(proxy)
        with proxy.trouble(Trouble(dialler="me", hold=True)):
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
            writer.write(b"held")
            held = asyncio.ensure_future(answer(reader, 4))
            assert (await asyncio.wait([held], timeout=0.3))[0] == set()
        assert await held == b"HELD"


async def test_a_reset_is_seen_at_both_ends(proxy: Proxy) -> None:
    reader, _ = await talk(proxy)
    for connection in proxy.hit():
        connection.reset()
    with pytest.raises(ConnectionResetError):
        async with asyncio.timeout(WAIT_S):
            await reader.read()


async def test_a_half_close_ends_one_way_only(proxy: Proxy) -> None:
    reader, writer = await talk(proxy)
    (connection,) = proxy.hit()
    connection.half_close(Way.BACK)
    async with asyncio.timeout(WAIT_S):
        assert await reader.read() == b""
    writer.write(b"still heard, not answered")
    await writer.drain()


async def test_nobody_behind_it_is_a_reset(proxy: Proxy) -> None:
    proxy.upstream = ("127.0.0.1", 1)
    reader, _ = await asyncio.open_connection("127.0.0.1", proxy.port)
    with pytest.raises(ConnectionResetError):
        async with asyncio.timeout(WAIT_S):
            await reader.read()


async def test_a_slow_link_is_slow(proxy: Proxy) -> None:
    reader, writer = await talk(proxy)
    began = asyncio.get_running_loop().time()
    with proxy.trouble(Trouble((Way.OUT,), bytes_per_s=10_000, delay_s=0.05)):
        writer.write(b"x" * 1500)
        await answer(reader, 1500)
    assert asyncio.get_running_loop().time() - began >= 0.19
