"""The clients: they submit, read, leave when they like, and know every right token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from distserve.core.effects import Account, Complete, Deliver, Fail
from distserve.core.events import ClientCancelled, Submitted
from distserve.core.types import Code, FinishReason
from distserve.sched.config import ClusterConfig, GatewayConfig, InstanceConfig
from tests.faults.heap import Heap
from tests.faults.plan import Client, Plan
from tests.faults.process import Process, Watch
from tests.faults.properties import Property, Violation
from tests.faults.truth import EOS, Truth

LONG_S = 120.0
"""With a timeout this long a request comes through even a full cluster, as long as nothing breaks."""

WAIT_S = InstanceConfig().reserve_timeout_s + GatewayConfig().patience_s + ClusterConfig().lease_s
"""Once faults are over no client waits longer for a word: one reservation given up, one instance found dead, and the
line for another place."""


@dataclass
class Reader:
    """One client's view of one request."""

    client: Client
    truth: Truth
    submitted_at: float = -1.0
    gateway_life: int = 0
    received: int = 0
    cancelled: FinishReason | None = None  # what its client ended it as
    end: str = ""  # empty while open
    ended_at: float = 0.0
    last_word: float = 0.0

    @property
    def open(self) -> bool:
        return self.submitted_at >= 0 and not self.end


