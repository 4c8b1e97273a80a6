"""Client streams, token indices and epochs, re-dispatch, bypass: a gateway's machine (DESIGN §3, §4).

Owns what a client is told. Tokens are accepted from the highest epoch seen and by index: none lost, none twice.
When an attempt dies, every surviving holder is told and a new attempt starts from prompt + tokens already delivered.
Changed by ``handle`` alone.
"""

from __future__ import annotations

from distserve.core.effects import CONTROLLER, Complete, Deliver, Effect, Fail, Send
from distserve.core.events import (
    Abandoned,
    AttemptFailed,
    ClientCancelled,
    ControllerFound,
    ControllerLost,
    DispatchAsked,
    Dispatched,
    DispatchRefused,
    GatewayEvent,
    InstanceFound,
    InstanceLost,
    MembersChanged,
    PrefillFinished,
    RequestEnded,
    SequenceOutput,
    Submit,
    Submitted,
    Tick,
    TokensMade,
)
from distserve.core.types import Code, Endpoint, FinishReason, GatewayRef, InstanceRef, Member
from distserve.kv.prefix import PREFIX_RUN, chain_hashes
from distserve.sched.bypass import fewest_streams
from distserve.sched.closing import Closing
from distserve.sched.config import GatewayConfig
from distserve.sched.stream import Stream, StreamPhase


