"""``inference.GRPCInferenceService``, the Open Inference Protocol v2: text tensors in, text tensors out.

Owns the tensor names: ``text_input`` (BYTES, one element a prompt) and, as Triton's LLM back ends have it,
``sampling_parameters`` (BYTES, one JSON object) in; ``text_output`` and ``finish_reason`` out. Sampling parameters may
also be request parameters. There is no streaming in the standard; ``InferenceService.Generate`` streams.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from distserve import __version__
from distserve.core.types import Code
from distserve.gateway.answer import Answer, Ended
from distserve.gateway.ask import Ask
from distserve.gateway.backend import RequestFailed
from distserve.gateway.fields import Fields, generation_fields, refuse
from distserve.gateway.frontend import FrontEnd
from distserve.gateway.plan import invalid
from distserve.gateway.rpc.calls import Call, Context
from distserve.oip.v2 import grpc_service_pb2 as pb
from distserve.oip.v2 import grpc_service_pb2_grpc

VERSION = "1"
OUTPUTS = ("text_output", "finish_reason")
MAX_DIMENSIONS = 8  # of a tensor; text needs one, or two with a batch of one
_Metadata = pb.ModelMetadataResponse.TensorMetadata
_Tensor = pb.ModelInferResponse.InferOutputTensor


class OipServicer(grpc_service_pb2_grpc.GRPCInferenceServiceServicer):
    """Serves one gateway's front end to KServe and Triton clients."""

    def __init__(self, front_end: FrontEnd) -> None:
        self._front_end = front_end

    async def ServerLive(self, request: pb.ServerLiveRequest, context: Context) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: Context) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self._front_end.backend.ready())

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Context) -> pb.ModelReadyResponse:
        async with Call(context, self._front_end, "oip"):
            view = self._front_end.model(_versioned(request.name, request.version))
            return pb.ModelReadyResponse(ready=view.max_tokens > 0 and self._front_end.backend.ready())

    async def ServerMetadata(self, request: pb.ServerMetadataRequest, context: Context) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(name="distserve", version=__version__)

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: Context) -> pb.ModelMetadataResponse:
        async with Call(context, self._front_end, "oip"):
            view = self._front_end.model(_versioned(request.name, request.version))
            return pb.ModelMetadataResponse(
                name=view.name,
                versions=[VERSION],
                platform="distserve",
                inputs=[_text("text_input"), _text("sampling_parameters")],
                outputs=[_text(name) for name in OUTPUTS],
            )

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Context) -> pb.ModelInferResponse:
        async with Call(context, self._front_end, "oip") as call:
            plan = await self._front_end.plan(_ask(request, call))
            answer = await self._front_end.open(plan, call.caller)
            try:
                await call.name(plan.request_id)
                texts, ends = await _collect(answer)
            finally:
                await answer.aclose()
            return _response(request, plan.served.name, texts, ends)


def _versioned(name: str, version: str) -> str:
    """The model's name, when the version is one there is."""
    if version not in ("", VERSION):
        raise RequestFailed(
            Code.NOT_FOUND, f"Version '{version}' does not exist; leave it out or ask for '{VERSION}'.", param="version"
        )
    return name


async def _collect(answer: Answer) -> tuple[list[str], list[Ended]]:
    """Each choice's whole text and end, by index."""
    parts: list[list[str]] = [[] for _ in answer.choices]
    ends = []
    async for event in answer:
        if isinstance(event, Ended):
            ends.append(event)
        else:
            parts[event.index].append(event.text)
    return ["".join(p) for p in parts], sorted(ends, key=lambda ended: ended.index)


# ── in ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _ask(request: pb.ModelInferRequest, call: Call) -> Ask:
    tensors = _inputs(request)
    fields = Fields(_parameters(tensors.pop("sampling_parameters", ()), request.parameters))
    prompts = tensors.pop("text_input", None)
    if prompts is None:
        raise invalid("text_input", "The input tensor text_input is missing; it is BYTES with one element a prompt.")
    if unknown := next(iter(tensors), None):
        raise invalid(unknown, f"There is no input tensor '{unknown}'; send text_input and sampling_parameters.")
    _check_outputs(request)
    refuse(fields, {"stream": "call distserve.v1.InferenceService.Generate to stream"})
    return Ask(
        prompts=prompts,
        model=_versioned(request.model_name, request.model_version),
        request_id=request.id or call.request_id,
        n=fields.whole("n"),
        max_tokens=fields.whole("max_tokens"),
        trace=call.trace,
        names={"prompt": "text_input"},
        **(generation_fields(fields) | {"timeout_s": call.time_left_s}),
    )


