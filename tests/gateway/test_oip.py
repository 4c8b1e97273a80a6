"""The Open Inference Protocol v2: the six standard calls."""

from __future__ import annotations

import json
import struct
from typing import Any

import grpc
import pytest

from distserve.gateway.text import TextCodec
from distserve.oip.v2 import grpc_service_pb2 as pb
from distserve.oip.v2 import grpc_service_pb2_grpc
from tests.gateway.fake_backend import FakeBackend, Script


@pytest.fixture
def stub(channel: grpc.aio.Channel) -> Any:
    return grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)


def texts(name: str, *values: str, shape: list[int] | None = None) -> pb.ModelInferRequest.InferInputTensor:
    tensor = pb.ModelInferRequest.InferInputTensor(name=name, datatype="BYTES", shape=shape or [len(values)])
    tensor.contents.bytes_contents.extend(value.encode() for value in values)
    return tensor


def infer(*tensors: pb.ModelInferRequest.InferInputTensor, **parameters: Any) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="tiny", id="i1", inputs=tensors)
    for name, value in parameters.items():
        kind = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}[type(value)]
        setattr(request.parameters[name], kind, value)
    return request


async def test_the_server_and_its_model(stub: Any, backend: FakeBackend) -> None:
    assert (await stub.ServerLive(pb.ServerLiveRequest())).live
    assert (await stub.ServerReady(pb.ServerReadyRequest())).ready
    assert (await stub.ModelReady(pb.ModelReadyRequest(name="tiny", version="1"))).ready
    assert (await stub.ServerMetadata(pb.ServerMetadataRequest())).name == "distserve"
    model = await stub.ModelMetadata(pb.ModelMetadataRequest(name="tiny"))
    assert [(t.name, t.datatype, list(t.shape)) for t in model.outputs] == [
        ("text_output", "BYTES", [-1]),
        ("finish_reason", "BYTES", [-1]),
    ]
    assert model.inputs[0].name == "text_input"
    backend.is_ready = False
    assert not (await stub.ServerReady(pb.ServerReadyRequest())).ready
    assert not (await stub.ModelReady(pb.ModelReadyRequest(name="tiny"))).ready
    for wrong in (pb.ModelReadyRequest(name="huge"), pb.ModelReadyRequest(name="tiny", version="9")):
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await stub.ModelReady(wrong)
        assert failed.value.code() is grpc.StatusCode.NOT_FOUND


async def test_text_in_text_out(stub: Any, backend: FakeBackend, codec: TextCodec) -> None:
    backend.script = Script(tokens=[*codec.encode(" fox 🙂"), 2])
    request = infer(texts("text_input", "The quick", shape=[1, 1]), max_tokens=50, temperature=0.5, seed=3)
    answer = await stub.ModelInfer(request)
    assert (answer.model_name, answer.id) == ("tiny", "i1")
    outputs = {tensor.name: list(tensor.contents.bytes_contents) for tensor in answer.outputs}
    assert outputs == {"text_output": [" fox 🙂".encode()], "finish_reason": [b"stop"]}
    asked = backend.submitted[0]
    assert (asked.id, asked.sampling.temperature, asked.sampling.seed) == ("i1", 0.5, 3)
    assert asked.prompt_token_ids == codec.encode("The quick")
    assert answer.parameters["prefill_instance"].string_param == "p0#1"


async def test_raw_contents_and_triton_names(stub: Any, backend: FakeBackend, codec: TextCodec) -> None:
    parameters = json.dumps({"max_tokens": 2, "stop": ["zz"], "ignore_eos": True}).encode()
    request = pb.ModelInferRequest(model_name="tiny")
    for name, values in (("text_input", [b"a", "🙂".encode()]), ("sampling_parameters", [parameters])):
        request.inputs.add(name=name, datatype="BYTES", shape=[len(values)])
        request.raw_input_contents.append(b"".join(struct.pack("<I", len(v)) + v for v in values))
    request.outputs.add(name="text_output")
    answer = await stub.ModelInfer(request)
    expected = codec.decode([65, 65]).encode()
    assert list(answer.outputs[0].shape) == [2] and not answer.outputs[0].HasField("contents")
    assert list(answer.raw_output_contents) == [(struct.pack("<I", len(expected)) + expected) * 2]
    assert [r.stopping.max_tokens for r in backend.submitted] == [2, 2]


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (infer(), "text_input is missing"),
        (infer(texts("text_input", "")), "empty"),
        (infer(texts("text_input", "a"), texts("image", "b")), "no input tensor 'image'"),
        (infer(texts("text_input", "a", shape=[2])), "shape"),
        (infer(texts("text_input", "a"), stream=True), "Generate"),
        (infer(texts("text_input", "a"), temperature="hot"), "temperature must be a number"),
        (infer(texts("text_input", "a"), temperature=9.0), "from 0 to 2"),
        (infer(texts("text_input", "a"), texts("sampling_parameters", "{")), "not valid JSON"),
        (infer(texts("text_input", "a"), texts("sampling_parameters", "[]")), "JSON object"),
    ],
)
async def test_bad_tensors(stub: Any, request_: pb.ModelInferRequest, said: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await stub.ModelInfer(request_)
    assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert said in (failed.value.details() or "")


@pytest.mark.parametrize("raw", [b"\x01", b"\x05\x00\x00\x00ab", b"\x01\x00\x00\x00\xff"])
async def test_bad_raw_contents(stub: Any, raw: bytes) -> None:
    request = pb.ModelInferRequest(model_name="tiny", raw_input_contents=[raw])
    request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    request.outputs.add(name="text_output")
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await stub.ModelInfer(request)
    assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    request.outputs.add(name="logits")
    with pytest.raises(grpc.aio.AioRpcError):
        await stub.ModelInfer(request)
