"""A watch of the traffic: what it tells, what it never tells, and how it ends."""

from __future__ import annotations

import asyncio
from contextlib import AbstractContextManager
from pathlib import Path

import grpc
import pytest

from distserve.cli.main import main
from distserve.core.effects import Account, Complete, Fail
from distserve.core.events import Submitted
from distserve.core.types import Code, FinishReason, Request, Sampling, Stopping, Timings
from distserve.gateway import traffic as module
from distserve.gateway.backend import RequestFailed
from distserve.gateway.canary import TENANT
from distserve.gateway.frontend import FrontEnd
from distserve.gateway.rpc.server import GrpcServer
from distserve.gateway.traffic import Traffic, TrafficRecord, Watch
from distserve.kv.prefix import PREFIX_RUN
from distserve.v1 import admin_pb2 as pb
from distserve.v1.admin_pb2_grpc import AdminServiceStub
from distserve_planner import workload


def come(name: str, prompt: tuple[int, ...], tenant: str = "a") -> Submitted:
    return Submitted(Request(name, "tiny", prompt, Sampling(), Stopping(max_tokens=9), 10.0, tenant=tenant))


def done(name: str, tokens: int = 5, finish: FinishReason = FinishReason.LENGTH) -> Complete:
    return Complete(name, finish, Account("p", "d", 1, 3, tokens, 0.1, 0.5, Timings()))


async def collected(traffic: Traffic, *happened: tuple[float, object, list[object]]) -> list[TrafficRecord]:
    """What a watch of a few milliseconds sees of events that happen at once."""
    base = asyncio.get_running_loop().time()
    with traffic.watch(0.02) as watch:
        for at, event, effects in happened:
            traffic.write(base + at, event, effects)
        return [record async for record in watch]


async def test_lengths_arrivals_and_shared_prefixes() -> None:
    common = tuple(range(PREFIX_RUN))
    first, second = (*common, 7, 8), (*common, 9)
    records = await collected(
        Traffic(),
        (0.0, come("one", first), []),
        (0.5, come("two", second, "b"), []),
        (1.0, object(), [done("two", 2), done("one", 5)]),
    )
    two, one = records
    assert (one.prompt_tokens, one.output_tokens, two.prompt_tokens, two.output_tokens) == (66, 5, 65, 2)
    assert two.arrival_s - one.arrival_s == pytest.approx(0.5, abs=0.01)
    assert len(one.prefix_blocks) == len(two.prefix_blocks) == 2
    assert one.prefix_blocks[0] == two.prefix_blocks[0] and one.prefix_blocks[1] != two.prefix_blocks[1]
    assert one.client != two.client


async def test_refused_cancelled_and_canary_requests() -> None:
    records = await collected(
        Traffic(),
        (0.0, come("full", (1,)), [Fail("full", Code.RESOURCE_EXHAUSTED, "the queue is full")]),
        (0.0, come("left", (1, 2)), []),
        (0.1, object(), [done("left", 1, FinishReason.CANCELLED)]),
        (0.2, come("canary", (1,), TENANT), [done("canary")]),
        (0.3, object(), [done("never seen")]),
    )
    assert [(r.outcome, r.output_tokens) for r in records] == [("resource_exhausted", 0), ("cancelled", 1)]


async def test_the_watch_lasts_until_what_it_saw_come_has_ended() -> None:
    traffic = Traffic()
    with traffic.watch(0.01) as watch:
        base = asyncio.get_running_loop().time()
        traffic.write(base, come("slow", (1, 2, 3)), [])
        records = aiter(watch)
        waiting = asyncio.ensure_future(anext(records))
        await asyncio.sleep(0.05)
        traffic.write(base + 1, come("too late", (1,)), [])
        assert not waiting.done()
        traffic.write(base + 2, object(), [done("slow", 9), done("too late")])
        assert (await waiting).output_tokens == 9
        with pytest.raises(StopAsyncIteration):
            await anext(records)


async def test_a_watcher_that_lags_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BACKLOG", 2)
    traffic = Traffic()
    with traffic.watch(60.0) as watch:
        now = asyncio.get_running_loop().time()
        for n in range(4):
            traffic.write(now, come(str(n), (1,)), [done(str(n))])
        with pytest.raises(RequestFailed, match="too slowly"):
            async for _ in watch:
                pass


async def test_prompts_beyond_the_bound_come_without_their_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHAINS", 2)
    long = tuple(range(3 * PREFIX_RUN))
    (record,) = await collected(Traffic(), (0.0, come("long", long), [done("long")]))
    assert record.prefix_blocks == () and record.prompt_tokens == len(long)


async def test_nobody_watches_nothing_is_kept() -> None:
    traffic = Traffic()
    with traffic.watch(60.0):
        pass
    traffic.write(0.0, come("one", (1,)), [])
    assert not traffic._watches


# ── through gRPC and the command ─────────────────────────────────────────────────────────────────────────────────────


async def test_a_watch_without_an_end_is_refused(channel: grpc.aio.Channel) -> None:
    for seconds in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            async for _ in AdminServiceStub(channel).WatchTraffic(pb.WatchTrafficRequest(duration_s=seconds)):
                pass
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_the_command_writes_a_trace_the_planner_reads(
    grpc_server: GrpcServer,
    front_end: FrontEnd,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, came, watch = tmp_path / "t.jsonl.gz", asyncio.Event(), front_end.traffic.watch

    def watched(duration_s: float) -> AbstractContextManager[Watch]:
        came.set()
        return watch(duration_s)

    monkeypatch.setattr(front_end.traffic, "watch", watched)
    words = f"record --server 127.0.0.1:{grpc_server.port} --duration 0.5 --out {out}"
    running = asyncio.get_running_loop().run_in_executor(None, main, words.split())
    async with asyncio.timeout(30):
        await came.wait()
        now = asyncio.get_running_loop().time()
        for n, prompt in enumerate(((1, 2, 3), tuple(range(70)))):
            front_end.traffic.write(now + n, come(str(n), prompt), [])
        front_end.traffic.write(now, come("no", (1,)), [Fail("no", Code.RESOURCE_EXHAUSTED, "full")])
        front_end.traffic.write(now + 2, object(), [done("1", 4), done("0", 6)])
        assert await running == 0
    told = capsys.readouterr().out
    assert "2 requests" in told and "1 resource_exhausted" in told
    read = workload.read(out)
    assert [(j.prompt, j.output) for j in read.jobs] == [(3, 6), (70, 4)]
    assert read.jobs[0].arrival_s == 0.0 and read.prefix_tokens == PREFIX_RUN


def test_bad_words(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["record", "--out", str(tmp_path / "no" / "t.jsonl")]) == 1
    assert "there is no folder" in capsys.readouterr().err
    assert main(["record", "--out", str(tmp_path / "t.jsonl"), "--duration", "0"]) == 1
    assert "above 0" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
