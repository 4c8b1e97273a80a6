"""Prometheus metrics, read off what the machines were told and asked for; no logic reads a metric.

One observer a machine, each with ``write(now, event, effects)`` like the journal. Names are those of the field with the
prefix ``distserve_``, in seconds and base units; no label holds a request. Knows no HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from distserve.core.effects import Account, Complete, Deliver, Fail, RunStep, Send
from distserve.core.events import (
    Committed,
    Dispatched,
    DispatchRefused,
    InstanceLeft,
    Joined,
    MembersChanged,
    MoveEnded,
    PeerLost,
    PrefillFinished,
    ReserveAsked,
    StageCorrupt,
    StageFailed,
    StageSent,
    StageStored,
    StepAbandoned,
    StepDone,
    StepFailed,
    Submitted,
)
from distserve.core.types import Code, Load, Placement, Role
from distserve.observe.causes import cause_of

LATENCY_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1),
    *(0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 25.0, 50.0, 100.0),
)
TOKEN_GAP_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 10.0, 25.0, 100.0),
)
BYTES_BUCKETS = tuple(float(4**n) for n in range(5, 18))  # 1 KiB to 16 GiB
COUNT_BUCKETS = tuple(float(2**n) for n in range(14))  # 1 to 8192

_TIMES = {
    "gateway": "at the gateway before dispatch (part of TTFT)",
    "dispatch": "waiting for the controller's choice (part of TTFT)",
    "queue": "waiting at the prefill instance (part of TTFT)",
    "prefill": "in prefill steps (part of TTFT)",
    "reserve": "waiting for room at the decode instance",
    "transfer": "moving KV after the first token",
    "decode_queue": "at the decode instance before its first step",
}
_OPEN_MOVES_KEPT = 65_536


class GatewayMetrics:
    """What clients experience, measured at the gateway. Fed by the thread that runs the gateway's machine."""

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        self._open: dict[str, float | None] = {}  # request → when its last token came
        labels = {"model_name": model_name}

        def histogram(name: str, words: str, buckets: Sequence[float]) -> Histogram:
            made = Histogram(f"distserve_{name}", words, list(labels), buckets=buckets, registry=registry)
            return made.labels(**labels)

        def counter(name: str, words: str) -> Counter:
            return Counter(f"distserve_{name}", words, list(labels), registry=registry).labels(**labels)

        self._outcomes = Counter(
            "distserve_requests", "Requests ended, by outcome", ["model_name", "outcome"], registry=registry
        )
        self._model_name = model_name
        self._in_flight = Gauge(
            "distserve_num_requests_in_flight", "Requests now open at the gateway", list(labels), registry=registry
        ).labels(**labels)
        self._ttft = histogram("time_to_first_token_seconds", "Arrival to first token", LATENCY_BUCKETS)
        self._tpot = histogram("time_per_output_token_seconds", "Mean gap after the first token", TOKEN_GAP_BUCKETS)
        self._itl = histogram("inter_token_latency_seconds", "Gap between two tokens", TOKEN_GAP_BUCKETS)
        self._e2e = histogram("e2e_request_latency_seconds", "Arrival to last token", LATENCY_BUCKETS)
        self._decode = histogram("request_decode_time_seconds", "First to last token", LATENCY_BUCKETS)
        self._times = {
            part: histogram(f"request_{part}_time_seconds", f"Time {words}", LATENCY_BUCKETS)
            for part, words in _TIMES.items()
        }
        self._moved = histogram("request_kv_moved_bytes", "KV bytes moved for a request", BYTES_BUCKETS)
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens taken in")
        self._output_tokens = counter("generation_tokens", "Tokens delivered to clients")
        self._cache_queries = counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache")
        self._cache_hits = counter("prefix_cache_hits", "Prompt tokens whose KV came from the prefix cache")
        self._retries = counter("request_retries", "Attempts beyond the first")
        by_code = ["model_name", "front_end", "code"]
        self._refusals = Counter("distserve_refusals", "Errors answered by a front end", by_code, registry=registry)

    def write(self, now: float, event: Any, effects: Sequence[Any]) -> None:
        known_before = False
        if isinstance(event, Submitted):
            known_before = event.request.id in self._open
            if not known_before:
                self._open[event.request.id] = None
                self._prompt_tokens.inc(len(event.request.prompt_token_ids))
        for effect in effects:
            match effect:
                case Deliver():
                    self._on_tokens(effect, now)
                case Complete(request_id, finish, account):
                    self._outcomes.labels(self._model_name, finish.value).inc()
                    self._on_account(account)
                    self._open.pop(request_id, None)
                case Fail(request_id, code):
                    self._outcomes.labels(self._model_name, code.value).inc()
                    if not known_before:  # else: a second request of the same name was refused; the first goes on
                        self._open.pop(request_id, None)
        self._in_flight.set(len(self._open))

    def refused(self, front_end: str, code: Code) -> None:
        """A front end ("http", "grpc", "oip") answered with an error."""
        self._refusals.labels(self._model_name, front_end, code.value).inc()

    def _on_tokens(self, delivered: Deliver, now: float) -> None:
        count = len(delivered.tokens)
        self._output_tokens.inc(count)
        last = self._open.get(delivered.request_id)
        if last is not None and count:
            self._itl.observe(now - last)
        for _ in range(count - 1):  # tokens of one message reach the client together
            self._itl.observe(0.0)
        if count and delivered.request_id in self._open:
            self._open[delivered.request_id] = now

    def _on_account(self, account: Account) -> None:
        self._retries.inc(max(0, account.attempts - 1))
        self._e2e.observe(account.total_s)
        if account.output_tokens == 0:
            return
        self._ttft.observe(account.ttft_s)
        self._decode.observe(account.total_s - account.ttft_s)
        if account.output_tokens > 1:
            self._tpot.observe((account.total_s - account.ttft_s) / (account.output_tokens - 1))
        timings = account.timings
        moved = timings.kv_bytes_moved > 0
        for part, seen in self._times.items():
            if moved or part not in ("reserve", "transfer", "decode_queue"):
                seen.observe(getattr(timings, f"{part}_s"))
        if moved:
            self._moved.observe(timings.kv_bytes_moved)
        self._cache_queries.inc(account.prompt_tokens)
        self._cache_hits.inc(timings.cached_tokens)


