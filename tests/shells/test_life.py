"""How processes start, end, and do without each other."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import urllib.request
from pathlib import Path

import pytest

from distserve.core.types import GatewayRef, Member, Role
from distserve.gateway.backend import TokensEvent
from distserve.gateway.options import GatewayOptions
from distserve.gateway.process import gateway
from distserve.observe import codec
from distserve.observe.journal import replay
from distserve.sched.cluster import ClusterState
from distserve.sched.config import ClusterConfig, GatewayConfig, InstanceConfig
from distserve.sched.gateway import GatewayState
from distserve.sched.instance import InstanceState
from tests.shells.cluster import MODEL, READY_S, Part, answer, cluster, request, start
from tests.tiny_models import make_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("tiny"))


def fresh_machine(about: dict):
    match about["machine"]:
        case "instance":
            member: Member = codec.decode_tagged(about["member"])
            return InstanceState(member, InstanceConfig(**about["config"]), about["seed"])
        case "gateway":
            me: GatewayRef = codec.decode_tagged(about["me"])
            return GatewayState(me, GatewayConfig(**about["config"]))
    return ClusterState(ClusterConfig(**about["config"]))


async def test_live_journals_replay_to_the_same_effects(model, tmp_path) -> None:
    async with cluster(model, Role.PREFILL, Role.DECODE, journals=tmp_path) as held:
        await asyncio.gather(*(answer(held.shell, request(f"r{i}", range(3, 40 + i), 10)) for i in range(4)))
        cut = await held.shell.submit(request("cut", range(3, 90), 100), 0.0)
        await anext(cut)
        await cut.aclose()
        await held.clean()
    journals = sorted(path.name for path in tmp_path.iterdir())
    assert journals == ["cluster.jsonl", "decode-1.jsonl", "gateway.jsonl", "prefill-0.jsonl"]
    for name in journals:
        assert replay(tmp_path / name, fresh_machine) > 10


async def test_a_controller_may_go_and_come_back(model) -> None:
    parts: list[Part] = []
    port = free_port()
    try:
        control = start("controller", port=port, machine={"lease_s": 3.0}, log_level="warning")
        parts.append(control)
        address = (await control.said("bound"))["address"]
        mixed = start(
            "instance",
            id="mixed-0",
            model=str(model),
            model_name=MODEL,
            controller=address,
            role="mixed",
            kv_tokens=4096,
            log_level="error",
        )
        parts.append(mixed)
        await mixed.said("joined")
        options = GatewayOptions(model=str(model), model_name=MODEL, http_port=None, grpc_port=None, controller=address)
        async with gateway(options) as running:
            async with asyncio.timeout(READY_S):
                await running.ready.wait()
            before, _ = await answer(running.shell, request("before", range(3, 30), 8))
            control.process.kill()
            await control.ended()
            away, _ = await answer(running.shell, request("away", range(3, 30), 8))
            parts.append(again := start("controller", port=port, machine={"lease_s": 3.0}, log_level="warning"))
            await again.said("bound")
            await mixed.said("joined")
            back, _ = await answer(running.shell, request("back", range(3, 30), 8))
            assert before == away == back
            assert running.shell.ready()
    finally:
        for part in parts:
            part.close()


async def test_every_part_runs_alone_and_says_nothing_on_stdout(model, capfd) -> None:
    parts: list[Part] = []
    try:
        parts.append(control := start("controller", log_level="warning"))
        common = {"model": str(model), "model_name": MODEL, "log_level": "warning"}
        common["controller"] = (await control.said("bound"))["address"]
        parts.append(mixed := start("instance", id="mixed-0", role="mixed", kv_tokens=4096, ops_port=0, **common))
        parts.append(front := start("gateway", http_port=0, grpc_port=0, **common))
        bound = await front.said("bound")
        await front.said("ready")
        answer_ = await asyncio.to_thread(complete, bound["http_port"])
        assert answer_["usage"]["completion_tokens"] == 5
        for part in (front, mixed, control):
            part.process.send_signal(signal.SIGTERM)
            assert await part.ended() == 0
    finally:
        for part in parts:
            part.close()
    assert capfd.readouterr().out == ""


def complete(port: int) -> dict:
    body = {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 5, "ignore_eos": True, "temperature": 0}
    asked = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(asked, timeout=20) as response:
        return json.load(response)


async def test_asked_to_stop_an_instance_finishes_what_it_runs(model) -> None:
    async with cluster(model, Role.MIXED, grace_s=30.0) as held:
        running = await held.shell.submit(request("long", range(3, 30), 300), 0.0)
        first = await anext(running)
        assert isinstance(first, TokensEvent)
        part = held.parts["mixed-0"]
        part.process.send_signal(signal.SIGTERM)
        rest = [token async for event in running for token in getattr(event, "tokens", ())]
        assert len(first.tokens) + len(rest) == 300
        assert await part.ended() == 0
        assert not held.shell.ready()


async def test_an_instance_of_other_weights_is_refused_and_one_without_its_parent_ends(model, tmp_path) -> None:
    other = make_tiny("llama", tmp_path, seed=5)
    async with cluster(model, Role.MIXED) as held:
        stranger = start(
            "instance",
            id="mixed-1",
            model=str(other),
            model_name=MODEL,
            controller=held.controller,
            role="mixed",
            kv_tokens=4096,
            log_level="error",
        )
        try:
            assert await stranger.ended() == 3
        finally:
            stranger.close()
        assert [m.ref.id for m in held.shell.members()] == ["mixed-0"]
        part = held.parts["mixed-0"]
        os.close(part.parent_write)
        assert await part.ended() == 0


@pytest.mark.parametrize(
    "trouble", [{"port": "taken"}, {"model": "/nowhere/to/be/found"}, {"transfer": "nccl"}], ids=lambda t: next(iter(t))
)
async def test_what_cannot_start_ends_at_once(model, trouble, capfd) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        settings = {"id": "x", "model": str(model), "model_name": MODEL, "controller": "127.0.0.1:1", "role": "mixed"}
        settings |= {"kv_tokens": 1024} | trouble
        if "port" in trouble:
            settings["port"] = holder.getsockname()[1]
        part = start("instance", **settings)
        try:
            assert await part.ended(30.0) == 2
        finally:
            part.close()
    errors = [line for line in capfd.readouterr().err.splitlines() if " error " in line]
    assert len(errors) == 1
    assert str(settings.get("port", next(iter(trouble.values())))) in errors[0]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
