"""The other ranks of an instance, as rank 0 drives them: steps and orders go out, tokens and stage events come in.

One thread reads each link and blocks while nothing comes. The end of a link, a rank's last words or an answer that
does not come are the end of the instance: ``lost`` is told, once, with a sentence. Knows no model and no block.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from distserve.core.types import StepPlan, Token
from distserve.instance.ranks.frames import Order, moved_of, order_frame, step_frame, tokens_of
from distserve.instance.ranks.link import LinkClosed, RankLink
from distserve.kv.shard import Parallel
from distserve.transfer import MoverEvent
from distserve.v1 import ranks_pb2 as pb
from distserve.wire.convert import WireError

log = logging.getLogger(__name__)
T = TypeVar("T")


class RankLost(RuntimeError):
    """A rank is gone, or does not answer; the instance cannot go on."""


@dataclass(frozen=True, slots=True)
class Fallen:
    """What waits for a rank finds this when it is lost."""

    why: str


class Crew:
    """See the module. ``lost`` and ``report`` are called from the reading threads and must be quick.

    ``asked`` is called when a rank was told to stop (SIGTERM): the instance should drain.
    """

    def __init__(
        self,
        links: Mapping[int, RankLink],
        parallel: Parallel,
        timeout_s: float,
        *,
        lost: Callable[[str], None],
        asked: Callable[[], None],
        report: Callable[[int, MoverEvent], None],
    ) -> None:
        self._links = dict(links)
        self._parallel = parallel
        self._timeout_s = timeout_s
        self._lost, self._asked, self._report = lost, asked, report
        self._ready: queue.SimpleQueue[tuple[int, pb.RankReady] | Fallen] = queue.SimpleQueue()
        self._tokens: queue.SimpleQueue[pb.RankTokens | Fallen] = queue.SimpleQueue()
        self._acks: queue.SimpleQueue[int | Fallen] = queue.SimpleQueue()
        self._numbers = itertools.count(1)
        self._ordering = threading.Lock()
        self._turn = threading.Lock()
        self._fallen: Fallen | None = None
        self._closing = False
        self._threads = [
            threading.Thread(target=self._read, args=each, name=f"rank {each[0]}", daemon=True)
            for each in self._links.items()
        ]
        for thread in self._threads:
            thread.start()

    def ready(self, timeout_s: float) -> dict[int, pb.RankReady]:
        """Wait until every rank has loaded its share. RankLost."""
        found: dict[int, pb.RankReady] = {}
        deadline = time.monotonic() + timeout_s
        while len(found) < len(self._links):
            rank, facts = self._wait(self._ready, deadline - time.monotonic(), "a rank did not load its share")
            found[rank] = facts
        return found

    def start(self, plan: StepPlan) -> None:
        """Have every rank run its part of a step. RankLost."""
        bare = step_frame(plan, sampling=False)
        sampler = self._parallel.sampler
        for rank, link in self._links.items():
            self._send(rank, link, step_frame(plan, sampling=True) if rank == sampler else bare)

    def tokens(self, number: int) -> list[Token]:
        """Wait for what the sampling rank chose in a step. RankLost."""
        said = self._wait(self._tokens, self._timeout_s, f"step {number} did not end")
        if said.number != number:
            self.fall(f"a rank answered to step {said.number} when {number} was run")
            raise RankLost(f"step {number} was not answered")
        return tokens_of(said)

    def order(self, order: Order, *, wait: bool) -> None:
        """Tell every rank's data plane; if asked to, return when all have done it. RankLost."""
        with self._ordering:
            number = next(self._numbers) if wait else 0
            frame = order_frame(number, order)
            for rank, link in self._links.items():
                self._send(rank, link, frame)
            for _ in self._links if wait else ():
                if self._wait(self._acks, self._timeout_s, "an order was not carried out") != number:
                    self.fall("a rank answered to an order that was not given")
                    raise RankLost("the ranks are out of step")

    def fall(self, why: str) -> None:
        """The instance cannot go on. Whoever waits for a rank hears of it; so does ``lost``, the first time."""
        with self._turn:
            first, self._fallen = self._fallen is None, self._fallen or Fallen(why)
        if self._closing:
            return
        for waiting in (self._ready, self._tokens, self._acks):
            waiting.put(self._fallen)
        if first:
            self._lost(why)
        else:
            log.warning("%s", why)

    def close(self) -> None:
        """Let every rank end. Idempotent."""
        self._closing = True
        for link in self._links.values():
            link.close()
        for thread in self._threads:
            thread.join(self._timeout_s)

    def _wait(self, waiting: queue.SimpleQueue[T | Fallen], timeout_s: float, else_why: str) -> T:
        """The next item of a queue; RankLost, and the end of the instance, when a rank is lost or none comes."""
        try:
            said = waiting.get(timeout=max(0.0, timeout_s))
        except queue.Empty:
            why = f"{else_why} within {max(0.0, timeout_s):.0f} s; a rank hangs"
            self.fall(why)
            raise RankLost(why) from None
        if isinstance(said, Fallen):
            waiting.put(said)
            raise RankLost(said.why)
        return said

    def _send(self, rank: int, link: RankLink, frame: pb.RankFrame) -> None:
        try:
            link.send(frame)
        except LinkClosed as error:
            self.fall(f"rank {rank} is gone: {error}")
            raise RankLost(f"rank {rank} is gone: {error}") from None

    def _read(self, rank: int, link: RankLink) -> None:
        """Hear one rank until it ends."""
        try:
            while True:
                self._take(rank, link.receive())
        except LinkClosed as error:
            self.fall(f"rank {rank} is gone: {error}")
        except (ValueError, WireError) as error:
            self.fall(f"rank {rank} said what cannot be: {error}")

    def _take(self, rank: int, frame: pb.RankFrame) -> None:
        match frame.WhichOneof("kind"):
            case "tokens":
                self._tokens.put(frame.tokens)
            case "ack":
                self._acks.put(frame.ack.number)
            case "moved":
                self._report(rank, moved_of(frame.moved))
            case "ready":
                self._ready.put((rank, frame.ready))
            case "failed" if frame.failed.asked:
                self._asked()
            case "failed":
                self.fall(f"rank {rank} cannot go on: {frame.failed.message}")
            case other:
                raise ValueError(f"a frame of kind {other}")
