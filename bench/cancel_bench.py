"""How long after a client's cancel its KV is free on both instances, by the phase in which the cancel came.

A real cluster: one prefill and one decode instance, gateway and controller, in processes of their own. A client cancels
its gRPC call; from that moment both instances are asked, every few milliseconds, what they hold for the request
(``Inspect``, answered between two steps). The time counts until both have answered "nothing". Phases:

- *queued*: the prefill pool is full; the request holds nothing yet and waits for room;
- *prefilling*: at a moment drawn anew each time, between submission and first token, of a prompt of several chunks;
- *waiting for a ticket*: prefilled, and the decode pool is full;
- *transferring*: between first and second token, at a moment drawn anew each time;
- *decoding*: some tokens after the hand-off.

A step that computes for nobody else is given up between two layers, so a cancel does not wait for its end.

    python bench/cancel_bench.py --write        200 of each, some six minutes on two cores
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import random
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import numpy as np
import orjson
from common import RESULTS, commit, write

from distserve.launch.cluster import Cluster
from distserve.launch.serve import SECRET_VARIABLE
from distserve.loadgen.machine import CpuWatch
from distserve.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc
from distserve.wire.secret import ClusterSecret, fresh
from distserve.wire.trust import Trust, method_path

GOAL_P99_S = 0.25
POLL_S = 0.005
WAIT_S = 30.0
POOL_TOKENS = 1024
HOG_TOKENS, LARGE_TOKENS, NEXT_TOKENS = 720, 320, 720
"""Prompts that fill the pools: the first and second do not fit the decode pool together, nor the second and third the
prefill pool."""
PROMPT_TOKENS, SHORT_TOKENS = 960, 256


@dataclass(slots=True)
class Asked:
    """One request of ours: its call, and how many tokens have come."""

    id: str
    call: Any
    tokens: int = 0
    ended: str = ""  # how, if not by us
    came: asyncio.Condition = field(default_factory=asyncio.Condition)
    reader: asyncio.Task[None] | None = None

    async def read(self) -> None:
        try:
            async for response in self.call:
                if response.HasField("delta"):
                    await self._note(len(response.delta.token_ids))
            await self._note(0, "it came to its end")
        except grpc.aio.AioRpcError as error:
            await self._note(0, f"{error.code()}: {error.details()}")
        except asyncio.CancelledError:
            await self._note(0, "it was cancelled")

    async def _note(self, tokens: int, ended: str = "") -> None:
        async with self.came:
            self.tokens += tokens
            self.ended = ended
            self.came.notify_all()

    async def has(self, tokens: int) -> None:
        """Until so many have come. RuntimeError when there will be no more."""
        async with asyncio.timeout(WAIT_S), self.came:
            await self.came.wait_for(lambda: self.ended or self.tokens >= tokens)
        if self.tokens < tokens:
            raise RuntimeError(f"request {self.id} was to have {tokens} tokens, but: {self.ended}")


class Client:
    """Asks the gateway, and both instances what they hold."""

    def __init__(self, inference: Any, instances: list[Any], trust: Trust, seed: int) -> None:
        self._inference = inference
        self._instances = instances
        self._trust = trust
        self.lots = random.Random(seed)
        self._numbers = itertools.count(1)

    def ask(self, prompt_tokens: int, max_tokens: int = 48) -> Asked:
        """Begin a request with a prompt that shares nothing with any other."""
        request_id = f"cancelled-{next(self._numbers)}"
        ids = [self.lots.randrange(100, 20000) for _ in range(prompt_tokens)]
        request = inference_pb2.GenerateRequest(
            request_id=request_id,
            token_ids=inference_pb2.TokenIds(ids=ids),
            sampling=inference_pb2.SamplingParams(temperature=0.0),
            stopping=inference_pb2.StoppingCriteria(max_tokens=max_tokens, ignore_eos=True),
        )
        asked = Asked(request_id, self._inference.Generate(request))
        asked.reader = asyncio.create_task(asked.read())
        return asked

    async def held(self, asked: Asked) -> list[list[Any]]:
        """What each instance holds for it, prefill first."""
        answers = await asyncio.gather(*map(self._inspect, self._instances))
        name = asked.id + "~"  # what the gateway adds makes it unique among gateways
        return [[each for each in answer.holdings if each.request_id.startswith(name)] for answer in answers]

    async def _inspect(self, instance: Any) -> Any:
        metadata, _ = self._trust.prove(method_path(control_pb2_grpc.InstanceServiceStub, "Inspect"))
        return await instance.Inspect(control_pb2.InspectRequest(), metadata=metadata, timeout=WAIT_S)

    async def until(self, asked: Asked, seen: Callable[[list[list[Any]]], bool]) -> None:
        """Ask until the instances hold what ``seen`` wants."""
        async with asyncio.timeout(WAIT_S):
            while not seen(await self.held(asked)):  # noqa: ASYNC110 – it happens in another process
                await asyncio.sleep(POLL_S)

    async def cancel(self, asked: Asked) -> float:
        """Cancel, and the seconds until nothing is held for it any more."""
        began = time.perf_counter()
        asked.call.cancel()
        await self.until(asked, lambda held: not any(held))
        seconds = time.perf_counter() - began
        assert asked.reader is not None
        await asked.reader
        return seconds


class Hog:
    """A request that keeps most of the decode pool, begun anew before it comes to its end."""

    MOST_TOKENS = 300

    def __init__(self, client: Client) -> None:
        self._client = client
        self._asked: Asked | None = None

    async def stands(self) -> None:
        if self._asked is not None and self._asked.tokens < self.MOST_TOKENS - 60:
            return
        await self.goes()
        self._asked = self._client.ask(HOG_TOKENS, self.MOST_TOKENS)
        await self._asked.has(2)

    async def goes(self) -> None:
        asked, self._asked = self._asked, None
        if asked is not None:
            await self._client.cancel(asked)


Round = AsyncIterator[dict[str, float]]


async def full_pools(client: Client) -> Round:
    """Two phases a round: one waits for the decode pool, and another for what that one holds of the prefill pool."""
    hog = Hog(client)
    try:
        while True:
            await hog.stands()
            first = client.ask(LARGE_TOKENS)
            await client.until(first, lambda held: any("ticket" in each.waits_for for each in held[0]))
            second = client.ask(NEXT_TOKENS)
            await client.until(second, lambda held: any(not each.blocks for each in held[0]))
            queued_s = await client.cancel(second)
            yield {"queued": queued_s, "waiting for a ticket": await client.cancel(first)}
    finally:
        await hog.goes()


async def prefilling(client: Client) -> Round:
    """A prompt of two chunks, cancelled before its first token."""
    whole_s = await _gap(client, PROMPT_TOKENS, 0)
    while True:
        asked = client.ask(PROMPT_TOKENS)
        await asyncio.sleep(client.lots.uniform(0.02, 0.95) * whole_s)
        early = asked.tokens == 0
        seconds = await client.cancel(asked)
        yield {"prefilling": seconds} if early else {}


async def transferring(client: Client) -> Round:
    """Cancelled after its first token, which leaves before the KV moves, and before its second."""
    gap_s = await _gap(client, SHORT_TOKENS, 1)
    while True:
        asked = client.ask(SHORT_TOKENS)
        await asked.has(1)
        await asyncio.sleep(client.lots.uniform(0.0, 0.8) * gap_s)
        early = asked.tokens == 1
        seconds = await client.cancel(asked)
        yield {"transferring": seconds} if early else {}


async def decoding(client: Client) -> Round:
    while True:
        asked = client.ask(SHORT_TOKENS)
        await asked.has(client.lots.randrange(3, 9))
        yield {"decoding": await client.cancel(asked)}


async def _gap(client: Client, prompt_tokens: int, tokens: int) -> float:
    """Median seconds from so many tokens to one more."""
    taken = []
    for _ in range(5):
        asked = client.ask(prompt_tokens)
        await asked.has(tokens)
        began = time.perf_counter()
        await asked.has(tokens + 1)
        taken.append(time.perf_counter() - began)
        await client.cancel(asked)
    return float(np.median(taken))


ROUNDS: dict[str, Callable[[Client], Round]] = {
    "full pools": full_pools,
    "prefilling": prefilling,
    "transferring": transferring,
    "decoding": decoding,
}


async def measure(cluster: Cluster, trust: Trust, args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds by phase, ``args.cancels`` of each that the chosen rounds give."""
    found: dict[str, list[float]] = {}
    parts = sorted(cluster.ready["instances"], key=lambda part: part["id"], reverse=True)  # prefill before decode
    async with contextlib.AsyncExitStack() as stack:
        channels = [
            await stack.enter_async_context(grpc.aio.insecure_channel(address))
            for address in (cluster.grpc_address, *(part["address"] for part in parts))
        ]
        client = Client(
            inference_pb2_grpc.InferenceServiceStub(channels[0]),
            [control_pb2_grpc.InstanceServiceStub(each) for each in channels[1:]],
            trust,
            args.seed,
        )
        for name in args.rounds:
            rounds = await stack.enter_async_context(contextlib.aclosing(ROUNDS[name](client)))
            done, began = 0, time.perf_counter()
            async for times in rounds:
                for phase, seconds in times.items():
                    found.setdefault(phase, []).append(seconds)
                done += bool(times)
                if done == args.cancels:
                    break
            await rounds.aclose()
            print(f"{name}: {done} rounds in {time.perf_counter() - began:.0f} s", file=sys.stderr)
    return found


