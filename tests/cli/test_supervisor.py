"""Keeping children alive: scripted children in place of instances."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from distserve.launch import child as child_module
from distserve.launch import supervisor as supervisor_module
from distserve.launch.supervisor import StartFailed, Supervisor

PART = """
import json, os, signal, sys
behaviour, ready, parent = sys.argv[1], int(sys.argv[3]), int(sys.argv[5])
def tell(event, **facts):
    line = {"event": event, "kind": "instance", "id": "x", "pid": os.getpid()} | facts
    os.write(ready, (json.dumps(line) + "\\n").encode())
if behaviour == "cannot": sys.exit(2)
if behaviour == "breaks": sys.exit(1)
if behaviour == "stubborn": signal.signal(signal.SIGTERM, signal.SIG_IGN)
tell("bound", address="h:1"); tell("joined")
if behaviour == "dies": sys.exit(7)
if behaviour == "stubborn": signal.pause()
while os.read(parent, 1): pass
"""


@pytest.fixture(autouse=True)
def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``python -m distserve.cli X …`` becomes the part above, and pauses become short."""
    script = tmp_path / "part.py"
    script.write_text(PART)
    real = subprocess.Popen

    def start(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        return real([sys.executable, str(script), *command[3:]], **options)  # what follows python -m MODULE

    monkeypatch.setattr(child_module.subprocess, "Popen", start)
    monkeypatch.setattr(supervisor_module, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(child_module, "KILL_AFTER_S", 0.3)
    yield


def supervisor(behaviours: Mapping[str, Sequence[str]], changes: asyncio.Event, *, restart: bool = True) -> Supervisor:
    """Each name's n-th life behaves like its n-th word, the last for ever."""

    def arguments(words: Sequence[str]) -> Callable[[int], list[str]]:
        return lambda life: [words[min(life, len(words)) - 1]]

    return Supervisor(
        {name: arguments(words) for name, words in behaviours.items()},
        os.environ,
        restart=restart,
        changed=changes.set,
    )


async def until(changes: asyncio.Event, true: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not true():
            changes.clear()
            await changes.wait()


async def test_an_instance_that_dies_lives_again() -> None:
    changes = asyncio.Event()
    kept = supervisor({"a": ["dies", "dies", "lives"], "b": ["lives"]}, changes)
    running = asyncio.create_task(kept.run())
    await until(changes, lambda: kept.kept["a"].lives == 3 and kept.kept["a"].child and kept.kept["b"].joined)
    await until(changes, lambda: kept.kept["a"].facts.get("address") == "h:1")
    assert kept.kept["b"].lives == 1
    await kept.end(grace_s=0.0)
    await running
    assert not kept.alive


async def test_a_killed_instance_lives_again() -> None:
    changes = asyncio.Event()
    kept = supervisor({"a": ["lives"]}, changes)
    running = asyncio.create_task(kept.run())
    await until(changes, lambda: kept.kept["a"].joined)
    first = kept.kept["a"].child
    assert first is not None
    os.kill(first.pid, signal.SIGKILL)
    await until(changes, lambda: kept.kept["a"].lives == 2 and kept.kept["a"].facts)
    await kept.end(grace_s=0.0)
    await running


@pytest.mark.parametrize(("words", "lives"), [(["cannot"], 1), (["breaks"], 3), (["breaks", "cannot"], 2)])
async def test_an_instance_that_never_comes_up_ends_it_all(words: list[str], lives: int) -> None:
    kept = supervisor({"a": words, "b": ["lives"]}, asyncio.Event())
    with pytest.raises(StartFailed, match="instance a cannot start"):
        async with asyncio.timeout(20):
            await kept.run()
    assert kept.kept["a"].lives == lives
    assert not kept.alive, "its neighbour was not left behind"


async def test_without_restart_a_death_is_final() -> None:
    kept = supervisor({"a": ["dies"]}, asyncio.Event(), restart=False)
    async with asyncio.timeout(20):
        await kept.run()
    assert kept.kept["a"].lives == 1


async def test_one_that_ignores_sigterm_is_killed() -> None:
    changes = asyncio.Event()
    kept = supervisor({"a": ["stubborn"]}, changes)
    running = asyncio.create_task(kept.run())
    await until(changes, lambda: kept.kept["a"].joined)
    child = kept.kept["a"].child
    assert child is not None
    assert await child.end(grace_s=0.0) == -signal.SIGKILL
    await kept.end(grace_s=0.0)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_cancelling_leaves_nobody() -> None:
    changes = asyncio.Event()
    kept = supervisor({"a": ["stubborn"], "b": ["lives"]}, changes)
    running = asyncio.create_task(kept.run())
    await until(changes, lambda: kept.kept["a"].joined and kept.kept["b"].joined)
    pids = [k.child.pid for k in kept.kept.values() if k.child is not None]
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


async def test_a_child_whose_start_is_cancelled_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its process and its first line: nobody else knows of it yet."""
    pids: list[int] = []
    kill = os.killpg

    async def never(_fd: int) -> asyncio.StreamReader:
        opened.set()
        await asyncio.Event().wait()
        raise AssertionError("cancelled before")

    def killed(pid: int, number: signal.Signals) -> None:
        pids.append(pid)
        kill(pid, number)

    opened = asyncio.Event()
    monkeypatch.setattr(child_module, "_reader", never)
    monkeypatch.setattr(child_module.os, "killpg", killed)
    starting = asyncio.create_task(child_module.Child.start("a", ["stubborn"], os.environ))
    async with asyncio.timeout(20):
        await opened.wait()
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)
