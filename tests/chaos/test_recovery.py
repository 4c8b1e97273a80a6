"""Recovery, one promise a test, with real processes: who may die or be cut off, and what nobody notices then."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from distserve.core.types import Role
from tests.chaos.asking import LONGEST_ANSWER, Ask, Asker, Known, oracle
from tests.chaos.cluster import CONTROLLER, MODEL, ROOT, ChaosCluster, chaos_cluster
from tests.chaos.part import FLIP, HANG
from tests.chaos.proxy import Trouble
from tests.chaos.waiting import within
from tests.tiny_models import make_tiny

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]
P, D, M = "prefill-0", "decode-1", "mixed-2"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def known(model: Path) -> list[Known]:
    return oracle(model, 8, seed=3)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def cluster(model: Path) -> AsyncIterator[ChaosCluster]:
    async with chaos_cluster(model, Role.PREFILL, Role.DECODE, Role.MIXED) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module", autouse=True)
async def _settled(cluster: ChaosCluster) -> None:
    """One test's wounds are healed before the next."""
    await cluster.settled()


class Clients:
    """Requests of the longest kind; ``under_way`` once each was heard of, or has ended."""

    def __init__(self, cluster: ChaosCluster, known: list[Known], first: int, count: int = 8) -> None:
        self._heard: set[int] = set()
        self._all = asyncio.Event()
        self._count = count
        self.asker = Asker(cluster, self._progress)
        asks = [Ask(first + n, known[n % len(known)], LONGEST_ANSWER, n / count) for n in range(count)]
        self.ends = asyncio.gather(*(self.asker.ask(ask) for ask in asks))

    def _progress(self, number: int, tokens: int) -> None:
        self._heard.add(number)
        if len(self._heard) == self._count:
            self._all.set()

    async def under_way(self) -> None:
        await self._all.wait()

    async def exact(self) -> None:
        """Every answer was exactly the model's, whatever happened."""
        ends = set(await self.ends)
        assert ends == {"exact"}, self.asker.tally.sentences
        assert self.asker.tally.violations == []


@pytest.mark.parametrize("victim", [P, D, M])
async def test_an_instance_dies_and_its_requests_go_on_elsewhere(
    cluster: ChaosCluster, known: list[Known], victim: str
) -> None:
    clients = Clients(cluster, known, 100)
    await clients.under_way()
    life = cluster.parts[victim].lives
    cluster.parts[victim].signal(signal.SIGKILL)
    await clients.exact()
    await cluster.parts[victim].came_back(life)
    await cluster.clean()


async def test_the_controller_dies_and_nothing_in_flight_is_harmed(cluster: ChaosCluster, known: list[Known]) -> None:
    controller = cluster.parts[CONTROLLER]
    flying = Clients(cluster, known, 200)
    await flying.under_way()
    life = controller.lives
    controller.may_live.clear()
    controller.signal(signal.SIGKILL)
    await flying.exact()
    assert flying.asker.tally.resumed == 0
    await controller.until(lambda k: k.child is None, 20, "dead")
    bypassing = Clients(cluster, known, 300)
    await bypassing.exact()  # with no controller at all
    joins = {name: cluster.parts[name].told["joined"] for name in cluster.instances}
    controller.may_live.set()
    await controller.came_back(life)
    for name, before in joins.items():  # rebuilt from what the instances say
        await cluster.parts[name].until(lambda k, before=before: k.told["joined"] > before, 30, "a member again")
    assert {i.state for i in await cluster.members("gateway-0")} == {"ready"}
    after = Clients(cluster, known, 400)
    await after.exact()
    assert after.asker.tally.resumed == 0
    await cluster.clean()