class GatewayState:
    """See the module."""

    def __init__(self, me: GatewayRef, config: GatewayConfig | None = None) -> None:
        self.me = me
        self.config = config or GatewayConfig()
        self.streams: dict[str, Stream] = {}
        self.members: dict[str, Member] = {}
        self.connected: dict[InstanceRef, None] = {}
        self.controller = False
        self._members_version = -1  # of this controller's life
        self.closing = Closing(me, self.config)
        self.ignored = 0
        self.retries: dict[Code, int] = {}

    # ── the one door ─────────────────────────────────────────────────────────────────────────────────────────────────

    def handle(self, event: GatewayEvent, now: float) -> list[Effect]:
        match event:
            case TokensMade(source, outputs):
                return [effect for output in outputs for effect in self._output(source, output, now)]
            case Submitted():
                return self._submitted(event, now)
            case ClientCancelled(request_id, finish):
                return self._cancelled(request_id, finish, now)
            case Dispatched():
                return self._dispatched(event, now)
            case DispatchRefused():
                return self._refused(event, now)
            case AttemptFailed():
                return self._attempt_failed(event, now)
            case Abandoned(source, request_id, epoch):
                self.closing.acknowledged(source, request_id, epoch)
                return []
            case Tick():
                return self._tick(now)
            case _:
                return self._on_parties(event, now)

    def _on_parties(self, event: GatewayEvent, now: float) -> list[Effect]:
        match event:
            case InstanceLost(ref, why):
                return self._instance_lost(ref, why, now)
            case InstanceFound(ref):
                self.connected[ref] = None
                return self._wake(now)
            case MembersChanged():
                return self._members_changed(event, now)
            case ControllerFound():
                self.controller, self._members_version = True, -1
                return self._wake(now)
            case ControllerLost():
                self.controller = False
                asked = [s for s in self.streams.values() if s.phase is StreamPhase.DISPATCHING]
                return [effect for stream in asked for effect in self._bypass(stream, now)]
            case _:
                return self._ignore()

    def _ignore(self) -> list[Effect]:
        self.ignored += 1
        return []

    # ── begin and end ────────────────────────────────────────────────────────────────────────────────────────────────

    def _submitted(self, event: Submitted, now: float) -> list[Effect]:
        request = event.request
        if request.id in self.streams:
            return self._ignore()  # the shell refuses these before they come here
        if len(self.streams) >= self.config.max_streams:
            message = f"this gateway already serves {self.config.max_streams} streams; try again shortly"
            return [Fail(request.id, Code.RESOURCE_EXHAUSTED, message, 1.0)]
        hashes = chain_hashes(request.prompt_token_ids, PREFIX_RUN)
        stream = Stream(request, hashes, event.tokenize_s, now, self.config.patience_s)
        self.streams[request.id] = stream
        stream.next_attempt(now)
        return self._dispatch(stream, now)

    def _leave(self, stream: Stream, now: float) -> list[Effect]:
        """Forget a stream and tell the controller."""
        del self.streams[stream.id]
        return [Send(CONTROLLER, RequestEnded(self.me, stream.id))] if self.controller else []

    def _abandon(self, stream: Stream, now: float, *, gone: InstanceRef | None = None) -> list[Effect]:
        """The one place from which an attempt is given up: every surviving holder is told (DESIGN §4)."""
        effects: list[Effect] = []
        for ref in stream.holders():
            if ref != gone:
                effects += self.closing.open(ref, stream.id, stream.bound, now)
        return effects

    def _fail(self, stream: Stream, code: Code, message: str, now: float, retry_after_s: float = 0.0) -> list[Effect]:
        effects = self._abandon(stream, now) + self._leave(stream, now)
        return [*effects, Fail(stream.id, code, message, retry_after_s)]

    def _cancelled(self, request_id: str, finish: FinishReason, now: float) -> list[Effect]:
        stream = self.streams.get(request_id)
        if stream is None:
            return self._ignore()
        account = stream.account(now)
        return [*self._abandon(stream, now), *self._leave(stream, now), Complete(request_id, finish, account)]

    # ── dispatch ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _dispatch(self, stream: Stream, now: float) -> list[Effect]:
        if not self.controller:
            return self._bypass(stream, now)
        stream.phase, stream.dispatched_at = StreamPhase.DISPATCHING, now
        request = stream.request
        asked = DispatchAsked(
            gateway=self.me,
            request_id=request.id,
            epoch=stream.epoch,
            model=request.model,
            prompt_tokens=len(request.prompt_token_ids) + len(stream.delivered),
            total_tokens=request.total_tokens,
            priority=request.priority,
            tenant=request.tenant,
            prefix_hashes=stream.hashes,
            avoid=stream.avoid,
        )
        return [Send(CONTROLLER, asked)]

    def _bypass(self, stream: Stream, now: float) -> list[Effect]:
        """The controller is away or silent: choose by this gateway's own count."""
        streams: dict[InstanceRef, int] = {}
        for other in self.streams.values():
            for ref in other.holders():
                streams[ref] = streams.get(ref, 0) + 1
        request = stream.request
        pair = fewest_streams(
            (m for m in self.members.values() if m.ref in self.connected),
            streams,
            model=request.model,
            prompt_tokens=len(request.prompt_token_ids) + len(stream.delivered),
            total_tokens=request.total_tokens,
            avoid=stream.avoid,
        )
        if pair is None:
            message = f"no connected instance can serve {request.model!r} now; try again shortly"
            return self._wait(stream, Code.UNAVAILABLE, message, self.config.retry_pause_s, now)
        return self._submit(stream, *pair, now)

    def _dispatched(self, event: Dispatched, now: float) -> list[Effect]:
        stream = self.streams.get(event.request_id)
        if stream is None or stream.phase is not StreamPhase.DISPATCHING or stream.epoch != event.epoch:
            return self._ignore()
        missing = [e.ref for e in (event.prefill, event.decode) if e.ref not in self.connected]
        if missing:
            message = f"instance {missing[0]} is not connected to this gateway yet"
            return self._wait(stream, Code.UNAVAILABLE, message, self.config.retry_pause_s, now)
        return self._submit(stream, event.prefill, event.decode, now)

    def _submit(self, stream: Stream, prefill: Endpoint, decode: Endpoint, now: float) -> list[Effect]:
        if not stream.delivered:
            stream.dispatch_s = now - stream.arrived
        stream.phase = StreamPhase.PREFILL
        stream.prefill, stream.decode = prefill, decode
        submit = Submit(
            gateway=self.me,
            request=stream.request,
            epoch=stream.epoch,
            decode=decode,
            delivered=tuple(stream.delivered),
            timeout_s=max(0.0, stream.deadline - now),
        )
        return [Send(prefill.ref, submit)]

    def _refused(self, event: DispatchRefused, now: float) -> list[Effect]:
        stream = self.streams.get(event.request_id)
        if stream is None or stream.phase is not StreamPhase.DISPATCHING or stream.epoch != event.epoch:
            return self._ignore()
        hopeless = event.code not in (Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED)
        if hopeless or (event.code is Code.RESOURCE_EXHAUSTED and not stream.delivered):
            return self._fail(stream, event.code, event.message, now, event.retry_after_s)
        return self._wait(stream, event.code, event.message, max(self.config.retry_pause_s, event.retry_after_s), now)

    def _wait(self, stream: Stream, code: Code, message: str, pause_s: float, now: float) -> list[Effect]:
        """Nobody can take it now: ask again after a pause, or at once when members change, while patience lasts."""
        if now >= stream.patience_until:
            return self._fail(stream, code, message, now, 1.0)
        stream.last_error = (code, message)
        stream.phase = StreamPhase.WAITING
        stream.wake_at = min(now + pause_s, stream.patience_until)
        return []

    def _wake(self, now: float) -> list[Effect]:
        waiting = [s for s in self.streams.values() if s.phase is StreamPhase.WAITING]
        return [effect for stream in waiting for effect in self._dispatch(stream, now)]

    # ── tokens ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _output(self, source: InstanceRef, output: SequenceOutput, now: float) -> list[Effect]:
        stream = self.streams.get(output.request_id)
        if stream is not None and stream.running and stream.is_former(output.epoch):
            return self._late_word(stream, output)
        if stream is None or not stream.running or not stream.is_current(output.epoch):
            self.ignored += 1
            if stream is not None and stream.is_current(output.epoch):
                return []
            # A stale sender holds what nobody reads: it is told, whatever became of the first telling.
            return self.closing.open(source, output.request_id, output.epoch, now)
        if output.first_index > len(stream.delivered):
            message = f"tokens {len(stream.delivered)}..{output.first_index - 1} were lost on the way"
            return self._retry(stream, Code.UNAVAILABLE, message, now)
        first = not stream.delivered
        index = len(stream.delivered)
        fresh = stream.take(source, output.epoch, output.first_index, output.tokens, now)
        if output.timings is not None:
            stream.measure(output.timings)
        effects: list[Effect] = []
        if stream.phase is StreamPhase.PREFILL:
            stream.phase = StreamPhase.DECODE
            if self.controller:
                effects.append(Send(CONTROLLER, PrefillFinished(self.me, stream.id, stream.epoch)))
        if fresh:
            effects.append(Deliver(stream.id, index, fresh))
        if first and fresh:
            stream.patience_until = stream.deadline  # what has begun is not given up for want of an instance
        if output.finish is not None:
            account = stream.account(now)
            effects += [*self._leave(stream, now), Complete(stream.id, output.finish, account)]
        return effects

    def _late_word(self, stream: Stream, output: SequenceOutput) -> list[Effect]:
        """The former owner's last tokens, overtaken by the new owner's, which repeated them: only times are new."""
        if output.timings is not None:
            stream.measure(output.timings)
        return self._ignore()

    # ── trouble ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _attempt_failed(self, event: AttemptFailed, now: float) -> list[Effect]:
        stream = self.streams.get(event.request_id)
        if stream is None or not stream.running or not stream.is_current(event.epoch):
            return self._ignore()
        if not event.retriable:
            return self._fail(stream, event.code, event.message, now)
        return self._retry(stream, event.code, event.message, now, avoid=event.culprit, gone=event.source)

    def _retry(
        self,
        stream: Stream,
        code: Code,
        message: str,
        now: float,
        *,
        avoid: InstanceRef | None = None,
        gone: InstanceRef | None = None,
    ) -> list[Effect]:
        """A new attempt from prompt + delivered tokens; ``gone`` holds nothing any more and need not be told."""
        self.retries[code] = self.retries.get(code, 0) + 1
        if stream.attempt >= self.config.max_attempts:
            return self._fail(stream, code, f"gave up after {stream.attempt} attempts: {message}", now, 1.0)
        effects = self._abandon(stream, now, gone=gone)
        stream.last_error = (code, message)
        if avoid is not None:
            stream.avoid = tuple(dict.fromkeys([*stream.avoid, avoid]))[-8:]
        again = stream.attempt > 1
        stream.next_attempt(now)
        if again:
            stream.phase, stream.wake_at = StreamPhase.WAITING, now + self.config.retry_pause_s * stream.attempt
            return effects
        return effects + self._dispatch(stream, now)

    def _instance_lost(self, ref: InstanceRef, why: str, now: float) -> list[Effect]:
        self.connected.pop(ref, None)
        self.closing.forget(ref)
        effects: list[Effect] = []
        for stream in list(self.streams.values()):
            moved_on = stream.decode is not None and stream.owner == stream.decode.ref != ref
            if stream.running and ref in stream.holders() and not moved_on:
                message = f"instance {ref} was lost: {why}"
                effects += self._retry(stream, Code.UNAVAILABLE, message, now, avoid=ref, gone=ref)
        return effects

    def _members_changed(self, event: MembersChanged, now: float) -> list[Effect]:
        if event.version < self._members_version:
            return self._ignore()  # a late repeat: whom it calls lost may be back
        self._members_version = event.version
        effects: list[Effect] = []
        for ref in event.lost:
            known = self.members.get(ref.id)
            if known is not None and known.ref == ref:
                del self.members[ref.id]
            if ref in self.connected:
                effects += self._declared_dead(ref, now)
        self.members.update({m.ref.id: m for m in event.members})
        return effects + self._wake(now)

    def _declared_dead(self, ref: InstanceRef, now: float) -> list[Effect]:
        """The controller gave a life up whose stream still stands: its requests go elsewhere, and it is told."""
        effects: list[Effect] = []
        for stream in list(self.streams.values()):
            moved_on = stream.decode is not None and stream.owner == stream.decode.ref != ref
            if stream.running and ref in stream.holders() and not moved_on:
                effects += self._retry(stream, Code.UNAVAILABLE, f"instance {ref} stopped answering", now, avoid=ref)
        return effects

    # ── time ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _due(self, stream: Stream) -> float:
        if stream.phase is StreamPhase.DISPATCHING:
            return min(stream.deadline, stream.dispatched_at + self.config.dispatch_timeout_s)
        return min(stream.deadline, stream.wake_at) if stream.phase is StreamPhase.WAITING else stream.deadline

    def next_deadline(self) -> float | None:
        times = [self._due(s) for s in self.streams.values()]
        if (due := self.closing.next_deadline()) is not None:
            times.append(due)
        return min(times, default=None)

    def _tick(self, now: float) -> list[Effect]:
        effects = self.closing.tick(now)
        for stream in [s for s in self.streams.values() if now >= self._due(s)]:
            if now >= stream.deadline:
                waited = f": {stream.last_error[1]}" if stream.last_error is not None else ""
                message = (
                    f"the request's deadline of {stream.request.timeout_s:g} s passed in phase {stream.phase}{waited}"
                )
                effects += self._fail(stream, Code.DEADLINE_EXCEEDED, message, now)
            elif stream.phase is StreamPhase.DISPATCHING:
                effects += self._bypass(stream, now)
            else:
                effects += self._dispatch(stream, now)
        return effects

    # ── views ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def check(self) -> None:
        """Raise if a stream is in a phase that its places contradict."""
        for stream in self.streams.values():
            if stream.running != (stream.prefill is not None and stream.decode is not None):
                raise AssertionError(f"{stream.id} is in phase {stream.phase} with prefill {stream.prefill}")
            if len(stream.delivered) > stream.request.stopping.max_tokens:
                raise AssertionError(f"{stream.id} was given {len(stream.delivered)} tokens")
