"""One gateway over the scripted backend, whole but for the cluster, kept for all examples of a test module.

Owns the event loop that both front ends run on. After each example ``still_serves`` shows that nothing was left behind
and that an ordinary request is answered as if nothing had happened.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import grpc
import httpx

from distserve.gateway.frontend import FrontEnd
from distserve.gateway.http.app import HttpConfig, http_app
from distserve.gateway.http.server import HttpServer, serve_http
from distserve.gateway.rpc.server import GrpcServer, build_grpc_server
from distserve.gateway.template import ChatTemplate
from distserve.gateway.text import TextCodec
from distserve.v1 import inference_pb2
from tests.gateway.fake_backend import FakeBackend, Script
from tests.gateway.tokenizers_for_tests import byte_level

PATIENCE_S = 120.0  # an example that takes longer hangs, even on a busy machine
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}"
    "{% if message.name %}{{ message.name + ': ' }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if style %}{{ style.upper() }}{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GENERATE = "/distserve.v1.InferenceService/Generate"


class Front:
    """The gateway under test. ``run`` runs a coroutine on its loop."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner()
        self.run(self._start())

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self._runner.run(asyncio.wait_for(work, PATIENCE_S))

    async def _start(self) -> None:
        self.backend = FakeBackend(Script(filler=65, batch=4))
        codec = TextCodec(byte_level(), ChatTemplate(TEMPLATE, {"bos_token": "<|im_start|>"}))
        front_end = FrontEnd(self.backend, {"tiny": codec})
        app = http_app(front_end, config=HttpConfig(max_body_bytes=200_000))
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway")
        self.server: HttpServer = await serve_http(app, "127.0.0.1", 0)
        self.rpc: GrpcServer = build_grpc_server(front_end)
        await self.rpc.start("127.0.0.1", 0)
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{self.rpc.port}")

    def still_serves(self) -> None:
        self.run(self._still_serves())

    async def _still_serves(self) -> None:
        await self.backend.until(lambda: not self.backend.live)
        self.backend.submitted.clear()
        body = {"model": "tiny", "prompt": "Hello", "max_tokens": 3}
        answer = await self.http.post("/v1/completions", json=body)
        assert (answer.status_code, answer.json()["usage"]["completion_tokens"]) == (200, 3)

    async def call(self, method: str, request: bytes) -> tuple[grpc.StatusCode, str, list[bytes]]:
        """A unary or streaming call with raw bytes: its status, its sentence, its answers."""
        answers: list[bytes] = []
        try:
            if method == GENERATE:
                async for part in self.channel.unary_stream(method)(request, timeout=PATIENCE_S):
                    answers.append(part)
            else:
                answers.append(await self.channel.unary_unary(method)(request, timeout=PATIENCE_S))
        except grpc.aio.AioRpcError as error:
            return error.code(), error.details() or "", answers
        return grpc.StatusCode.OK, "", answers

    async def served_over_grpc(self) -> None:
        """An ordinary call is answered to its end."""
        stopping = inference_pb2.StoppingCriteria(max_tokens=2)
        request = inference_pb2.GenerateRequest(text="Hello", stopping=stopping)
        code, _, answers = await self.call(GENERATE, request.SerializeToString())
        assert code is grpc.StatusCode.OK and len(answers) >= 3

    def close(self) -> None:
        self.run(self._stop())
        self._runner.close()

    async def _stop(self) -> None:
        await self.channel.close()
        await self.rpc.stop(grace_s=0)
        await self.server.stop(grace_s=0)
        await self.http.aclose()
