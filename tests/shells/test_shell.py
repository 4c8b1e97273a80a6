"""The gateway's shell without a cluster: what it refuses, what it names, whom it cuts off."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from distserve.core.effects import Deliver
from distserve.core.types import Code, FinishReason, GatewayRef, Request, Sampling, Stopping, Token
from distserve.gateway.backend import CompleteEvent, RequestFailed
from distserve.gateway.options import GatewayOptions
from distserve.gateway.shell import GatewayShell
from distserve.sched.config import GatewayConfig

WAIT_S = 10.0


def request(name: str) -> Request:
    return Request(name, "m", (1, 2, 3), Sampling(), Stopping(8), 60.0)


@pytest.fixture
async def shell() -> AsyncIterator[GatewayShell]:
    options = GatewayOptions(
        model="", model_name="m", unread_limit_s=0.1, canary=False, machine=GatewayConfig(max_streams=3)
    )
    made = GatewayShell(options, GatewayRef("g", 77), "127.0.0.1:1")
    yield made
    await made.close()


async def test_an_id_is_taken_while_its_request_runs_and_free_afterwards(shell: GatewayShell) -> None:
    first = await shell.submit(request("same"), 0.0)
    with pytest.raises(RequestFailed, match="the id 'same' is running already") as caught:
        await shell.submit(request("same"), 0.0)
    assert (caught.value.code, caught.value.param) == (Code.ALREADY_EXISTS, "request_id")
    assert await shell.cancel("same")
    assert isinstance(await anext(first), CompleteEvent)
    again = await shell.submit(request("same"), 0.0)
    assert again.request_id == "same"


async def test_no_two_requests_have_one_id_in_the_cluster(shell: GatewayShell) -> None:
    ids = []
    for _ in range(3):
        stream = await shell.submit(request("same"), 0.0)
        ids += list(shell._machine.streams)
        await stream.aclose()
    assert len(set(ids)) == 3
    assert all(each.startswith("same~4d.") for each in ids)  # 77


async def test_the_machines_refusal_is_the_callers(shell: GatewayShell) -> None:
    streams = [await shell.submit(request(f"r{n}"), 0.0) for n in range(3)]
    with pytest.raises(RequestFailed, match="already serves 3 streams") as caught:
        await shell.submit(request("r3"), 0.0)
    assert caught.value.code is Code.RESOURCE_EXHAUSTED
    await streams[0].aclose()
    await shell.submit(request("r3"), 0.0)


async def test_shutting_down_refuses_what_is_new_and_waits_for_what_runs(shell: GatewayShell) -> None:
    running = await shell.submit(request("old"), 0.0)
    shell.refuse_new("closing time")
    with pytest.raises(RequestFailed, match="closing time") as caught:
        await shell.submit(request("new"), 0.0)
    assert caught.value.code is Code.UNAVAILABLE
    drained = asyncio.create_task(shell.drained())
    await asyncio.sleep(0)
    assert not drained.done()
    await running.aclose(FinishReason.STOP)
    async with asyncio.timeout(WAIT_S):
        await drained


async def test_what_still_runs_at_the_end_is_told_so(shell: GatewayShell) -> None:
    running = await shell.submit(request("r"), 0.0)
    await shell.close()
    with pytest.raises(RequestFailed, match="shutting down"):
        await anext(running)


async def test_a_reader_that_takes_nothing_is_cut_off(shell: GatewayShell) -> None:
    slow = await shell.submit(request("slow"), 0.0)
    prompt = await shell.submit(request("prompt"), 0.0)
    for ours in list(shell._streams):
        shell._perform(Deliver(ours, 0, (Token(1),)))
    await anext(prompt)
    assert await shell.where("prompt") is not None
    await prompt.aclose()
    async with asyncio.timeout(WAIT_S):
        await shell.drained()
    with pytest.raises(RequestFailed, match=r"was not read for 0.1 s") as caught:
        await anext(slow)
    assert caught.value.code is Code.RESOURCE_EXHAUSTED


async def test_where_tells_what_a_request_waits_for(shell: GatewayShell) -> None:
    await shell.submit(request("r"), 0.0)
    view = await shell.where("r")
    assert view is not None
    assert (view.request_id, view.phase, view.waits_for) == ("r", "waiting", "an instance that can take it")
    assert 0 < view.deadline_in_s <= 60.0
    assert await shell.where("nobody") is None


async def test_nobody_is_no_readiness(shell: GatewayShell) -> None:
    assert not shell.ready()
    assert shell.max_request_tokens("m") == 0
    assert await shell.instances() == []
    assert await shell.kv_check() == []
