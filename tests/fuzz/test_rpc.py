"""gRPC from strangers: every public call, its message bent or none at all, ends in an answer or a status of ours."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from hypothesis import given
from hypothesis import strategies as st

from distserve.gateway.rpc.server import PUBLIC_SERVICES
from distserve.oip.v2 import grpc_service_pb2 as oip
from distserve.v1 import admin_pb2, inference_pb2
from tests.fuzz.front import GENERATE, Front
from tests.fuzz.hostile import bent_bytes, bent_messages, bounded, messages

GENERATING = inference_pb2.GenerateRequest(
    text="Hello",
    model="tiny",
    request_id="r",
    sampling=inference_pb2.SamplingParams(temperature=0.5, top_p=0.9, n=2, logit_bias={5: 1.0}),
    stopping=inference_pb2.StoppingCriteria(max_tokens=3, stop=["x"], stop_token_ids=[7]),
    output=inference_pb2.OutputOptions(logprobs=1),
)
CHATTING = inference_pb2.GenerateRequest(
    chat=inference_pb2.ChatPrompt(messages=[inference_pb2.ChatMessage(role="user", content="Hi")]),
    stopping=inference_pb2.StoppingCriteria(max_tokens=3),
)
INFERRING = oip.ModelInferRequest(model_name="tiny", id="i")
for _name, _text in (("text_input", b"Hello"), ("sampling_parameters", b'{"max_tokens": 3, "top_k": 5}')):
    _tensor = INFERRING.inputs.add(name=_name, datatype="BYTES", shape=[1])
    _tensor.contents.bytes_contents.append(_text)
INFERRING.parameters["seed"].int64_param = 3
INFERRING.outputs.add(name="text_output")

SEEDS: dict[str, list[Message]] = {
    "GenerateRequest": [GENERATING, CHATTING],
    "ModelInferRequest": [INFERRING],
    "TokenizeRequest": [inference_pb2.TokenizeRequest(text="Hello", model="tiny")],
    "DetokenizeRequest": [inference_pb2.DetokenizeRequest(model="tiny", token_ids=[1, 2])],
    "GetRequestRequest": [admin_pb2.GetRequestRequest(request_id="r")],
    "ModelReadyRequest": [oip.ModelReadyRequest(name="tiny", version="1")],
}
HEALTH = "grpc.health.v1.Health"
OURS = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.FAILED_PRECONDITION,
}


def _methods() -> Iterator[tuple[str, MethodDescriptor]]:
    """Every public call that ends by itself."""
    for module in (inference_pb2, admin_pb2, oip, health_pb2):
        for service in module.DESCRIPTOR.services_by_name.values():
            assert service.full_name in (*PUBLIC_SERVICES, HEALTH)
            for method in service.methods:
                if not method.name.startswith("Watch"):
                    yield f"/{service.full_name}/{method.name}", method


METHODS = dict(_methods())


def seeds(method: MethodDescriptor) -> list[Message]:
    kind = method.input_type
    return SEEDS.get(kind.name) or [GetMessageClass(kind)()]


def check(front: Front, method: str, request: bytes) -> grpc.StatusCode:
    code, said, _ = front.run(front.call(method, request))
    assert code in OURS, f"{code.name}: {said[:400]}"
    assert code is grpc.StatusCode.OK or said.strip()
    front.still_serves()
    front.run(front.served_over_grpc())
    return code


@bounded(140)
@given(data=st.data())
def test_messages_near_valid_ones(front: Front, data: st.DataObject) -> None:
    method = data.draw(st.sampled_from(sorted(METHODS)))
    seed = data.draw(st.sampled_from(seeds(METHODS[method])))
    message = data.draw(bent_messages(seed) | messages(type(seed)))
    check(front, method, message.SerializeToString())


@bounded(80)
@given(data=st.data())
def test_bytes_that_are_no_message(front: Front, data: st.DataObject) -> None:
    method = data.draw(st.sampled_from(sorted(METHODS)))
    seed = data.draw(st.sampled_from(seeds(METHODS[method]))).SerializeToString()
    check(front, method, data.draw(bent_bytes(seed) | st.binary(max_size=60)))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_message_that_cannot_be_decoded_is_the_clients_error(front: Front, method: str) -> None:
    code, said, _ = front.run(front.call(method, b"\x0a\xff\xff\xff\xff\x0f"))
    assert (code, "protobuf" in said) == (grpc.StatusCode.INVALID_ARGUMENT, True), said


def test_a_long_name_does_not_become_another_status(front: Front) -> None:
    """A refusal that quotes it would not fit into gRPC's trailers."""
    name = "🙂" * 50_000
    asked = inference_pb2.GenerateRequest(text="Hello", model=name)
    assert check(front, GENERATE, asked.SerializeToString()) is grpc.StatusCode.NOT_FOUND
    tensor = oip.ModelInferRequest.InferInputTensor(name=name, datatype="INT8")
    inferring = oip.ModelInferRequest(model_name="tiny", inputs=[tensor])
    code = check(front, "/inference.GRPCInferenceService/ModelInfer", inferring.SerializeToString())
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    service = health_pb2.HealthCheckRequest(service="x" * 50_000)
    assert check(front, f"/{HEALTH}/Check", service.SerializeToString()) is grpc.StatusCode.NOT_FOUND


def test_a_shape_of_a_million_dimensions_costs_nothing(front: Front) -> None:
    """Their product would have a million digits."""
    inferring = oip.ModelInferRequest()
    inferring.CopyFrom(INFERRING)
    inferring.inputs[0].shape.extend([127] * 1_000_000)
    code, said, _ = front.run(front.call("/inference.GRPCInferenceService/ModelInfer", inferring.SerializeToString()))
    assert code is grpc.StatusCode.INVALID_ARGUMENT and "dimensions" in said


def test_an_output_asked_for_twice_is_refused(front: Front) -> None:
    """A small request must not ask for a large answer many times over."""
    inferring = oip.ModelInferRequest()
    inferring.CopyFrom(INFERRING)
    for _ in range(1000):
        inferring.outputs.add(name="text_output")
    code, said, _ = front.run(front.call("/inference.GRPCInferenceService/ModelInfer", inferring.SerializeToString()))
    assert code is grpc.StatusCode.INVALID_ARGUMENT and "twice" in said