def summary(seconds: list[float]) -> dict[str, float]:
    p50, p99 = np.percentile(seconds, (50, 99))
    return {
        "cancels": len(seconds),
        "p50_ms": round(float(p50) * 1e3, 1),
        "p99_ms": round(float(p99) * 1e3, 1),
        "worst_ms": round(max(seconds) * 1e3, 1),
    }


def earlier(settings: dict[str, Any]) -> dict[str, Any]:
    """The phases that the result file has already of this commit and these settings: one run need not do all."""
    path = RESULTS / "cancel.json"
    if not path.exists():
        return {}
    before = orjson.loads(path.read_bytes())
    same = before["commit"] == commit() and before["settings"] == settings
    return dict(before["phases"]) if same else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=1, help="of each instance")
    parser.add_argument("--cancels", type=int, default=200, help="of each phase")
    parser.add_argument("--rounds", nargs="+", choices=[*ROUNDS], default=[*ROUNDS])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="write bench/results/cancel.json")
    args = parser.parse_args()
    arguments = [
        *("--model", args.model, "--dtype", args.dtype, "--prefill", "1", "--decode", "1"),
        *("--threads-per-rank", str(args.threads), "--kv-tokens", str(POOL_TOKENS), "--log-level", "warning"),
    ]
    secret = fresh()
    with Cluster(arguments, environ=os.environ | {SECRET_VARIABLE: secret}) as cluster:
        watch = CpuWatch(tuple(cluster.ready["pids"]))
        found = asyncio.run(measure(cluster, Trust(secret=ClusterSecret([secret])), args))
        cores = watch.stop()
    phases = {phase: summary(seconds) | {"cores": cores} for phase, seconds in sorted(found.items())}
    for phase, row in phases.items():
        print(f"{phase:22} {row['cancels']:5} cancels   p50 {row['p50_ms']:7.1f} ms   p99 {row['p99_ms']:7.1f} ms")
    if args.write:
        settings = {"model": args.model, "dtype": args.dtype, "threads": args.threads, "seed": args.seed}
        settings |= {"kv_tokens": POOL_TOKENS, "poll_s": POLL_S}
        write("cancel", {"goal_p99_ms": GOAL_P99_S * 1e3, "settings": settings, "phases": earlier(settings) | phases})


if __name__ == "__main__":
    main()
