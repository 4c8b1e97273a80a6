"""Metrics read off events and effects, and their exposition."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from distserve.core import effects, events
from distserve.core.types import (
    Code,
    Endpoint,
    FinishReason,
    GatewayRef,
    InstanceRef,
    Load,
    Member,
    ModelSpec,
    Placement,
    Request,
    Role,
    Sampling,
    StepItem,
    StepPlan,
    Stopping,
    Timings,
    Token,
)
from distserve.observe.causes import CAUSES, cause_of
from distserve.observe.exposition import OpsServer, ProcessCost, merge, text
from distserve.observe.metrics import ClusterMetrics, GatewayMetrics, InstanceMetrics

P, D = InstanceRef("p0", 1), InstanceRef("d0", 1)
MODEL = {"model_name": "tiny"}
P_LABELS = {"model_name": "tiny", "instance": "p0", "role": "prefill"}


def request(name: str = "r") -> Request:
    return Request(name, "tiny", (1, 2, 3), Sampling(), Stopping(8), 60.0)


def account(output_tokens: int, ttft_s: float, total_s: float, **timings: Any) -> effects.Account:
    return effects.Account("p0", "d0", 1, 3, output_tokens, ttft_s, total_s, Timings(**timings))


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def test_a_requests_latencies_are_counted_once(registry: CollectorRegistry) -> None:
    metrics = GatewayMetrics(registry, "tiny")
    value = registry.get_sample_value
    metrics.write(0.0, events.Submitted(request()), [])
    assert value("distserve_num_requests_in_flight", MODEL) == 1
    metrics.write(0.5, events.Tick(), [effects.Deliver("r", 0, (Token(5),))])
    metrics.write(0.7, events.Tick(), [effects.Deliver("r", 1, (Token(6), Token(7)))])
    done = account(3, 0.5, 0.7, queue_s=0.1, transfer_s=0.05, kv_bytes_moved=4096, cached_tokens=2)
    metrics.write(0.7, events.Tick(), [effects.Complete("r", FinishReason.LENGTH, done)])

    assert value("distserve_requests_total", {**MODEL, "outcome": "length"}) == 1
    assert value("distserve_time_to_first_token_seconds_sum", MODEL) == pytest.approx(0.5)
    assert value("distserve_time_per_output_token_seconds_sum", MODEL) == pytest.approx(0.1)
    assert value("distserve_inter_token_latency_seconds_count", MODEL) == 2
    assert value("distserve_inter_token_latency_seconds_sum", MODEL) == pytest.approx(0.2)
    assert value("distserve_e2e_request_latency_seconds_sum", MODEL) == pytest.approx(0.7)
    assert value("distserve_request_queue_time_seconds_sum", MODEL) == pytest.approx(0.1)
    assert value("distserve_request_transfer_time_seconds_sum", MODEL) == pytest.approx(0.05)
    assert value("distserve_request_kv_moved_bytes_sum", MODEL) == 4096
    assert value("distserve_generation_tokens_total", MODEL) == 3
    assert value("distserve_prompt_tokens_total", MODEL) == 3
    assert value("distserve_prefix_cache_hits_total", MODEL) == 2
    assert value("distserve_num_requests_in_flight", MODEL) == 0


def test_a_colocated_request_has_no_hand_off_times(registry: CollectorRegistry) -> None:
    metrics = GatewayMetrics(registry, "tiny")
    metrics.write(0.0, events.Submitted(request()), [])
    metrics.write(0.1, events.Tick(), [effects.Complete("r", FinishReason.STOP, account(1, 0.1, 0.1))])
    assert registry.get_sample_value("distserve_request_reserve_time_seconds_count", MODEL) == 0
    assert registry.get_sample_value("distserve_time_per_output_token_seconds_count", MODEL) == 0


def test_a_refused_duplicate_leaves_the_first_request_open(registry: CollectorRegistry) -> None:
    metrics = GatewayMetrics(registry, "tiny")
    metrics.write(0.0, events.Submitted(request()), [])
    metrics.write(0.1, events.Submitted(request()), [effects.Fail("r", Code.ALREADY_EXISTS, "again")])
    assert registry.get_sample_value("distserve_num_requests_in_flight", MODEL) == 1
    metrics.write(0.2, events.Tick(), [effects.Fail("r", Code.UNAVAILABLE, "gone")])
    assert registry.get_sample_value("distserve_num_requests_in_flight", MODEL) == 0
    assert registry.get_sample_value("distserve_requests_total", {**MODEL, "outcome": "already_exists"}) == 1


def instance_metrics(registry: CollectorRegistry) -> InstanceMetrics:
    return InstanceMetrics(registry, model_name="tiny", instance="p0", role=Role.PREFILL)


def test_a_start_is_told_by_phase(registry: CollectorRegistry) -> None:
    instance_metrics(registry).set_startup({"weights": 1.5, "join": 0.25})
    for phase, seconds in (("weights", 1.5), ("join", 0.25)):
        assert registry.get_sample_value("distserve_startup_seconds", P_LABELS | {"phase": phase}) == seconds


def test_a_step_is_its_time_and_its_batch(registry: CollectorRegistry) -> None:
    metrics = instance_metrics(registry)
    plan = StepPlan(1, (StepItem("a", 0, (1, 2, 3), (0,), True), StepItem("b", 4, (9,), (1,), True)))
    metrics.write(0.0, events.Tick(), [effects.RunStep(plan)])
    metrics.write(0.2, events.StepDone(1, (), 0.2), [])
    assert registry.get_sample_value("distserve_step_seconds_sum", P_LABELS) == pytest.approx(0.2)
    assert registry.get_sample_value("distserve_step_batch_size_sum", P_LABELS) == 2
    assert registry.get_sample_value("distserve_step_tokens_sum", P_LABELS) == 4
    metrics.write(0.3, events.Tick(), [effects.RunStep(StepPlan(2, ()))])
    metrics.write(0.4, events.StepFailed(2, "boom"), [])
    assert registry.get_sample_value("distserve_step_failures_total", P_LABELS) == 1
    metrics.write(0.5, events.Tick(), [effects.RunStep(StepPlan(3, plan.items))])
    metrics.write(0.6, events.StepAbandoned(3), [])
    metrics.write(0.7, events.StepDone(3, (), 0.2), [])
    assert registry.get_sample_value("distserve_step_failures_total", P_LABELS) == 1
    assert registry.get_sample_value("distserve_step_tokens_sum", P_LABELS) == 4, "a step given up has no tokens"


def test_load_reports_fill_the_queues(registry: CollectorRegistry) -> None:
    metrics = instance_metrics(registry)
    for preemptions in (2, 5):
        load = Load(waiting=3, running=4, handing_off=1, incoming=2, kv_free=10, kv_cached=5, kv_total=60,
                    preemptions=preemptions)  # fmt: skip
        metrics.set_load(load)
    value = registry.get_sample_value
    phases = ("waiting", "running", "handing_off", "incoming")
    assert [value(f"distserve_num_requests_{phase}", P_LABELS) for phase in phases] == [3, 4, 1, 2]
    assert value("distserve_kv_cache_usage_ratio", P_LABELS) == pytest.approx(0.75)
    assert value("distserve_num_preemptions_total", P_LABELS) == 5
    metrics.set_kv({"free": 7, "owned": 3})
    assert value("distserve_kv_blocks", {**P_LABELS, "state": "owned"}) == 3


def reserve_asked(move: str) -> effects.Send:
    source = Endpoint(P, "a:1")
    asked = events.ReserveAsked(move, source, D, GatewayRef("g", 1), request(), 65536, (7,), "f", 4, 60.0, 60.0)
    return effects.Send(D, asked)


def test_moves_end_once_with_a_cause(registry: CollectorRegistry) -> None:
    metrics = instance_metrics(registry)
    value = registry.get_sample_value
    for move in ("m1", "m2", "m3"):
        metrics.write(1.0, events.Tick(), [reserve_asked(move)])
    metrics.write(1.5, events.Tick(), [reserve_asked("m1")])  # the ask is repeated; the clock is not
    metrics.write(2.0, events.StageSent("m1", 0, 4, 1000, 0.1), [])
    metrics.write(3.0, events.Committed("m1", D, 65537), [])
    metrics.write(3.1, events.Committed("m1", D, 65537), [])
    metrics.write(4.0, events.MoveEnded("m2", D, "no room in time"), [effects.Send(D, events.MoveEnded("m2", P, "x"))])
    metrics.write(5.0, events.PeerLost(D, "died"), [])
    metrics.write(6.0, events.StageFailed("m9", "the link timed out", True), [])
    metrics.write(6.0, events.StageCorrupt("m9", 1, "checksum"), [])
    assert value("distserve_handoffs_total", P_LABELS) == 1
    assert value("distserve_handoff_seconds_sum", P_LABELS) == pytest.approx(2.0)
    assert value("distserve_kv_transfer_sent_bytes_total", P_LABELS) == 1000
    assert value("distserve_handoff_aborts_total", {**P_LABELS, "cause": "no_room"}) == 1
    assert value("distserve_handoff_aborts_total", {**P_LABELS, "cause": "peer_lost"}) == 1
    assert value("distserve_kv_transfer_failures_total", {**P_LABELS, "cause": "timeout"}) == 1
    assert value("distserve_kv_checksum_failures_total", P_LABELS) == 1


def member(ref: InstanceRef, role: Role) -> Member:
    spec = ModelSpec("tiny", "f", 10, 64, (2,), 1, 1, 8, "float32", 16, 8)
    return Member(Endpoint(ref, "a:1"), role, spec)


def test_the_cluster_counts_members_and_placements(registry: CollectorRegistry) -> None:
    metrics = ClusterMetrics(registry)
    gateway = GatewayRef("g", 1)
    prefill, decode = member(P, Role.PREFILL), member(D, Role.DECODE)
    changed = events.MembersChanged(2, (prefill, decode))
    metrics.write(0.0, events.Joined(decode, Load()), [effects.Send(gateway, changed), effects.Send(P, changed)])
    split = events.Dispatched("r", 1, prefill.endpoint, decode.endpoint, Placement.DISAGGREGATED)
    whole = events.Dispatched("r", 1, decode.endpoint, decode.endpoint, Placement.OVERFLOW)
    refused = events.DispatchRefused("q", 1, Code.RESOURCE_EXHAUSTED, "full", 1.0)
    metrics.write(0.0, events.Tick(), [effects.Send(gateway, e) for e in (split, whole, whole, refused)])
    value = registry.get_sample_value
    assert [value("distserve_instances", {"role": r.value}) for r in Role] == [1, 1, 0]
    counts = {"disaggregated": 1, "colocated": 0, "local": 0, "overflow": 2}
    assert {kind: value("distserve_dispatches_total", {"kind": kind}) for kind in counts} == counts
    assert value("distserve_dispatch_refusals_total", {"code": "resource_exhausted"}) == 1


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        ("the lease ran out", "timeout"),
        ("no room within 60 s", "no_room"),
        ("checksum of stage 3 is wrong", "corrupt"),
        ("peer died", "peer_lost"),
        ("quite unheard of", "other"),
    ],
)
def test_free_words_become_few_causes(words: str, cause: str) -> None:
    assert cause_of(words) == cause
    assert len({name for name, _ in CAUSES}) == len(CAUSES)


def test_texts_of_several_processes_merge_into_one_valid_text() -> None:
    texts = []
    for name in ("p0", "d0"):
        one = CollectorRegistry()
        metrics = InstanceMetrics(one, model_name="tiny", instance=name, role=Role.MIXED)
        metrics.write(0.0, events.StepDone(1, (), 0.1), [])
        one.register(ProcessCost(name))
        texts.append(text(one))
    merged = merge(texts).decode()
    families = list(text_string_to_metric_families(merged))
    names = [f.name for f in families]
    assert len(names) == len(set(names))
    assert merged.count("# TYPE distserve_step_seconds histogram") == 1
    counts = [s for f in families for s in f.samples if s.name == "distserve_step_seconds_count"]
    assert sorted(s.labels["instance"] for s in counts) == ["d0", "p0"]
    assert all(s.value == 1 for s in counts)
    separate = {(s.name, *sorted(s.labels.items())) for t in texts for f in text_string_to_metric_families(t.decode())
                for s in f.samples}  # fmt: skip
    assert {(s.name, *sorted(s.labels.items())) for f in families for s in f.samples} == separate


async def get(port: int, target: str) -> tuple[int, bytes]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"{target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    answer = await reader.read()
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


async def test_the_operations_port_answers_probes_and_scrapes() -> None:
    registry = CollectorRegistry()
    registry.register(ProcessCost("p0"))
    ready = False

    async def exposition() -> bytes:
        return text(registry)

    server = OpsServer(exposition, alive=lambda: True, ready=lambda: ready)
    port = await server.start("127.0.0.1", 0)
    try:
        assert await get(port, "GET /livez") == (200, b"ok\n")
        assert (await get(port, "GET /readyz"))[0] == 503
        ready = True
        assert (await get(port, "GET /readyz?verbose"))[0] == 200
        status, body = await get(port, "GET /metrics")
        assert status == 200
        assert b'distserve_process_cpu_seconds_total{process="p0"}' in body
        assert (await get(port, "GET /nothing"))[0] == 404
        assert (await get(port, "POST /metrics"))[0] == 405
        with pytest.raises(OSError):
            await OpsServer(exposition, lambda: True, lambda: True).start("127.0.0.1", port)
    finally:
        await server.stop()
