"""Bytes that are no message of the called method: the client's error, not ours.

gRPC itself answers them with UNKNOWN and logs a traceback. Knows no service; wraps the unary-request methods of all.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from distserve.core.types import Code
from distserve.wire.status import Problem, grpc_status

_UNREADABLE = object()
_SENTENCE = (
    "The request is not a protobuf message of the kind this method takes; generate the client from this "
    "server's protos (reflection tells them)."
)


class DecodingInterceptor(grpc.aio.ServerInterceptor):
    """Ends a call whose message cannot be decoded with INVALID_ARGUMENT. ``refused`` is told of each."""

    def __init__(self, refused: Callable[[str, Code], None]) -> None:
        self._refused = refused
        self._wrapped: dict[str, Any] = {}  # by method: only those that exist

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        method = handler_call_details.method
        found = self._wrapped.get(method)
        if found is None:
            handler = await continuation(handler_call_details)
            if handler is None or handler.request_streaming or handler.request_deserializer is None:
                return handler
            found = self._wrapped[method] = self._wrap(handler)
        return found

    def _wrap(self, handler: Any) -> Any:
        decode = handler.request_deserializer

        def tolerant(data: bytes) -> Any:
            try:
                return decode(data)
            except DecodeError:
                return _UNREADABLE

        behaviour = handler.unary_stream or handler.unary_unary
        make = (
            grpc.unary_stream_rpc_method_handler if handler.response_streaming else grpc.unary_unary_rpc_method_handler
        )
        return make(self._guarded(behaviour), tolerant, handler.response_serializer)

    def _guarded(self, behaviour: Any) -> Any:
        """The method, in the same form (a coroutine or an asynchronous generator), for messages that are ones."""

        async def generate(request: Any, context: Any) -> AsyncIterator[Any]:
            if request is _UNREADABLE:
                await self._abort(context)
            answers = behaviour(request, context)
            try:
                async for answer in answers:
                    yield answer
            finally:
                await answers.aclose()

        async def call(request: Any, context: Any) -> Any:
            if request is _UNREADABLE:
                await self._abort(context)
            return await behaviour(request, context)

        return generate if inspect.isasyncgenfunction(behaviour) else call

    async def _abort(self, context: Any) -> None:
        self._refused("grpc", Code.INVALID_ARGUMENT)
        await context.abort_with_status(grpc_status(Problem(Code.INVALID_ARGUMENT, _SENTENCE)))
