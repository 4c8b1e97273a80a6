"""One process of the cluster under chaos: ``python -m tests.chaos.part instance '{"id": …}'``.

As ``tests.shells.part``, but for an instance that can be made to fail from inside, by signals, so that the product
needs no such door: SIGUSR1 flips a byte of the next piece in staging, after its checksum was taken; SIGUSR2 lets the
next step hang for ever. What came of it is told on the ready descriptor.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import faulthandler
import json
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from distserve.core.types import Role, Ticket
from distserve.engine.runner import Engine
from distserve.instance import process
from distserve.instance.options import InstanceOptions
from distserve.observe.log import set_up
from distserve.sched.config import InstanceConfig
from distserve.transfer import FaultInjector, MoverEvent, TransferConfig
from distserve.transfer import events as mover_events
from distserve.wire.life import Ending, tell
from distserve.wire.loop import run_loop
from tests.shells import part

FLIP, HANG, SHOW = signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT


class Flips(FaultInjector):
    """Flips one bit of as many pieces as it was told to."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.due = 0
        self._say = say

    def on_staged(self, ticket: Ticket, index: int, staged: Any) -> None:
        if self.due > 0:
            self.due -= 1
            staged[len(staged) // 3] ^= 16
            self._say("flipped")


class FragileInstance(process.InstanceProcess):
    """An instance with a byte flipper before its links and a brake on its engine."""

    def __init__(self, options: InstanceOptions) -> None:
        super().__init__(options)
        self.flips = Flips(self.say)
        self.hang = threading.Event()

    def say(self, event: str) -> None:
        tell(self._options.ready_fd, event, "instance", self._options.id)

    def _transfer(self) -> TransferConfig:
        return dataclasses.replace(super()._transfer(), faults=self.flips)

    async def _load(self, ending: Ending) -> Engine:
        engine = await super()._load(ending)
        wait = engine.wait

        def braked() -> Any:
            if self.hang.is_set():
                self.say("hangs")
                threading.Event().wait()
            return wait()

        engine.wait = braked  # type: ignore[method-assign]
        return engine


def show_stacks(*_: Any) -> None:
    """Where every thread and task is, on stderr: asked for when a process does not end."""
    faulthandler.dump_traceback(all_threads=True)
    with contextlib.suppress(RuntimeError):
        for task in asyncio.all_tasks():
            task.print_stack(limit=8)


def main(settings: dict[str, Any]) -> int:
    """Run a fragile instance; returns its exit code."""
    settings |= {"machine": InstanceConfig(**settings.get("machine", {})), "role": Role(settings["role"])}
    options = InstanceOptions(**settings)
    set_up(f"instance {options.id}", options.log_level)
    instance = FragileInstance(options)

    def flip(*_: Any) -> None:
        instance.flips.due += 1

    heard = process.stage_event

    def hearing(event: MoverEvent) -> Any:
        if isinstance(event, mover_events.StageCorrupt):
            instance.say("caught")
        return heard(event)

    process.stage_event = hearing  # type: ignore[assignment]
    signal.signal(FLIP, flip)
    signal.signal(HANG, lambda *_: instance.hang.set())
    return run_loop(instance.run())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=("instance", "controller", "gateway"))
    parser.add_argument("settings", type=json.loads)
    parser.add_argument("--ready-fd", type=int)
    parser.add_argument("--parent-fd", type=int)
    given = parser.parse_args()
    signal.signal(SHOW, show_stacks)
    options = given.settings | {"ready_fd": given.ready_fd, "parent_fd": given.parent_fd}
    sys.exit(main(options) if given.kind == "instance" else part.main(given.kind, options))
