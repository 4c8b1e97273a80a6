"""One answer over HTTP: as server-sent events or whole, with the right status, and ended when the client goes away.

Owns what is sent when: nothing before the first token (so that an error has its own status), after that an error is an
event of the stream, which then ends without ``[DONE]``. Knows nothing of OpenAI's shapes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from distserve.core.effects import Account
from distserve.core.types import Code
from distserve.gateway.answer import Answer, AnswerEvent
from distserve.gateway.auth import Caller
from distserve.gateway.backend import RequestFailed
from distserve.gateway.faults import BAD_FAULT
from distserve.gateway.frontend import FrontEnd
from distserve.gateway.http.shape import Json, Shape
from distserve.gateway.plan import Plan
from distserve.wire.status import Problem, http_headers, openai_body

log = logging.getLogger(__name__)

STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


class JsonResponse(Response):
    """A JSON body, by orjson."""

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        return orjson.dumps(content)


def error_response(problem: Problem, http_status: int = 0) -> JsonResponse:
    """An error in OpenAI's shape. ``http_status`` replaces the table's, for what only HTTP knows (413)."""
    headers = http_headers(problem) | ({"X-Request-Id": problem.request_id} if problem.request_id else {})
    body = openai_body(problem, "model_not_found" if problem.param == "model" else "")
    return JsonResponse(body, http_status or problem.status.http, headers)


def problem_of(failure: RequestFailed, request_id: str = "") -> Problem:
    return Problem(failure.code, failure.message, failure.retry_after_s, failure.param, request_id)


class AnswerResponse(Response):
    """Opens the answer to a plan and sends it. Cancels the request when the client disconnects, streaming or not."""

    def __init__(
        self,
        front_end: FrontEnd,
        plan: Plan,
        shape: Shape,
        stream: bool,
        include_usage: bool,
        caller: Caller | None = None,
    ) -> None:
        super().__init__()
        self._caller = caller
        self._front_end = front_end
        self._plan = plan
        self._shape = shape
        self._stream = stream
        self._include_usage = include_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await unless_gone(receive, self._respond(scope, receive, send))

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The whole answer, or the stream's beginning, or an error with a status of its own."""
        try:
            answer = await self._front_end.open(self._plan, self._caller)
            try:
                if self._stream:
                    return await self._send_stream(answer, send)
                response = await self._whole(answer)
            finally:
                await answer.aclose()
        except Exception as error:  # nothing has been sent yet: a stream deals with its own errors
            response = error_response(self._problem(error))
        await response(scope, receive, send)

    async def _whole(self, answer: Answer) -> Response:
        async for event in answer:
            self._shape.collect(event)
        headers = self._request_headers() | served_headers(self._shape.account())
        return JsonResponse(self._shape.whole(answer), headers=headers)

    async def _send_stream(self, answer: Answer, send: Send) -> None:
        """Send the stream. Raises only before its first byte."""
        events = aiter(answer)
        first = await anext(events)
        headers = [(k.lower().encode(), v.encode()) for k, v in (STREAM_HEADERS | self._request_headers()).items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            await self._send_event(first, send)
            async for event in events:
                await self._send_event(event, send)
            usage = _sse(self._shape.usage_chunk(answer)) if self._include_usage else b""
            last = usage + b"data: [DONE]\n\n"
        except Exception as error:  # the status line is gone: what can still be said is said in the stream
            last = _sse(openai_body(self._problem(error)))
        await send(_part(last, last=True))

    async def _send_event(self, event: AnswerEvent, send: Send) -> None:
        if chunks := self._shape.chunks(event):
            await send(_part(b"".join(map(_sse, chunks))))

    def _problem(self, error: Exception) -> Problem:
        """What the client is told of an error; one that is not meant for clients is a bug, and goes to the log."""
        if not isinstance(error, RequestFailed):
            log.error("request %s broke off", self._plan.request_id, exc_info=error)
            error = RequestFailed(Code.INTERNAL, BAD_FAULT)
        self._front_end.refused("http", error.code)
        return problem_of(error, self._plan.request_id)

    def _request_headers(self) -> dict[str, str]:
        return {"X-Request-Id": self._plan.request_id}


def served_headers(account: Account | None) -> dict[str, str]:
    """How a request was served, for those who look at headers only."""
    if account is None:
        return {}
    parts = account.timings
    phases = {
        "gateway": parts.gateway_s,
        "dispatch": parts.dispatch_s,
        "queue": parts.queue_s,
        "prefill": parts.prefill_s,
        "ttft": account.ttft_s,
        "reserve": parts.reserve_s,
        "transfer": parts.transfer_s,
        "decode_queue": parts.decode_queue_s,
        "total": account.total_s,
    }
    return {
        "X-Distserve-Prefill-Instance": account.prefill_instance,
        "X-Distserve-Decode-Instance": account.decode_instance,
        "X-Distserve-Kv-Bytes-Moved": str(parts.kv_bytes_moved),
        "Server-Timing": ", ".join(f"{name};dur={seconds * 1000:.3f}" for name, seconds in phases.items()),
    }


async def unless_gone(receive: Receive, work: Awaitable[None]) -> None:
    """Do the work; cancel it, and return once it has cleaned up, when the client disconnects first.

    Needs the request's body to be read already. Raises what the work raises.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)
    if not task.cancelled():
        task.result()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _sse(chunk: Json | dict[str, object]) -> bytes:
    return b"data: " + orjson.dumps(chunk) + b"\n\n"


def _part(body: bytes, last: bool = False) -> dict[str, object]:
    return {"type": "http.response.body", "body": body, "more_body": not last}
