"""What an instance shows of itself over HTTP: /metrics, /livez and /readyz on its operations port.

Counts as the step loop goes (``observer``); queues and KV are read when somebody asks, between two steps.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from prometheus_client import CollectorRegistry

from distserve.core.types import Load, Member
from distserve.instance.inbox import Inbox
from distserve.observe.exposition import OpsServer, ProcessCost, text
from distserve.observe.metrics import InstanceMetrics
from distserve.sched.instance import InstanceState

ANSWER_S = 2.0
"""How long a scrape waits for the step that runs; then it shows what was last known."""


class Operations:
    """See the module. ``alive`` as long as the step loop runs; ``ready`` once the controller took the instance in."""

    def __init__(self, member: Member, machine: InstanceState, inbox: Inbox) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(ProcessCost(member.ref.id))
        self.observer = InstanceMetrics(
            self._registry, model_name=member.spec.name, instance=member.ref.id, role=member.role
        )
        self._machine = machine
        self._inbox = inbox
        self._server = OpsServer(self._exposition, alive=lambda: not self._inbox.closed, ready=lambda: self.ready)
        self.ready = False

    async def start(self, host: str, port: int) -> int:
        """Listen; returns the port. Raises ``OSError`` when it is in use."""
        return await self._server.start(host, port)

    async def stop(self) -> None:
        await self._server.stop()

    async def _exposition(self) -> bytes:
        try:
            async with asyncio.timeout(ANSWER_S):
                load, by_state = await asyncio.wrap_future(self._inbox.ask(self._look))
            self.observer.set_load(load)
            self.observer.set_kv(by_state)
        except TimeoutError:
            pass  # a long step: the rest of the page is no less true
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise  # else: the loop has ended and cancelled the question
        return text(self._registry)

    def _look(self) -> tuple[Load, Mapping[str, int]]:
        counts = self._machine.residents.ledger.counts()
        return self._machine.load(), {str(state): count for state, count in counts.items()}
