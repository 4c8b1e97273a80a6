"""One table for HTTP and gRPC."""

from __future__ import annotations

import grpc
import pytest
from google.rpc import error_details_pb2

from distserve.core.types import Code
from distserve.wire.status import TABLE, Problem, grpc_status, http_headers, openai_body, rpc_details


def test_every_code_has_one_row_and_no_two_look_alike() -> None:
    assert set(TABLE) == set(Code)
    assert len({row.http for row in TABLE.values()}) == len(TABLE)
    assert len({row.grpc for row in TABLE.values()}) == len(TABLE)
    assert all(row.grpc.name == code.name for code, row in TABLE.items())


@pytest.mark.parametrize(
    ("code", "http"),
    [
        (Code.INVALID_ARGUMENT, 400),
        (Code.UNAUTHENTICATED, 401),
        (Code.NOT_FOUND, 404),
        (Code.ALREADY_EXISTS, 409),
        (Code.RESOURCE_EXHAUSTED, 429),
        (Code.CANCELLED, 499),
        (Code.INTERNAL, 500),
        (Code.UNAVAILABLE, 503),
        (Code.DEADLINE_EXCEEDED, 504),
    ],
)
def test_http_statuses(code: Code, http: int) -> None:
    assert TABLE[code].http == http


def test_only_what_another_time_may_serve_says_when() -> None:
    for code in Code:
        problem = Problem(code, "No.", retry_after_s=0.0)
        retryable = code in (Code.RESOURCE_EXHAUSTED, Code.UNAVAILABLE)
        assert ("Retry-After" in http_headers(problem)) == retryable
        kinds = [box.TypeName() for box in rpc_details(problem).details]
        assert ("google.rpc.RetryInfo" in kinds) == retryable
    assert http_headers(Problem(Code.UNAVAILABLE, "No.", 1.2)) == {"Retry-After": "2", "Retry-After-Ms": "1200"}


def test_details() -> None:
    problem = Problem(Code.INVALID_ARGUMENT, "Too hot.", param="temperature", request_id="r")
    status = rpc_details(problem)
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    assert status.details[0].Unpack(info) and status.details[1].Unpack(bad)
    assert (info.domain, info.reason) == ("distserve.dev", "INVALID_ARGUMENT")
    assert dict(info.metadata) == {"param": "temperature", "request_id": "r"}
    assert (bad.field_violations[0].field, bad.field_violations[0].description) == ("temperature", "Too hot.")
    assert grpc_status(problem).code is grpc.StatusCode.INVALID_ARGUMENT
    assert openai_body(problem)["error"] == {
        "message": "Too hot.",
        "type": "invalid_request_error",
        "param": "temperature",
        "code": "invalid_value",
    }
