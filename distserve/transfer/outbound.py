"""The source's end towards one instance: a queue of stages and a thread that sends them in order, over one link at a
time.

The link is dialled when a stage needs it and dropped on any trouble, which fails every stage that waits for it; the
next stage dials anew, one generation later. Pool bytes are read only under a move's ``Reading``, so that an abort is a
fence. While there is nothing to send the thread waits on the queue; it ends, and the link with it, after ``idle_s``.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from distserve.core.types import InstanceRef
from distserve.kv.shard import Parallel, Route
from distserve.transfer.channel import Channel
from distserve.transfer.config import TransferConfig
from distserve.transfer.counts import Counts
from distserve.transfer.errors import NoTicket, TransferError
from distserve.transfer.events import MoverEvent, Reason, StageFailed, StageSent
from distserve.transfer.handshake import dial
from distserve.transfer.identity import Identity
from distserve.transfer.sender import Aborted, Ended, Sender, Stage
from distserve_kernels.cores import keep_to
from distserve_kernels.kv_part import PagedPart
from distserve_kernels.streams import own_stream


class Outbound:
    """All that goes from this rank to one rank of another instance. Thread-safe.

    ``route`` says which, and what part of the KV; ``pool`` is that part; ``parallel`` is the other's layout.
    """

    def __init__(
        self,
        me: Identity,
        destination: InstanceRef,
        route: Route,
        parallel: Parallel,
        pool: PagedPart,
        report: Callable[[MoverEvent], None],
        counts: Counts,
        config: TransferConfig,
    ) -> None:
        self._me = me
        self._destination = destination
        self._route = route
        self._parallel = parallel
        self._pool = pool
        self._report = report
        self._counts = counts
        self._config = config
        self._turn = threading.Condition()
        self._waiting: deque[Stage] = deque()
        self._closed: Reason | None = None
        self._channel: Channel | None = None  # to interrupt
        self._generation = 0
        self.thread: threading.Thread | None = None

    def submit(self, stage: Stage) -> None:
        """Queue a stage; after ``close`` it fails at once."""
        with self._turn:
            if self._closed is None:
                self._waiting.append(stage)
                if self.thread is None:
                    self.thread = threading.Thread(target=self._run, name=f"kv-out {self._me.ref}", daemon=True)
                    self.thread.start()
                self._turn.notify()
                return
        self._fail(stage, self._closed, f"the link to {self._destination} is closed")

    def close(self, reason: Reason) -> None:
        """Break the link, fail what waits, end the thread soon. From any thread, any number of times."""
        with self._turn:
            self._closed = self._closed or reason
            if self._channel is not None:
                self._channel.interrupt()
            self._turn.notify()

    def _run(self) -> None:
        keep_to(self._config.cores)
        with own_stream(self._me.device):
            self._send_all()

    def _send_all(self) -> None:
        sender: Sender | None = None
        while True:
            stage = self._next()
            if stage is None:
                self._drop(sender)
                sender = None
                if self._retire():
                    return
                continue
            try:
                if sender is None or not sender.link.channel.is_open():
                    sender = self._renew(sender, stage)
                self._send(sender, stage)
            except NoTicket as error:  # the link's fault it is not: what waits behind has tickets of its own
                self._drop(sender)
                sender = None
                self._fail(stage, error.reason, str(error))
            except TransferError as error:
                self._drop(sender)
                sender = None
                self._fail_all(stage, error.reason, str(error))
            except Exception as error:  # a fault of ours: say so, and let nobody wait for these stages for ever
                self._drop(sender)
                with self._turn:
                    self.thread = None
                self._fail_all(stage, Reason.INTERNAL, f"{type(error).__name__}: {error}")
                raise

    def _next(self) -> Stage | None:
        """The next stage that is still wanted; None when closed, or idle for ``idle_s``."""
        with self._turn:
            while self._turn.wait_for(lambda: self._waiting or self._closed, self._config.idle_s):
                if self._closed is not None:
                    return None
                stage = self._waiting.popleft()
                if not stage.reading.aborted:
                    return stage
            return None

    def _retire(self) -> bool:
        """Whether the thread may end: nothing waits, or all that waits fails because of ``close``."""
        with self._turn:
            if self._closed is None and self._waiting:
                return False
            rest = list(self._waiting)
            self._waiting.clear()
            if self._closed is None:
                self.thread = None
        for stage in rest:
            self._fail(stage, self._closed or Reason.CLOSED, f"the link to {self._destination} was closed")
        return True

    def _renew(self, old: Sender | None, stage: Stage) -> Sender:
        self._drop(old)
        self._generation += 1
        link = dial(
            self._me,
            stage.ticket,
            stage.address,
            self._generation,
            self._config,
            self._opened,
            self._route,
            self._parallel,
        )
        self._counts.add(f"links_out_{link.kind}")
        return Sender(link, self._pool, self._config)

    def _opened(self, channel: Channel) -> None:
        with self._turn:
            self._channel = channel
            if self._closed is not None:
                channel.interrupt()

    def _drop(self, sender: Sender | None) -> None:
        with self._turn:
            self._channel = None
        if sender is not None:
            sender.close()

    def _send(self, sender: Sender, stage: Stage) -> None:
        began = time.monotonic()
        try:
            nbytes = sender.send(stage)
        except Aborted:
            self._counts.add("stages_aborted")
        except Ended as end:
            self._fail(stage, end.reason, end.detail)
        else:
            self._counts.add("stages_sent")
            self._counts.add("bytes_sent", nbytes)
            if not stage.reading.aborted:
                seconds = time.monotonic() - began
                self._report(StageSent(stage.ticket.move_id, stage.start, stage.end, nbytes, seconds))

    def _fail_all(self, stage: Stage, why: Reason, detail: str) -> None:
        """The link broke: so does everything that waits for it."""
        with self._turn:
            stages = [stage, *self._waiting]
            self._waiting.clear()
            reason = self._closed or why
        self._counts.add(f"links_out_ended_{reason}")
        for each in stages:
            self._fail(each, reason, detail)

    def _fail(self, stage: Stage, reason: Reason, detail: str) -> None:
        if stage.reading.aborted:
            return
        self._counts.add(f"stages_failed_{reason}")
        self._report(StageFailed(stage.ticket.move_id, reason, reason.retriable, stage.start, stage.end, detail))
