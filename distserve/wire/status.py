"""The one table of errors: a core ``Code`` as a gRPC status, an HTTP status and an OpenAI error type.

Owns the table and how an error becomes ``google.rpc.Status`` details or an OpenAI error body. Knows nothing of who
raises errors or who sends them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from distserve.core.types import Code

DOMAIN = "distserve.dev"
MIN_RETRY_AFTER_S = 1.0
"""What a retryable error says when its sender named no time."""

LONGEST_SENTENCE, LONGEST_NAME = 1000, 128
"""In bytes of UTF-8. A refusal may quote what was sent, and gRPC carries it, thrice, in trailers of at most 8 KiB: a
longer one would reach the client as RESOURCE_EXHAUSTED, whatever it was."""


@dataclass(frozen=True, slots=True)
class Status:
    """One row: how one kind of error looks from outside. ``retryable``: the same request may do better later."""

    grpc: grpc.StatusCode
    http: int
    openai_type: str
    openai_code: str
    retryable: bool = False


TABLE: dict[Code, Status] = {
    Code.INVALID_ARGUMENT: Status(grpc.StatusCode.INVALID_ARGUMENT, 400, "invalid_request_error", "invalid_value"),
    Code.NOT_FOUND: Status(grpc.StatusCode.NOT_FOUND, 404, "invalid_request_error", "not_found"),
    Code.ALREADY_EXISTS: Status(grpc.StatusCode.ALREADY_EXISTS, 409, "invalid_request_error", "already_exists"),
    Code.UNAUTHENTICATED: Status(grpc.StatusCode.UNAUTHENTICATED, 401, "invalid_request_error", "invalid_api_key"),
    Code.PERMISSION_DENIED: Status(
        grpc.StatusCode.PERMISSION_DENIED, 403, "invalid_request_error", "permission_denied"
    ),
    Code.RESOURCE_EXHAUSTED: Status(
        grpc.StatusCode.RESOURCE_EXHAUSTED, 429, "rate_limit_error", "rate_limit_exceeded", retryable=True
    ),
    Code.UNAVAILABLE: Status(grpc.StatusCode.UNAVAILABLE, 503, "server_error", "unavailable", retryable=True),
    Code.DEADLINE_EXCEEDED: Status(grpc.StatusCode.DEADLINE_EXCEEDED, 504, "timeout_error", "deadline_exceeded"),
    Code.CANCELLED: Status(grpc.StatusCode.CANCELLED, 499, "cancelled_error", "cancelled"),
    Code.INTERNAL: Status(grpc.StatusCode.INTERNAL, 500, "server_error", "internal_error"),
}


@dataclass(frozen=True, slots=True)
class Problem:
    """An error as a client is told it. ``message`` is one sentence; ``param`` names the wrong field, if one is."""

    code: Code
    message: str
    retry_after_s: float = 0.0
    param: str = ""
    request_id: str = ""

    @property
    def status(self) -> Status:
        return TABLE[self.code]

    @property
    def wait_s(self) -> float:
        """How long to wait before trying again; 0 when trying again is no use."""
        return max(self.retry_after_s, MIN_RETRY_AFTER_S) if self.status.retryable else 0.0


def rpc_details(problem: Problem) -> status_pb2.Status:
    """The error as ``google.rpc.Status``: ErrorInfo always, RetryInfo and BadRequest where they are true."""
    message, param = _cut(problem.message, LONGEST_SENTENCE), _cut(problem.param, LONGEST_NAME)
    details = [_packed(_error_info(problem))]
    if problem.wait_s > 0:
        details.append(_packed(error_details_pb2.RetryInfo(retry_delay=_duration(problem.wait_s))))
    if problem.code is Code.INVALID_ARGUMENT and param:
        violation = error_details_pb2.BadRequest.FieldViolation(field=param, description=message)
        details.append(_packed(error_details_pb2.BadRequest(field_violations=[violation])))
    number: int = problem.status.grpc.value[0]
    return status_pb2.Status(code=number, message=message, details=details)


def grpc_status(problem: Problem) -> grpc.Status:
    """The error as what ``context.abort_with_status`` takes."""
    return rpc_status.to_status(rpc_details(problem))


def openai_body(problem: Problem, openai_code: str = "") -> dict[str, object]:
    """The error in OpenAI's shape. ``openai_code`` replaces the table's, where OpenAI has a word of its own."""
    status = problem.status
    error = {
        "message": _cut(problem.message, LONGEST_SENTENCE),
        "type": status.openai_type,
        "param": problem.param or None,
        "code": openai_code or status.openai_code,
    }
    return {"error": error}


def http_headers(problem: Problem) -> dict[str, str]:
    """Headers of an error answer: when to try again, or (OpenAI's own clients obey it) not to."""
    if problem.wait_s > 0:
        seconds = problem.wait_s
        return {"Retry-After": str(math.ceil(seconds)), "Retry-After-Ms": str(math.ceil(seconds * 1000))}
    return {"X-Should-Retry": "false"} if problem.status.http in (409, 499, 504) else {}


def _error_info(problem: Problem) -> error_details_pb2.ErrorInfo:
    metadata = {"param": problem.param, "request_id": problem.request_id}
    filled = {key: _cut(value, LONGEST_NAME) for key, value in metadata.items() if value}
    return error_details_pb2.ErrorInfo(reason=problem.code.name, domain=DOMAIN, metadata=filled)


def _cut(text: str, limit: int) -> str:
    """The text, or its beginning and an ellipsis, in at most ``limit`` bytes of UTF-8."""
    whole = text.encode(errors="replace")
    if len(whole) <= limit:
        return whole.decode()
    return whole[: limit - 3].decode(errors="ignore") + "…"


def _packed(
    detail: error_details_pb2.ErrorInfo | error_details_pb2.RetryInfo | error_details_pb2.BadRequest,
) -> any_pb2.Any:
    box = any_pb2.Any()
    box.Pack(detail)
    return box


def _duration(seconds: float) -> duration_pb2.Duration:
    duration = duration_pb2.Duration()
    duration.FromNanoseconds(int(seconds * 1e9))
    return duration
