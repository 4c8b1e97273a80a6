"""Clusters whose instances are of several ranks, cut differently on the two sides: real processes, gloo, deaths."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import select
import signal
import socket
import sys
from pathlib import Path

import pytest

from distserve.core.types import Role
from tests.oracle import Oracle
from tests.shells.cluster import ROOT, Cluster, answer, cluster, request, start
from tests.tiny_models import VOCAB_SIZE, make_tiny

P, D = Role.PREFILL, Role.DECODE
OUTPUT = 16
DEADLINE_S = 60.0
"""For a death to be noticed on a busy machine; the product's own deadlines are far shorter."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("qwen3", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def oracle(model: Path) -> Oracle:
    return Oracle(model)


def prompts(seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, VOCAB_SIZE) for _ in range(n)] for n in (5, 40, 131, 200)]


async def check(held: Cluster, oracle, seed: int) -> None:
    """Requests together; tokens are those of transformers, KV bytes moved, and every block is free afterwards."""
    asked = prompts(seed)
    work = (answer(held.shell, request(f"s{seed}-{i}", p, OUTPUT)) for i, p in enumerate(asked))
    for prompt, (tokens, end) in zip(asked, await asyncio.gather(*work), strict=True):
        assert tokens == oracle(prompt, OUTPUT)
        assert end.account.timings.kv_bytes_moved > 0
    await held.clean()


def children(pid: int) -> list[int]:
    """Processes that this one started and that run, in the order of their numbers."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(parent) == pid and state != "Z":
                found.append(int(entry.name))
    return sorted(found)


def wait_for_end(pids: list[int]) -> None:
    """Wait until these processes, which are not ours, have ended."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            fd = os.pidfd_open(pid)
            ended = select.select([fd], [], [], DEADLINE_S)[0]
            os.close(fd)
            assert ended, f"process {pid} still runs"


async def test_p_tp2_to_d_tp1_and_a_rank_that_dies(model, oracle) -> None:
    """Chunks are sent while the rest is read. A rank that is killed in the middle of a step takes its instance down,
    long before any deadline; a fresh one goes on.
    """
    settings = {P: {"tp": 2, "machine": {"prefill_chunk": 48}}}
    async with cluster(model, P, D, transfer="gloo", by_role=settings) as held:
        await check(held, oracle, 1)
        rank = children(held.parts["prefill-0"].pid)
        assert len(rank) == 1
        os.kill(rank[0], signal.SIGSTOP)
        prompt = prompts(7)[2]
        going = asyncio.create_task(answer(held.shell, request("going", prompt, OUTPUT)))
        await asyncio.sleep(0.5)  # rank 0 has begun the step, and waits for its other half
        os.kill(rank[0], signal.SIGKILL)
        assert await held.parts["prefill-0"].ended(DEADLINE_S) == 1
        await held.start("prefill-0", P).said("joined")
        tokens, _ = await going
        assert tokens == oracle(prompt, OUTPUT)
        await check(held, oracle, 2)


async def test_p_tp1_to_d_tp2_and_a_death_of_rank_0(model, oracle) -> None:
    """Over shared memory. The other rank never outlives rank 0; its streams go on with a fresh life."""
    async with cluster(model, P, D, transfer="shm", by_role={D: {"tp": 2}}) as held:
        await check(held, oracle, 3)
        prompt = prompts(4)[1]
        going = asyncio.create_task(answer(held.shell, request("long", prompt, 120)))
        ranks = children(held.parts["decode-1"].pid)
        held.parts["decode-1"].process.kill()
        await asyncio.to_thread(wait_for_end, ranks)
        await held.start("decode-1", D).said("joined")
        tokens, _ = await going
        assert tokens == oracle(prompt, 120)
        await held.clean()


async def test_p_tp2_pp2_to_d_pp2_and_a_rank_that_hangs(model, oracle) -> None:
    """Six ranks; the decode instance's are placed by the environment, as torchrun and Kubernetes do."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    placed = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    settings = {P: {"tp": 2, "pp": 2, "rank_timeout_s": 10.0}, D: {"pp": 2, "environ": placed | {"RANK": "0"}}}
    other = start(
        "instance",
        environ=placed | {"RANK": "1"},
        id="decode-1",
        model=str(model),
        model_name="tiny",
        controller="127.0.0.1:1",
        role="decode",
        pp=2,
    )
    try:
        async with cluster(model, P, D, transfer="gloo", by_role=settings) as held:
            await check(held, oracle, 5)
            ranks = children(held.parts["prefill-0"].pid)
            assert len(ranks) == 3
            os.kill(ranks[2], signal.SIGSTOP)  # of the last stage: the others wait for it
            stream = await held.shell.submit(request("late", prompts(6)[1], OUTPUT), 0.0)
            hanging = held.parts.pop("prefill-0")
            assert await hanging.ended(DEADLINE_S) == 1
            hanging.close()
            await asyncio.to_thread(wait_for_end, ranks)
            await stream.aclose()
        assert await other.ended(DEADLINE_S) == 0
    finally:
        other.close()


@pytest.mark.parametrize(
    ("settings", "environ", "words"),
    [
        ({"tp": 3}, {}, "--tp 3 does not divide the model's 4 attention heads"),
        ({"tp": 2}, {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, "is 2 ranks, but"),
        ({"tp": 2}, {"RANK": "0"}, "set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"),
    ],
)
async def test_what_cannot_be_is_said_in_a_sentence(model, settings, environ, words) -> None:
    code = (
        "import json, sys\nfrom distserve.instance.options import InstanceOptions\n"
        "from distserve.instance.process import main\n"
        "sys.exit(main(InstanceOptions(**json.loads(sys.argv[1]))))"
    )
    options = {"id": "i", "model": str(model), "model_name": "tiny", "controller": "127.0.0.1:1"} | settings
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        code,
        json.dumps(options),
        cwd=ROOT,
        env=os.environ | environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
        stderr=asyncio.subprocess.PIPE,
    )
    _, said = await asyncio.wait_for(process.communicate(), DEADLINE_S)
    assert process.returncode == 2
    assert words in said.decode() and "Traceback" not in said.decode()