def _inputs(request: pb.ModelInferRequest) -> dict[str, tuple[str, ...]]:
    """Every input tensor's elements as text."""
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise invalid(
            "raw_input_contents", f"There are {len(request.inputs)} inputs, but {len(raw)} raw contents; send one each."
        )
    tensors: dict[str, tuple[str, ...]] = {}
    for position, tensor in enumerate(request.inputs):
        if tensor.datatype != "BYTES":
            raise invalid(tensor.name, f"The input '{tensor.name}' is {tensor.datatype}, but must be BYTES.")
        elements = _unpacked(tensor.name, raw[position]) if raw else list(tensor.contents.bytes_contents)
        if len(tensor.shape) > MAX_DIMENSIONS:
            count = len(tensor.shape)
            raise invalid(tensor.name, f"The input '{tensor.name}' has {count} dimensions; send at most two.")
        if math.prod(tensor.shape) != len(elements):
            shape = list(tensor.shape)
            raise invalid(tensor.name, f"The input '{tensor.name}' has shape {shape} but {len(elements)} elements.")
        if tensor.name in tensors:
            raise invalid(tensor.name, f"The input '{tensor.name}' is there twice; send it once.")
        tensors[tensor.name] = tuple(_decoded(tensor.name, element) for element in elements)
    return tensors


def _check_outputs(request: pb.ModelInferRequest) -> None:
    names = [output.name for output in request.outputs]
    unknown = next((name for name in names if name not in OUTPUTS), None)
    if unknown is not None:
        raise invalid(unknown, f"There is no output tensor '{unknown}'; there are text_output and finish_reason.")
    if len(names) > len(set(names)):
        raise invalid("outputs", "An output tensor is asked for twice; ask for each once.")


def _unpacked(name: str, raw: bytes) -> list[bytes]:
    """Raw BYTES: each element is its length (four bytes, little endian) and its bytes."""
    elements, at = [], 0
    while at < len(raw):
        if at + 4 > len(raw):
            raise invalid(name, f"The raw contents of '{name}' end inside an element's length.")
        (length,) = struct.unpack_from("<I", raw, at)
        at += 4 + length
        if at > len(raw):
            raise invalid(name, f"The raw contents of '{name}' end inside an element.")
        elements.append(raw[at - length : at])
    return elements


def _decoded(name: str, element: bytes) -> str:
    try:
        return element.decode()
    except UnicodeDecodeError as error:
        raise invalid(name, f"An element of '{name}' is not UTF-8: {error}.") from error


def _parameters(sampling: Sequence[str], given: Mapping[str, pb.InferParameter]) -> dict[str, Any]:
    """The JSON of the tensor, overridden by the request's own parameters."""
    values: dict[str, Any] = {}
    for text in sampling:
        try:
            parsed = orjson.loads(text)
        except orjson.JSONDecodeError as error:
            raise invalid("sampling_parameters", f"sampling_parameters is not valid JSON: {error}.") from error
        if not isinstance(parsed, dict):
            raise invalid("sampling_parameters", "sampling_parameters must be a JSON object.")
        values |= parsed
    for name, parameter in given.items():
        choice = parameter.WhichOneof("parameter_choice")
        values[name] = None if choice is None else getattr(parameter, choice)
    return values


# ── out ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _response(
    request: pb.ModelInferRequest, model: str, texts: Sequence[str], ends: Sequence[Ended]
) -> pb.ModelInferResponse:
    columns = ([text.encode() for text in texts], [ended.reason.value.encode() for ended in ends])
    outputs = dict(zip(OUTPUTS, columns, strict=True))
    wanted = [output.name for output in request.outputs] or OUTPUTS
    response = pb.ModelInferResponse(model_name=model, model_version=VERSION, id=request.id)
    for name in wanted:
        tensor = _Tensor(name=name, datatype="BYTES", shape=[len(texts)])
        if request.raw_input_contents:
            response.raw_output_contents.append(b"".join(struct.pack("<I", len(e)) + e for e in outputs[name]))
        else:
            tensor.contents.bytes_contents.extend(outputs[name])
        response.outputs.append(tensor)
    _tell_served(response, ends[0])
    return response


def _tell_served(response: pb.ModelInferResponse, ended: Ended) -> None:
    """How the first choice was served, as response parameters."""
    response.parameters["output_tokens"].int64_param = ended.output_tokens
    if (account := ended.account) is not None:
        response.parameters["prefill_instance"].string_param = account.prefill_instance
        response.parameters["decode_instance"].string_param = account.decode_instance
        response.parameters["kv_bytes_moved"].int64_param = account.timings.kv_bytes_moved
        response.parameters["ttft_s"].double_param = account.ttft_s


def _text(name: str) -> _Metadata:
    return _Metadata(name=name, datatype="BYTES", shape=[-1])
