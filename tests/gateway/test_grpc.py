"""The gRPC services through real channels: events, errors with details, deadlines, cancellation, health, reflection."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool, message_factory
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status

from distserve.core.types import Code, FinishReason
from distserve.gateway.auth import ApiKeys
from distserve.gateway.backend import RequestFailed
from distserve.gateway.frontend import FrontEnd
from distserve.gateway.ports import PortUnavailable
from distserve.gateway.rpc.server import PUBLIC_SERVICES, GrpcServer, build_grpc_server
from distserve.gateway.text import TextCodec
from distserve.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc
from tests.gateway.fake_backend import FakeBackend, Script

ANSWER = " The capital of France is Paris. 🙂"


@pytest.fixture
def stub(channel: grpc.aio.Channel) -> Any:
    return inference_pb2_grpc.InferenceServiceStub(channel)


@pytest.fixture
def admin(channel: grpc.aio.Channel) -> Any:
    return admin_pb2_grpc.AdminServiceStub(channel)


def ask(text: str = "What?", **fields: Any) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(text=text, **fields)


def limited(count: int, **fields: Any) -> inference_pb2.StoppingCriteria:
    return inference_pb2.StoppingCriteria(max_tokens=count, **fields)


async def read(call: Any) -> list[Any]:
    return [response async for response in call]


def details(error: grpc.aio.AioRpcError) -> dict[str, Any]:
    """google.rpc details by message name."""
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    assert status is not None and status.code == error.code().value[0]
    found = {}
    for box in status.details:
        kind = getattr(error_details_pb2, box.TypeName().removeprefix("google.rpc."))
        found[kind.__name__] = kind.FromString(box.value)
    return found


@pytest.mark.parametrize("batch", [1, 4, 100])
async def test_generate(stub: Any, backend: FakeBackend, codec: TextCodec, batch: int) -> None:
    tokens = [*codec.encode(ANSWER), 2]
    backend.script = Script(tokens=tokens, batch=batch)
    call = stub.Generate(ask(request_id="r1", stopping=limited(100)))
    assert ("x-request-id", "r1") in tuple(await call.initial_metadata())
    events = await read(call)
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[0] == "accepted" and kinds[-2:] == ["finished", "summary"]
    assert set(kinds[1:-2]) == {"delta"}
    accepted, finished, summary = events[0].accepted, events[-2].finished, events[-1].summary
    assert (accepted.request_id, accepted.model, accepted.max_tokens) == ("r1", "tiny", 100)
    assert accepted.seed == backend.submitted[0].sampling.seed
    deltas = [event.delta for event in events[1:-2]]
    assert "".join(d.text for d in deltas) == ANSWER
    assert [t for d in deltas for t in d.token_ids] == tokens
    firsts = [d.first_token for d in deltas if d.token_ids]
    assert firsts == list(range(0, len(tokens), batch))
    assert finished.reason == inference_pb2.Finished.REASON_STOP and finished.stop_token_id == 2
    usage = summary.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(codec.encode("What?")), len(tokens))
    assert (summary.served.prefill_instance, summary.served.decode_instance) == ("p0#1", "d0#2")
    parts = summary.served.timings
    assert parts.gateway_s + parts.dispatch_s + parts.queue_s + parts.prefill_s == pytest.approx(parts.ttft_s)
    assert summary.served.kv_bytes_moved == 4096


async def test_chat_ids_and_several_choices(stub: Any, backend: FakeBackend, codec: TextCodec) -> None:
    message = inference_pb2.ChatMessage(role="user", content="Hi")
    chat = inference_pb2.ChatPrompt(messages=[message])
    await read(stub.Generate(inference_pb2.GenerateRequest(chat=chat, stopping=limited(2))))
    ids = inference_pb2.TokenIds(ids=[5, 6])
    sampling = inference_pb2.SamplingParams(n=3, seed=2**64 - 1)
    events = await read(
        stub.Generate(inference_pb2.GenerateRequest(token_ids=ids, sampling=sampling, stopping=limited(2)))
    )
    rendered = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert backend.submitted[0].prompt_token_ids == codec.encode(rendered)
    assert [r.prompt_token_ids for r in backend.submitted[1:]] == [(5, 6)] * 3
    assert [r.sampling.seed for r in backend.submitted[1:]] == [2**64 - 1, 0, 1]
    assert sorted(e.finished.index for e in events if e.HasField("finished")) == [0, 1, 2]
    assert events[-1].summary.usage.completion_tokens == 6 and events[-1].summary.usage.prompt_tokens == 2


async def test_unset_sampling_is_the_default_not_zero(stub: Any, backend: FakeBackend) -> None:
    await read(stub.Generate(ask(stopping=limited(1))))
    sampling = backend.submitted[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.repetition_penalty) == (1.0, 1.0, 1.0)
    await read(stub.Generate(ask(stopping=limited(1), sampling=inference_pb2.SamplingParams(temperature=0))))
    assert backend.submitted[1].sampling.temperature == 0.0
    await read(stub.Generate(ask(), timeout=30))
    assert backend.submitted[2].stopping.max_tokens == 256 - len(backend.submitted[2].prompt_token_ids)
    assert 0 < backend.submitted[2].timeout_s <= 31


async def test_stop_texts_and_logprobs(stub: Any, backend: FakeBackend, codec: TextCodec) -> None:
    backend.script = Script(tokens=codec.encode(ANSWER))
    output = inference_pb2.OutputOptions(logprobs=1)
    stopping = limited(100, stop=["of Fra"], include_stop_str_in_output=True)
    events = await read(stub.Generate(ask(request_id="s", stopping=stopping, output=output)))
    deltas = [e.delta for e in events if e.HasField("delta")]
    assert "".join(d.text for d in deltas) == " The capital of Fra"
    assert events[-2].finished.stop == "of Fra"
    assert all(len(d.logprobs) == len(d.token_ids) for d in deltas)
    assert deltas[0].logprobs[0].top[0].token == codec.token_bytes(deltas[0].token_ids[0])
    assert backend.closed == {"s": FinishReason.STOP}
    assert events[-1].summary.usage.completion_tokens == sum(len(d.token_ids) for d in deltas)


@pytest.mark.parametrize(
    ("request_", "field", "said"),
    [
        (ask(""), "text", "empty"),
        (inference_pb2.GenerateRequest(), "prompt", "missing"),
        (inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=[512])), "token_ids", "512"),
        (inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=[7] * 256)), "token_ids", "256"),
        (inference_pb2.GenerateRequest(chat=inference_pb2.ChatPrompt()), "chat.messages", "at least one"),
        (ask(stopping=limited(5000)), "stopping.max_tokens", "5000"),
        (ask(stopping=limited(0)), "stopping.max_tokens", "at least 1"),
        (ask(sampling=inference_pb2.SamplingParams(temperature=-1)), "sampling.temperature", "from 0 to 2"),
        (ask(sampling=inference_pb2.SamplingParams(temperature=float("nan"))), "sampling.temperature", "nan"),
        (ask(sampling=inference_pb2.SamplingParams(top_p=float("inf"))), "sampling.top_p", "inf"),
        (ask(sampling=inference_pb2.SamplingParams(n=0)), "sampling.n", "from 1 to 16"),
        (ask(output=inference_pb2.OutputOptions(logprobs=99)), "output.logprobs", "from 0 to 20"),
        (ask(request_id="a b"), "request_id", "printable"),
    ],
)
async def test_bad_requests(stub: Any, backend: FakeBackend, request_: Any, field: str, said: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await read(stub.Generate(request_))
    assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert said in (failed.value.details() or "")
    found = details(failed.value)
    assert (found["ErrorInfo"].domain, found["ErrorInfo"].reason) == ("distserve.dev", "INVALID_ARGUMENT")
    assert found["BadRequest"].field_violations[0].field == field
    assert backend.submitted == []


async def test_an_unknown_model(stub: Any, refusals: list[tuple[str, Code]]) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await read(stub.Generate(ask(model="huge")))
    assert failed.value.code() is grpc.StatusCode.NOT_FOUND
    assert refusals == [("grpc", Code.NOT_FOUND)]


async def test_overload_says_when_to_come_back(stub: Any, backend: FakeBackend) -> None:
    backend.script.refuse = RequestFailed(Code.RESOURCE_EXHAUSTED, "The queue is full.", 2.5)
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await read(stub.Generate(ask()))
    assert failed.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details(failed.value)["RetryInfo"].retry_delay.ToTimedelta().total_seconds() == 2.5


async def test_an_error_after_tokens_is_the_calls_status(stub: Any, backend: FakeBackend) -> None:
    backend.script.fail_at = 3
    got = []
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        async for event in stub.Generate(ask()):
            got.append(event.WhichOneof("event"))
    assert got == ["accepted", "delta", "delta", "delta"]
    assert failed.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_bug_is_told_as_ours(stub: Any, backend: FakeBackend) -> None:
    backend.script = Script(each=lambda _request, position: 1 // position)
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await read(stub.Generate(ask()))
    assert failed.value.code() is grpc.StatusCode.INTERNAL
    assert "division" not in (failed.value.details() or "")


async def test_a_duplicate_id(stub: Any, backend: FakeBackend) -> None:
    backend.script.hold_at = 1
    first = stub.Generate(ask(), metadata=(("x-request-id", "same"),))
    await first.initial_metadata()
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await read(stub.Generate(ask(request_id="same")))
    assert failed.value.code() is grpc.StatusCode.ALREADY_EXISTS
    backend.go.set()
    assert (await read(first))[-1].HasField("summary")


@pytest.mark.parametrize("at", [0, 3])
async def test_cancelling_the_call_reaches_the_backend(stub: Any, backend: FakeBackend, at: int) -> None:
    backend.script.hold_at = at
    call = stub.Generate(ask(request_id="gone", sampling=inference_pb2.SamplingParams(n=2)))
    await call.initial_metadata()
    call.cancel()
    await backend.until(lambda: len(backend.closed) == 2)
    assert backend.closed == {"gone-0": FinishReason.CANCELLED, "gone-1": FinishReason.CANCELLED}


async def test_a_deadline_ends_the_request(stub: Any, backend: FakeBackend) -> None:
    backend.script.hold_at = 2
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await read(stub.Generate(ask(request_id="late"), timeout=0.3))
    assert failed.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await backend.until(lambda: bool(backend.closed))
    assert backend.closed == {"late": FinishReason.CANCELLED}
    assert 0 < backend.submitted[0].timeout_s < 1


async def test_tokenize_detokenize_and_models(stub: Any, codec: TextCodec) -> None:
    answer = await stub.Tokenize(inference_pb2.TokenizeRequest(text="Grüße 🙂"))
    assert tuple(answer.token_ids) == codec.encode("Grüße 🙂") and answer.max_model_len == 256
    back = await stub.Detokenize(inference_pb2.DetokenizeRequest(token_ids=answer.token_ids))
    assert back.text == "Grüße 🙂"
    (model,) = (await stub.ListModels(inference_pb2.ListModelsRequest())).models
    assert (model.name, model.vocab_size, list(model.eos_token_ids), model.chat) == ("tiny", 512, [2], True)
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await stub.Detokenize(inference_pb2.DetokenizeRequest(token_ids=[5000]))
    assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_admin(admin: Any, stub: Any, backend: FakeBackend) -> None:
    listed = await admin.ListInstances(admin_pb2.ListInstancesRequest())
    assert [(i.id, i.incarnation, i.role, i.load.running) for i in listed.instances] == [
        ("p0", 1, 1, 1),
        ("d0", 2, 2, 1),
    ]
    assert listed.ready
    (kv,) = (await admin.KvCheck(admin_pb2.ClusterKvCheckRequest())).instances
    assert (kv.total, dict(kv.by_state), kv.problem) == (64, {"free": 60, "owned": 4}, "")
    backend.script.hold_at = 2
    call = stub.Generate(ask(request_id="here"))
    await call.initial_metadata()
    found = await admin.GetRequest(admin_pb2.GetRequestRequest(request_id="here"))
    assert (found.phase, found.owner, found.waits_for) == ("decoding", "d0#2", "a step")
    assert (await admin.Cancel(admin_pb2.CancelRequest(request_id="here"))).cancelled
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        await read(call)
    assert ended.value.code() is grpc.StatusCode.CANCELLED
    assert not (await admin.Cancel(admin_pb2.CancelRequest(request_id="here"))).cancelled
    with pytest.raises(grpc.aio.AioRpcError) as unknown:
        await admin.GetRequest(admin_pb2.GetRequestRequest(request_id="here"))
    assert unknown.value.code() is grpc.StatusCode.NOT_FOUND


async def test_health_follows_readiness(channel: Any, backend: FakeBackend, grpc_server: GrpcServer) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    known = health_pb2.HealthCheckResponse

    async def status(service: str) -> Any:
        return (await health.Check(health_pb2.HealthCheckRequest(service=service))).status

    for service in ("", "readiness", "liveness", *PUBLIC_SERVICES):
        assert await status(service) == known.SERVING
    watches = [health.Watch(health_pb2.HealthCheckRequest(service=s)) for s in ("", "", "liveness", "unknown")]
    told = [(await watch.read()).status for watch in watches]
    assert told == [known.SERVING, known.SERVING, known.SERVING, known.SERVICE_UNKNOWN]
    watches[0].cancel()  # one watcher that leaves takes nobody with it
    backend.is_ready = False
    grpc_server.refresh_health()
    assert (await watches[1].read()).status == known.NOT_SERVING
    assert await status("") == known.NOT_SERVING and await status("liveness") == known.SERVING
    with pytest.raises(grpc.aio.AioRpcError) as unknown:
        await status("unknown")
    assert unknown.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_call_made_from_reflection_alone(grpc_server: GrpcServer, backend: FakeBackend) -> None:
    """As grpcurl does: nothing of ours is known to the client."""

    def call() -> tuple[set[str], list[str]]:
        with grpc.insecure_channel(f"127.0.0.1:{grpc_server.port}") as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            pool = descriptor_pool.DescriptorPool(database)
            service = pool.FindServiceByName("distserve.v1.InferenceService")
            method = service.FindMethodByName("Generate")
            request_kind = message_factory.GetMessageClass(method.input_type)
            response_kind = message_factory.GetMessageClass(method.output_type)
            generate = channel.unary_stream(
                f"/{service.full_name}/{method.name}",
                request_serializer=request_kind.SerializeToString,
                response_deserializer=response_kind.FromString,
            )
            request: Any = request_kind(text="What?")
            request.stopping.max_tokens = 3
            events = list(generate(request, timeout=20))
            return set(database.get_services()), [event.WhichOneof("event") for event in events]

    services, events = await asyncio.to_thread(call)
    assert {*PUBLIC_SERVICES, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"} == services
    assert events == ["accepted", "delta", "delta", "delta", "finished", "summary"]


async def test_keys(backend: FakeBackend, codec: TextCodec) -> None:
    server = build_grpc_server(FrontEnd(backend, {"tiny": codec}, keys=ApiKeys(["sesame"])))
    port = await server.start("127.0.0.1", 0)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await stub.ListModels(inference_pb2.ListModelsRequest())
        assert failed.value.code() is grpc.StatusCode.UNAUTHENTICATED
        metadata = (("authorization", "Bearer sesame"),)
        assert (await stub.ListModels(inference_pb2.ListModelsRequest(), metadata=metadata)).models
    await server.stop(grace_s=0)


async def test_a_message_beyond_the_limit(stub: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await read(stub.Generate(ask("x" * (5 << 20))))
    assert failed.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_port_in_use_is_a_sentence(front_end: FrontEnd, grpc_server: GrpcServer) -> None:
    with pytest.raises(PortUnavailable, match=f"127.0.0.1:{grpc_server.port} .*--grpc-port"):
        await build_grpc_server(front_end).start("127.0.0.1", grpc_server.port)


async def test_stopping(front_end: FrontEnd, backend: FakeBackend) -> None:
    """New calls are refused at once; a running one finishes."""
    server = build_grpc_server(front_end)
    port = await server.start("127.0.0.1", 0)
    backend.script.hold_at = 1
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        health = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest())
        await watch.read()
        running = stub.Generate(ask(stopping=limited(3)))
        await running.initial_metadata()
        stopping = asyncio.create_task(server.stop(grace_s=20))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        backend.go.set()
        assert (await read(running))[-1].HasField("summary")
        await stopping
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await stub.ListModels(inference_pb2.ListModelsRequest())
        assert failed.value.code() is grpc.StatusCode.UNAVAILABLE
