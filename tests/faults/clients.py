"""The clients: they submit, read, leave when they like, and know every right token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from distserve.core.effects import Account, Complete, Deliver, Fail
from distserve.core.events import ClientCancelled, Submitted
from distserve.core.types import Code, FinishReason
from tests.faults.heap import Heap
from tests.faults.plan import Client, Plan
from tests.faults.process import Process
from tests.faults.truth import EOS, Violation

LONG_S = 120.0
"""With a timeout this long a request comes through even a full cluster, as long as nothing breaks."""


@dataclass
class Reader:
    """One client's view of one request."""

    client: Client
    submitted_at: float = -1.0
    gateway_life: int = 0
    received: int = 0
    cancelled: FinishReason | None = None  # what its client ended it as
    end: str = ""  # empty while open
    ended_at: float = 0.0

    @property
    def open(self) -> bool:
        return self.submitted_at >= 0 and not self.end


class ClientCrowd:
    """All clients. Raises at the first wrong, missing, repeated or late word."""

    def __init__(self, plan: Plan, heap: Heap, note: Callable[[str], None], ended: Callable[[str], None]) -> None:
        self.plan = plan
        self.heap = heap
        self.note = note
        self.ended = ended
        self.processes: dict[str, Process] = {}
        self.readers: dict[str, Reader] = {}

    def add(self, client: Client) -> None:
        """Will submit at its time."""
        self.readers[client.truth.request.id] = Reader(client)
        self.heap.at(client.at, self._submit, self.readers[client.truth.request.id])

    @property
    def done(self) -> bool:
        return all(reader.end for reader in self.readers.values())

    def _submit(self, reader: Reader) -> None:
        gateway = self.processes[reader.client.gateway]
        reader.submitted_at, reader.gateway_life = self.heap.now, gateway.incarnation
        if not gateway.alive:
            self._end(reader, "no gateway")
            return
        self.note(f"client submits {reader.client.truth.request.id} to {gateway.name}")
        gateway.deliver(Submitted(reader.client.truth.request))
        if reader.client.cancel_after is not None:
            self.heap.after(reader.client.cancel_after, self._cancel, reader)

    def _cancel(self, reader: Reader) -> None:
        gateway = self.processes[reader.client.gateway]
        if reader.open and gateway.incarnation == reader.gateway_life:
            reader.cancelled = FinishReason.STOP if reader.client.truth.number % 3 == 0 else FinishReason.CANCELLED
            self.note(f"client ends {reader.client.truth.request.id} as {reader.cancelled}")
            gateway.deliver(ClientCancelled(reader.client.truth.request.id, reader.cancelled))

    def gateway_died(self, gateway: Process) -> None:
        for reader in self.readers.values():
            if reader.open and reader.client.gateway == gateway.name:
                self._end(reader, "gateway died")

    # ── what a gateway says ──────────────────────────────────────────────────────────────────────────────────────────

    def hear(self, gateway: Process, effect: Deliver | Complete | Fail) -> None:
        reader = self.readers[effect.request_id]
        if not reader.open or (gateway.name, gateway.incarnation) != (reader.client.gateway, reader.gateway_life):
            raise Violation(f"{effect.request_id}: {effect} after its stream ended ({reader.end})")
        match effect:
            case Deliver():
                self._tokens(reader, effect)
            case Complete():
                self._complete(reader, effect)
            case Fail():
                self._fail(reader, effect)

    def _tokens(self, reader: Reader, effect: Deliver) -> None:
        output = reader.client.truth.output
        got = tuple(t.id for t in effect.tokens)
        if effect.first_index != reader.received:
            raise Violation(f"{effect.request_id}: token {effect.first_index} came, {reader.received} was next")
        if not got or got != output[reader.received : reader.received + len(got)]:
            raise Violation(f"{effect.request_id}: wrong tokens from index {reader.received}")
        reader.received += len(got)

    def _complete(self, reader: Reader, effect: Complete) -> None:
        output = reader.client.truth.output
        if effect.finish is not reader.cancelled:
            right = FinishReason.STOP if output[-1] == EOS else FinishReason.LENGTH
            if effect.finish is not right or reader.received != len(output):
                raise Violation(
                    f"{effect.request_id}: ended as {effect.finish} after {reader.received} tokens, "
                    f"should be {right} after {len(output)}"
                )
        self._account(reader, effect.account)
        self._end(reader, str(effect.finish))

    def _account(self, reader: Reader, account: Account) -> None:
        """What the gateway says of how it went adds up (DESIGN §8)."""
        name = reader.client.truth.request.id
        if account.output_tokens != reader.received:
            raise Violation(f"{name}: accounts for {account.output_tokens} of {reader.received} tokens")
        parts = account.timings
        ttft = parts.gateway_s + parts.dispatch_s + parts.queue_s + parts.prefill_s
        if reader.received and account.attempts == 1 and abs(ttft - account.ttft_s) > 1e-6:
            raise Violation(f"{name}: parts of the time to first token sum to {ttft}, it was {account.ttft_s}")
        if not 0 <= account.ttft_s <= account.total_s + 1e-6:
            raise Violation(f"{name}: first token after {account.ttft_s} of {account.total_s} s")

    def _fail(self, reader: Reader, effect: Fail) -> None:
        elapsed = self.heap.now - reader.submitted_at
        timeout = reader.client.truth.request.timeout_s
        if not effect.message:
            raise Violation(f"{effect.request_id}: failed without a reason")
        if effect.code is Code.DEADLINE_EXCEEDED and elapsed < timeout - 1e-3:
            raise Violation(f"{effect.request_id}: deadline passed after {elapsed:.1f} of {timeout} s")
        if effect.code is Code.INTERNAL and not self.plan.rates.step_fails:
            raise Violation(f"{effect.request_id}: internal error: {effect.message}")
        if effect.code in (Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.ALREADY_EXISTS):
            raise Violation(f"{effect.request_id}: refused as {effect.code}: {effect.message}")
        if self.plan.profile == "calm" and effect.code is not Code.DEADLINE_EXCEEDED:
            raise Violation(f"{effect.request_id}: failed on a calm day: {effect.message}")
        if self.plan.profile in ("calm", "noise") and timeout >= LONG_S:
            raise Violation(f"{effect.request_id}: failed after {elapsed:.0f} s for no reason: {effect.message}")
        self.note(f"client is told that {effect.request_id} failed: {effect.code}: {effect.message}")
        self._end(reader, f"failed: {effect.code}")

    def _end(self, reader: Reader, how: str) -> None:
        reader.end, reader.ended_at = how, self.heap.now
        self.ended(reader.client.truth.request.id)