async def test_a_gateway_dies_and_what_it_asked_for_is_freed_everywhere(
    cluster: ChaosCluster, known: list[Known]
) -> None:
    gateway = cluster.parts["gateway-0"]
    clients = Clients(cluster, known, 500, count=16)
    await clients.under_way()
    life = gateway.lives
    gateway.may_live.clear()
    gateway.signal(signal.SIGKILL)
    ends = await clients.ends
    assert set(ends) <= {"exact", "its gateway died"}
    assert clients.asker.tally.violations == []
    await gateway.until(lambda k: k.child is None, 20, "dead")
    ledgers = [i for i in await cluster.ledgers("gateway-1") if not i.idle_and_clean]
    while ledgers:  # bounded by the test's own limit: streams break, instances free
        await asyncio.sleep(0.1)
        ledgers = [i for i in await cluster.ledgers("gateway-1") if not i.idle_and_clean]
    gateway.may_live.set()
    await gateway.came_back(life)


async def test_a_partition_between_two_instances_only_ends_their_moves(
    cluster: ChaosCluster, known: list[Known]
) -> None:
    ways = [proxies[name] for proxies in (cluster.control, cluster.data) for name in (P, D)]
    troubles = [Trouble(dialler=other, hold=True) for other in (D, P, D, P)]
    before = Clients(cluster, known, 600)
    await before.under_way()
    held = [way.trouble(trouble) for way, trouble in zip(ways, troubles, strict=True)]
    for each in held:
        each.__enter__()
    try:
        during = Clients(cluster, known, 700)
        await before.exact()
        await during.exact()  # by way of the mixed instance, once the silence is found out
        assert {(i.state, i.connected) for i in await cluster.members("gateway-0")} == {("ready", True)}
    finally:
        for each in held:
            each.__exit__(None, None, None)
    await cluster.clean()


async def every_flip_caught(cluster: ChaosCluster) -> None:
    while True:
        told = sum((part.told for part in cluster.parts.values()), Counter[str]())
        if told["caught"] == told["flipped"]:
            return
        await asyncio.sleep(0.05)


async def test_a_byte_flipped_in_staging_is_caught_and_never_becomes_a_token(
    cluster: ChaosCluster, known: list[Known]
) -> None:
    for number in range(1, 4):
        cluster.parts[P].signal(FLIP)
        clients = Clients(cluster, known, 800 + 20 * number, count=16)
        await clients.exact()
        assert cluster.parts[P].told["flipped"] == number
        await within(20, every_flip_caught(cluster))
    await cluster.clean()


async def test_a_step_that_hangs_ends_the_instance_though_its_heartbeats_go_on(
    cluster: ChaosCluster, known: list[Known]
) -> None:
    life = cluster.parts[D].lives
    cluster.parts[D].signal(HANG)
    clients = Clients(cluster, known, 900, count=12)
    await clients.exact()
    assert cluster.parts[D].told["hangs"] == 1
    await cluster.parts[D].came_back(life)
    assert cluster.parts[D].codes[-1] == 1
    await cluster.clean()


STRANGER = "import sys, distserve; {tweak}; from distserve.cli import main; sys.exit(main())"


@pytest.mark.parametrize(
    ("tweak", "seed", "words"),
    [
        ("distserve.__version__ = '0.0.1'", 0, ("stranger#", "speaks version '0.0.1', this controller speaks")),
        ("pass", 7, ("stranger#", f"serves {MODEL!r} with weights", r"but (prefill|decode|mixed)-\d#", "that name")),
    ],
)
async def test_who_does_not_fit_is_refused_with_a_sentence_that_names_both(
    cluster: ChaosCluster, tmp_path: Path, tweak: str, seed: int, words: tuple[str, ...]
) -> None:
    """Another version, or other weights under the same name: exit code 3, and the cluster goes on."""
    other = make_tiny("llama", tmp_path, seed=seed)
    flags = {"id": "stranger", "model": other, "model-name": MODEL, "controller": cluster.uplinks[P].address}
    arguments = [part for flag, value in flags.items() for part in (f"--{flag}", str(value))]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", STRANGER.format(tweak=tweak), "instance", *arguments, "--kv-tokens", "512"),
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / each) for each in ("", "kernels", "planner"))},
    )
    _, said = await process.communicate()
    assert process.returncode == 3, said.decode()
    for each in words:
        assert re.search(each, said.decode())
    assert {i.id for i in await cluster.members("gateway-0")} == {P, D, M}