class InstanceMetrics:
    """What one instance does: steps, queues, KV, moves. Fed by the step-loop thread."""

    def __init__(self, registry: CollectorRegistry, *, model_name: str, instance: str, role: Role) -> None:
        self._labels = {"model_name": model_name, "role": role.value, "instance": instance}
        self._registry = registry
        self._steps: dict[int, tuple[int, int]] = {}  # step → sequences, tokens
        self._moves: dict[str, tuple[float, Any]] = {}  # out of here: move → when it was asked for, of whom
        self._preempted = 0
        self._step_seconds = self._histogram("step_seconds", "Time of a step", LATENCY_BUCKETS)
        self._step_sequences = self._histogram("step_batch_size", "Sequences in a step", COUNT_BUCKETS)
        self._step_tokens = self._histogram("step_tokens", "Tokens computed in a step", COUNT_BUCKETS)
        self._step_failures = self._counter("step_failures", "Steps that raised")
        self._queues = {
            phase: self._gauge(f"num_requests_{phase}", f"Sequences {phase.replace('_', ' ')}")
            for phase in ("waiting", "running", "handing_off", "incoming")
        }
        self._queued_tokens = self._gauge("num_queued_tokens", "Prompt tokens owed before a new request would start")
        self._kv_usage = self._gauge("kv_cache_usage_ratio", "Share of KV blocks that are not free for the taking")
        self._kv_blocks = Gauge(
            "distserve_kv_blocks", "KV blocks by state of the ledger", [*self._labels, "state"], registry=registry
        )
        self._startup = Gauge(
            "distserve_startup_seconds", "Time to become ready, by phase", [*self._labels, "phase"], registry=registry
        )
        self._preemptions = self._counter("num_preemptions", "Sequences that gave their KV up for others")
        self._stage_seconds = self._histogram("kv_transfer_seconds", "Time of a stage, sent to stored", LATENCY_BUCKETS)
        self._stage_bytes = self._histogram("kv_transfer_stage_bytes", "Bytes of a stage", BYTES_BUCKETS)
        self._sent_bytes = self._counter("kv_transfer_sent_bytes", "KV bytes sent, verified and stored elsewhere")
        self._stored_bytes = self._counter("kv_transfer_stored_bytes", "KV bytes received, verified and stored here")
        self._stages_stored = self._counter("kv_transfer_stages_stored", "Stages stored here")
        self._handoff_seconds = self._histogram("handoff_seconds", "Ticket asked for to owner changed", LATENCY_BUCKETS)
        self._handoffs = self._counter("handoffs", "Moves out of here that changed the owner")
        by_cause = [*self._labels, "cause"]
        self._aborts = Counter(
            "distserve_handoff_aborts", "Moves ended without a change of owner", by_cause, registry=registry
        )
        self._failures = Counter(
            "distserve_kv_transfer_failures", "Stages that did not arrive", by_cause, registry=registry
        )
        self._corrupt = self._counter("kv_checksum_failures", "Stages refused: bytes failed verification")

    def write(self, now: float, event: Any, effects: Sequence[Any]) -> None:
        match event:
            case StepDone(number, _, seconds):
                self._on_step(number, seconds)
            case StepAbandoned(number):
                self._steps.pop(number, None)
            case StepFailed(number):
                self._steps.pop(number, None)
                self._step_failures.inc()
            case StageSent(_, _, _, nbytes, seconds):
                self._stage_seconds.observe(seconds)
                self._stage_bytes.observe(nbytes)
                self._sent_bytes.inc(nbytes)
            case StageStored(_, _, _, _, nbytes):
                self._stages_stored.inc()
                self._stored_bytes.inc(nbytes)
            case StageFailed(_, reason):
                self._failures.labels(**self._labels, cause=cause_of(reason)).inc()
            case StageCorrupt():
                self._corrupt.inc()
            case Committed(move_id):
                self._on_committed(move_id, now)
            case MoveEnded(move_id, _, reason):
                self._on_ended(move_id, reason)
            case PeerLost(ref):
                for move_id in [m for m, (_, to) in self._moves.items() if to == ref]:
                    self._on_ended(move_id, "peer lost")
        for effect in effects:
            self._on_effect(effect, now)

    def set_startup(self, by_phase: Mapping[str, float]) -> None:
        """Seconds of each phase of this process's start, once it is over."""
        for phase, seconds in by_phase.items():
            self._startup.labels(**self._labels, phase=phase).set(seconds)

    def set_kv(self, by_state: Mapping[str, int]) -> None:
        """The ledger's count of blocks in each state, whenever the shell has it at hand."""
        for state, blocks in by_state.items():
            self._kv_blocks.labels(**self._labels, state=state).set(blocks)

    def set_load(self, load: Load) -> None:
        """Queues and KV use, whenever the shell has them at hand."""
        for phase, gauge in self._queues.items():
            gauge.set(getattr(load, phase))
        self._queued_tokens.set(load.queued_tokens)
        taken = load.kv_total - load.kv_free - load.kv_cached
        self._kv_usage.set(taken / load.kv_total if load.kv_total else 0.0)
        self._preemptions.inc(max(0, load.preemptions - self._preempted))
        self._preempted = load.preemptions

    def _on_effect(self, effect: Any, now: float) -> None:
        match effect:
            case RunStep(plan):
                self._steps[plan.number] = (len(plan.items), plan.tokens)
            case Send(to, ReserveAsked(move_id)):
                self._moves.setdefault(move_id, (now, to))
                if len(self._moves) > _OPEN_MOVES_KEPT:
                    del self._moves[next(iter(self._moves))]
            case Send(_, MoveEnded(move_id, _, reason)):
                self._on_ended(move_id, reason)

    def _on_step(self, number: int, seconds: float) -> None:
        self._step_seconds.observe(seconds)
        if (step := self._steps.pop(number, None)) is not None:
            self._step_sequences.observe(step[0])
            self._step_tokens.observe(step[1])

    def _on_committed(self, move_id: str, now: float) -> None:
        if (asked := self._moves.pop(move_id, None)) is not None:
            self._handoffs.inc()
            self._handoff_seconds.observe(now - asked[0])

    def _on_ended(self, move_id: str, reason: str) -> None:
        if self._moves.pop(move_id, None) is not None:
            self._aborts.labels(**self._labels, cause=cause_of(reason)).inc()

    def _histogram(self, name: str, words: str, buckets: Sequence[float]) -> Histogram:
        made = Histogram(f"distserve_{name}", words, list(self._labels), buckets=buckets, registry=self._registry)
        return made.labels(**self._labels)

    def _counter(self, name: str, words: str) -> Counter:
        return Counter(f"distserve_{name}", words, list(self._labels), registry=self._registry).labels(**self._labels)

    def _gauge(self, name: str, words: str) -> Gauge:
        return Gauge(f"distserve_{name}", words, list(self._labels), registry=self._registry).labels(**self._labels)


