"""The HTTP application: routes, request bodies, errors that are nobody's answer.

Owns the paths of the OpenAI-compatible API and of what operators probe. Knows nothing of sockets.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import orjson
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from distserve import __version__
from distserve.core.types import Code
from distserve.gateway.ask import Ask
from distserve.gateway.auth import Caller
from distserve.gateway.backend import RequestFailed
from distserve.gateway.faults import BAD_FAULT
from distserve.gateway.fields import Fields
from distserve.gateway.frontend import FrontEnd, ModelView
from distserve.gateway.http.body import View, chat_ask, completion_ask, read_chat
from distserve.gateway.http.respond import AnswerResponse, JsonResponse, error_response, problem_of
from distserve.gateway.http.shape import Json, Shape
from distserve.gateway.plan import invalid
from distserve.wire.status import TABLE, Problem

Metrics = Callable[[], Awaitable[tuple[bytes, str]]]
"""Gives the metrics page: its bytes and content type."""

Reader = Callable[[Fields, str, str], tuple[Ask, View]]


@dataclass(frozen=True, slots=True)
class HttpConfig:
    """What the HTTP application accepts. ``started_at`` (Unix seconds) is told as the models' creation time;
    ``open_metrics``: show /metrics to whoever has no key, too.
    """

    max_body_bytes: int = 16 << 20
    started_at: int = 0
    open_metrics: bool = False


class _BodyTooLarge(RequestFailed):
    """Only HTTP has a status of its own for this."""


def http_app(front_end: FrontEnd, metrics: Metrics | None = None, config: HttpConfig | None = None) -> FastAPI:
    """The application. ``metrics`` is what ``/metrics`` shows; without it there is no such page."""
    routes = _Routes(front_end, metrics, config or HttpConfig())
    app = FastAPI(title="distserve", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_api_route("/v1/models", routes.models, methods=["GET"])
    app.add_api_route("/v1/models/{name:path}", routes.model, methods=["GET"])
    app.add_api_route("/v1/completions", routes.completions, methods=["POST"])
    app.add_api_route("/v1/chat/completions", routes.chat_completions, methods=["POST"])
    app.add_api_route("/tokenize", routes.tokenize, methods=["POST"])
    app.add_api_route("/detokenize", routes.detokenize, methods=["POST"])
    for path in ("/health", "/readyz"):
        app.add_api_route(path, routes.health, methods=["GET", "HEAD"])
    app.add_api_route("/livez", routes.live, methods=["GET", "HEAD"])
    app.add_api_route("/version", routes.version, methods=["GET"])
    if metrics is not None:
        app.add_api_route("/metrics", routes.metrics, methods=["GET"])
    app.add_exception_handler(RequestFailed, routes.on_refusal)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Exception, routes.on_fault)
    return app


class _Routes:
    """The handlers. Each takes the raw request: bodies are read by our own rules, not by a schema library."""

    def __init__(self, front_end: FrontEnd, metrics: Metrics | None, config: HttpConfig) -> None:
        self._front_end = front_end
        self._metrics = metrics
        self._config = config

    async def completions(self, request: Request) -> Response:
        return await self._generate(request, completion_ask)

    async def chat_completions(self, request: Request) -> Response:
        return await self._generate(request, chat_ask)

    async def _generate(self, request: Request, read: Reader) -> Response:
        fields = await self._body(request)
        ask, view = read(fields, _request_id(request), request.headers.get("traceparent", ""))
        plan = await self._front_end.plan(ask)
        shape, caller = Shape(plan, view), request.state.caller
        return AnswerResponse(self._front_end, plan, shape, view.stream, view.include_usage, caller)

    async def tokenize(self, request: Request) -> Response:
        fields = await self._body(request)
        text = fields.text("prompt")
        if text is None and fields.get("messages") is None:
            raise invalid("prompt", "The prompt is missing; send a string as prompt, or a chat as messages.")
        prompt = read_chat(fields) if text is None else text
        model = fields.text("model") or ""
        ids = await self._front_end.tokenize(model, prompt, fields.flag("add_special_tokens") is not False)
        limit = self._front_end.model(model).max_tokens
        return JsonResponse({"tokens": ids, "count": len(ids), "max_model_len": limit})

    async def detokenize(self, request: Request) -> Response:
        fields = await self._body(request)
        skip = fields.flag("skip_special_tokens") or False
        text = self._front_end.detokenize(fields.text("model") or "", fields.ids("tokens"), skip)
        return JsonResponse({"prompt": text})

    async def models(self, request: Request) -> Response:
        self._authorize(request)
        return JsonResponse({"object": "list", "data": [self._model(view) for view in self._front_end.models()]})

    async def model(self, request: Request, name: str) -> Response:
        self._authorize(request)
        return JsonResponse(self._model(self._front_end.model(name)))

    def _model(self, view: ModelView) -> Json:
        return {
            "id": view.name,
            "object": "model",
            "created": self._config.started_at,
            "owned_by": "distserve",
            "root": view.name,
            "max_model_len": view.max_tokens or None,
        }

    async def health(self) -> Response:
        """Whether requests are served: 200 once a canary went through the cluster, and while the path stands."""
        if self._front_end.backend.ready():
            return JsonResponse({"status": "ready"})
        why = "The cluster is not ready: no request can go through prefill, hand-off and decode yet."
        return error_response(Problem(Code.UNAVAILABLE, why))

    async def live(self) -> Response:
        """Whether this process answers at all; says nothing of the cluster."""
        return JsonResponse({"status": "live"})

    async def version(self) -> Response:
        return JsonResponse({"version": __version__})

    async def metrics(self, request: Request) -> Response:
        """With keys it wants one, as Prometheus can send (``authorization`` of a scrape), unless it was opened."""
        if not self._config.open_metrics:
            self._authorize(request)
        assert self._metrics is not None, "the route exists only with metrics"
        content, kind = await self._metrics()
        return Response(content, headers={"Content-Type": kind})

    async def on_refusal(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestFailed), "registered for RequestFailed"
        self._front_end.refused("http", error.code)
        response = error_response(
            problem_of(error, _request_id(request)), 413 if isinstance(error, _BodyTooLarge) else 0
        )
        if isinstance(error, _BodyTooLarge):
            response.headers["Connection"] = "close"  # the rest of the body is not going to be read
        return response

    async def on_fault(self, request: Request, _error: Exception) -> Response:
        """A bug. The framework logs it after this answer."""
        self._front_end.refused("http", Code.INTERNAL)
        return error_response(Problem(Code.INTERNAL, BAD_FAULT, request_id=_request_id(request)))

    def _authorize(self, request: Request) -> Caller:
        address = request.client.host if request.client is not None else ""
        return self._front_end.keys.check(request.headers.get("authorization", ""), address)

    async def _body(self, request: Request) -> Fields:
        """The body as a JSON object, whatever its declared type: forgotten headers are the commonest mistake."""
        request.state.caller = self._authorize(request)
        content = await self._read(request)
        try:
            values: Any = orjson.loads(content)
        except orjson.JSONDecodeError as error:
            raise invalid("", f"The body is not valid JSON: {error}.") from error
        if not isinstance(values, dict):
            raise invalid("", "The body must be a JSON object.")
        return Fields(values)

    async def _read(self, request: Request) -> bytes:
        limit = self._config.max_body_bytes
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise _BodyTooLarge(
                    Code.INVALID_ARGUMENT, f"The body is longer than {limit} bytes; send a shorter prompt."
                )
            parts.append(part)
        return b"".join(parts)


def _request_id(request: Request) -> str:
    return request.headers.get("x-request-id", "")


async def _on_http_error(_request: Request, error: Exception) -> Response:
    """No such path or method, in OpenAI's shape."""
    assert isinstance(error, HTTPException), "registered for HTTPException"
    code = next((code for code, row in TABLE.items() if row.http == error.status_code), Code.INVALID_ARGUMENT)
    response = error_response(Problem(code, f"{error.detail}."), error.status_code)
    response.headers.update(error.headers or {})
    return response


async def _on_disconnect(_request: Request, _error: Exception) -> Response:
    """Nobody is left to read this."""
    return Response(status_code=499)