class ClientCrowd:
    """All clients. Raises at the first wrong, missing, repeated or late word."""

    def __init__(self, plan: Plan, heap: Heap, watcher: Watch, ended: Callable[[str], None]) -> None:
        self.plan = plan
        self.heap = heap
        self.note = watcher.note
        self.coverage = watcher.coverage
        self.ended = ended
        self.processes: dict[str, Process] = {}
        self.phases_of: Callable[[str], list[str]] = lambda _: []
        self.readers: dict[str, Reader] = {}
        self.last_submit = 0.0
        self.longest_wait_s = 0.0  # of one client, since faults were over
        self.waiting = 0  # submitted and not ended
        self.last_word = 0.0  # when some client last got a token or an end
        self._open = 0

    def add(self, client: Client, truth: Truth) -> None:
        """Will submit at its time."""
        reader = self.readers[client.request.id] = Reader(client, truth)
        self.heap.at(client.at, self._submit, reader)
        self._open += 1

    @property
    def done(self) -> bool:
        return not self._open

    def _submit(self, reader: Reader) -> None:
        gateway = self.processes[reader.client.gateway]
        reader.submitted_at, reader.gateway_life = self.heap.now, gateway.incarnation
        self.last_submit = self.heap.now
        self.waiting += 1
        if not gateway.alive:
            self._end(reader, "no gateway")
            return
        self.note(f"client submits {reader.truth.request.id} to {gateway.name}")
        gateway.deliver(Submitted(reader.truth.request))
        if reader.client.cancel_after is not None:
            self.heap.after(reader.client.cancel_after, self._cancel, reader)

    def _cancel(self, reader: Reader) -> None:
        gateway = self.processes[reader.client.gateway]
        if reader.open and reader.cancelled is None and gateway.incarnation == reader.gateway_life:
            reader.cancelled = FinishReason.STOP if reader.truth.number % 3 == 0 else FinishReason.CANCELLED
            for point in self.phases_of(reader.truth.request.id):
                self.coverage.cancels[point] += 1
            self.note(f"client ends {reader.truth.request.id} as {reader.cancelled}")
            gateway.deliver(ClientCancelled(reader.truth.request.id, reader.cancelled))

    def reached(self, request_id: str, point: str) -> None:
        """A request's sequence, stream or move came to a phase; its client may have waited for just that."""
        self.coverage.phases[point] += 1
        reader = self.readers.get(request_id)
        if reader is not None and reader.client.cancel_on == point and reader.cancelled is None and reader.open:
            self.heap.after(0.0, self._cancel, reader)

    def gateway_died(self, gateway: Process) -> None:
        for reader in self.readers.values():
            if reader.open and reader.client.gateway == gateway.name:
                self._end(reader, "gateway died")

    # ── what a gateway says ──────────────────────────────────────────────────────────────────────────────────────────

    def hear(self, gateway: Process, effect: Deliver | Complete | Fail) -> None:
        reader = self.readers[effect.request_id]
        if not reader.open or (gateway.name, gateway.incarnation) != (reader.client.gateway, reader.gateway_life):
            raise Violation(Property.TOKENS, f"{effect.request_id}: {effect} after its stream ended ({reader.end})")
        match effect:
            case Deliver():
                self._tokens(reader, effect)
            case Complete():
                self._complete(reader, effect)
            case Fail():
                self._fail(reader, effect)

    def _tokens(self, reader: Reader, effect: Deliver) -> None:
        output = reader.truth.output
        got = tuple(t.id for t in effect.tokens)
        if effect.first_index != reader.received:
            came = f"token {effect.first_index} came, {reader.received} was next"
            raise Violation(Property.TOKENS, f"{effect.request_id}: {came}")
        if not got or got != output[reader.received : reader.received + len(got)]:
            raise Violation(Property.TOKENS, f"{effect.request_id}: wrong tokens from index {reader.received}")
        self._progress(reader)
        reader.received += len(got)
        self.last_word = self.heap.now

    def _progress(self, reader: Reader) -> None:
        """How long this one has waited for its next word, once faults were over."""
        last = max(reader.last_word, reader.submitted_at, self.plan.faults_end)
        self.longest_wait_s = max(self.longest_wait_s, self.heap.now - last)
        if self.heap.now - last > WAIT_S:
            waited = f"{reader.truth.request.id} waited {self.heap.now - last:.1f} s for its next word"
            raise Violation(Property.RECOVERY, waited)
        reader.last_word = self.heap.now

    def _complete(self, reader: Reader, effect: Complete) -> None:
        output = reader.truth.output
        if effect.finish is not reader.cancelled:
            right = FinishReason.STOP if output[-1] == EOS else FinishReason.LENGTH
            if effect.finish is not right or reader.received != len(output):
                raise Violation(
                    Property.TOKENS,
                    f"{effect.request_id}: ended as {effect.finish} after {reader.received} tokens, "
                    f"should be {right} after {len(output)}",
                )
        self._account(reader, effect.account)
        self._end(reader, str(effect.finish))

    def _account(self, reader: Reader, account: Account) -> None:
        """What the gateway says of how it went adds up (DESIGN §8)."""
        name = reader.truth.request.id
        if account.output_tokens != reader.received:
            counted = f"accounts for {account.output_tokens} of {reader.received} tokens"
            raise Violation(Property.ACCOUNT, f"{name}: {counted}")
        parts = account.timings
        ttft = parts.gateway_s + parts.dispatch_s + parts.queue_s + parts.prefill_s
        if reader.received and account.attempts == 1 and abs(ttft - account.ttft_s) > 1e-6:
            sums = f"parts of the time to first token sum to {ttft}, it was {account.ttft_s}"
            raise Violation(Property.ACCOUNT, f"{name}: {sums}")
        if not 0 <= account.ttft_s <= account.total_s + 1e-6:
            raise Violation(Property.ACCOUNT, f"{name}: first token after {account.ttft_s} of {account.total_s} s")

    def _fail(self, reader: Reader, effect: Fail) -> None:
        elapsed = self.heap.now - reader.submitted_at
        timeout = reader.truth.request.timeout_s
        if not effect.message:
            raise Violation(Property.REASON, f"{effect.request_id}: failed without a reason")
        if effect.code is Code.DEADLINE_EXCEEDED and elapsed < timeout - 1e-3:
            raise Violation(Property.REASON, f"{effect.request_id}: deadline passed after {elapsed:.1f} of {timeout} s")
        if effect.code is Code.INTERNAL and not self.plan.rates.step_fails:
            raise Violation(Property.REASON, f"{effect.request_id}: internal error: {effect.message}")
        if effect.code in (Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.ALREADY_EXISTS):
            raise Violation(Property.REASON, f"{effect.request_id}: refused as {effect.code}: {effect.message}")
        if effect.code is Code.RESOURCE_EXHAUSTED and self.plan.tight:
            self.coverage.situations["refused: too many"] += 1
        elif self.plan.profile == "calm" and effect.code is not Code.DEADLINE_EXCEEDED:
            raise Violation(Property.REASON, f"{effect.request_id}: failed on a calm day: {effect.message}")
        elif self.plan.profile in ("calm", "noise") and timeout >= LONG_S:
            raise Violation(Property.REASON, f"{effect.request_id}: failed after {elapsed:.0f} s: {effect.message}")
        self.note(f"client is told that {effect.request_id} failed: {effect.code}: {effect.message}")
        self._end(reader, f"failed: {effect.code}")

    def _end(self, reader: Reader, how: str) -> None:
        self._progress(reader)
        reader.end, reader.ended_at = how, self.heap.now
        self._open -= 1
        self.waiting -= 1
        self.last_word = self.heap.now
        self.ended(reader.truth.request.id)