class ClusterMetrics:
    """What the controller decides: members, dispatches, refusals. Fed by the controller's loop."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._members = Gauge("distserve_instances", "Instances now in the cluster", ["role"], registry=registry)
        for role in Role:
            self._members.labels(role.value).set(0)
        self._joins = Counter("distserve_instance_joins", "Instances that joined", ["role"], registry=registry)
        self._losses = Counter("distserve_instance_losses", "Instances that left or died", registry=registry)
        self._dispatches = Counter(
            "distserve_dispatches", "Attempts placed, by kind of placement", ["kind"], registry=registry
        )
        for placement in Placement:
            self._dispatches.labels(placement.value)
        self._refusals = Counter("distserve_dispatch_refusals", "Attempts refused", ["code"], registry=registry)
        self._prefills = Counter("distserve_prefills_finished", "First tokens seen by gateways", registry=registry)

    def write(self, now: float, event: Any, effects: Sequence[Any]) -> None:
        match event:
            case Joined(member):
                self._joins.labels(member.role.value).inc()
            case InstanceLeft():
                self._losses.inc()
            case PrefillFinished():
                self._prefills.inc()
        counted_members = False
        for effect in effects:
            match effect:
                case Send(_, Dispatched(placement=Placement() as placement)):
                    self._dispatches.labels(placement.value).inc()
                case Send(_, DispatchRefused(_, _, code)):
                    self._refusals.labels(code.value).inc()
                case Send(_, MembersChanged(_, members)) if not counted_members:
                    counted_members = True
                    for role in Role:
                        self._members.labels(role.value).set(sum(m.role is role for m in members))
