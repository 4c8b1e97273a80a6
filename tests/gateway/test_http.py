"""HTTP as it is on the wire: statuses, headers, events, bad input, and clients that go away."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import socket
from typing import Any

import httpx
import pytest

from distserve import __version__
from distserve.core.types import Code, FinishReason, Request
from distserve.gateway.auth import ApiKeys
from distserve.gateway.backend import RequestFailed
from distserve.gateway.frontend import FrontEnd
from distserve.gateway.http.app import http_app
from distserve.gateway.http.server import serve_http
from distserve.gateway.ports import PortUnavailable
from distserve.gateway.text import TextCodec
from tests.gateway.fake_backend import SPEC, FakeBackend, Script


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "Hello", "max_tokens": 4} | fields


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4} | fields


async def test_probes_and_facts(http: httpx.AsyncClient, backend: FakeBackend) -> None:
    assert (await http.get("/health")).status_code == 200
    assert (await http.get("/livez")).json() == {"status": "live"}
    assert (await http.get("/version")).json() == {"version": __version__}
    metrics = await http.get("/metrics")
    assert (metrics.text, metrics.headers["content-type"]) == ("up 1\n", "text/plain; version=0.0.4")
    models = (await http.get("/v1/models")).json()
    assert [(m["id"], m["object"], m["max_model_len"]) for m in models["data"]] == [("tiny", "model", 256)]
    backend.is_ready = False
    health = await http.get("/health")
    assert health.status_code == 503 and health.headers["retry-after"] == "1"
    assert (await http.get("/livez")).status_code == 200


async def test_events_on_the_wire(http: httpx.AsyncClient, backend: FakeBackend, codec: TextCodec) -> None:
    backend.script = Script(tokens=[*codec.encode("fox"), 2])
    body = completion(stream=True, stream_options={"include_usage": True}, max_tokens=50)
    answer = await http.post("/v1/completions", json=body, headers={"X-Request-Id": "abc"})
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert (answer.headers["cache-control"], answer.headers["x-accel-buffering"]) == ("no-cache", "no")
    assert answer.headers["x-request-id"] == "abc"
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert {c["id"] for c in chunks} == {"abc"} and {c["object"] for c in chunks} == {"text_completion"}
    assert chunks[-2]["distserve"]["prefill_instance"] == "p0#1"
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == len(backend.script.tokens)


async def test_a_whole_answer_tells_in_headers_how_it_was_served(http: httpx.AsyncClient) -> None:
    answer = await http.post("/v1/chat/completions", json=chat())
    headers = answer.headers
    assert headers["x-distserve-prefill-instance"] == "p0#1" and headers["x-distserve-decode-instance"] == "d0#2"
    assert headers["x-distserve-kv-bytes-moved"] == "4096"
    assert "prefill;dur=4.000" in headers["server-timing"]
    assert headers["x-request-id"] == answer.json()["id"]


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": [[]]}, "prompt", "empty"),
        ({"prompt": None}, "prompt", "missing"),
        ({"prompt": 5}, "prompt", "must be"),
        ({"prompt": ["a", 1]}, "prompt", "must be"),
        ({"prompt": [1, "a"]}, "prompt", "whole number"),
        ({"prompt": [1, 512]}, "prompt", "0 to 511"),
        ({"prompt": [-1]}, "prompt", "Token id -1"),
        ({"prompt": [True]}, "prompt", "whole number"),
        ({"prompt": [7] * 256}, "prompt", "256 tokens"),
        ({"prompt": ["x"] * 300}, "prompt", "300 prompts"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_tokens": -1}, "max_tokens", "at least 1"),
        ({"prompt": [7] * 200, "max_tokens": 57}, "max_tokens", "only 56 fit into the 256"),
        ({"max_tokens": "4"}, "max_tokens", "whole number"),
        ({"max_tokens": 1.5}, "max_tokens", "whole number"),
        ({"temperature": -0.1}, "temperature", "from 0 to 2"),
        ({"temperature": 2.1}, "temperature", "from 0 to 2"),
        ({"temperature": "hot"}, "temperature", "a number"),
        ({"temperature": True}, "temperature", "a number"),
        ({"top_p": 0}, "top_p", "more than 0"),
        ({"top_p": 1.01}, "top_p", "at most 1"),
        ({"top_k": -2}, "top_k", "from 0"),
        ({"min_p": 1.5}, "min_p", "from 0 to 1"),
        ({"presence_penalty": 3}, "presence_penalty", "from -2 to 2"),
        ({"frequency_penalty": -3}, "frequency_penalty", "from -2 to 2"),
        ({"repetition_penalty": 0}, "repetition_penalty", "more than 0"),
        ({"n": 0}, "n", "from 1 to 16"),
        ({"n": 17}, "n", "from 1 to 16"),
        ({"prompt": ["x"] * 100, "n": 16}, "n", "1600 answers"),
        ({"best_of": 3}, "best_of", "not supported"),
        ({"seed": "x"}, "seed", "whole number"),
        ({"logprobs": 21}, "logprobs", "from 0 to 20"),
        ({"logprobs": True}, "logprobs", "whole number"),
        ({"echo": True, "logprobs": 1}, "echo", "combined"),
        ({"suffix": "s"}, "suffix", "not supported"),
        ({"stop": ""}, "stop", "empty"),
        ({"stop": ["a"] * 17}, "stop", "17 stop texts"),
        ({"stop": [1]}, "stop", "list of strings"),
        ({"stop_token_ids": [9999]}, "stop_token_ids", "9999"),
        ({"min_tokens": 5}, "min_tokens", "from 0 to 4"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "token ids"),
        ({"logit_bias": {"600": 1}}, "logit_bias", "600"),
        ({"logit_bias": {"6": 101}}, "logit_bias", "-100 to 100"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
        ({"stream": "yes"}, "stream", "true or false"),
        ({"response_format": {"type": "json_object"}}, "response_format", "json_object"),
        ({"prompt_logprobs": 1}, "prompt_logprobs", "not supported"),
        ({"guided_json": {}, "guided_regex": "a"}, "guided_regex", "not supported"),
        ({"request_id": "with space"}, "request_id", "printable"),
        ({"tenant": "x" * 200}, "tenant", "at most 128"),
        ({"priority": 5000}, "priority", "-1000"),
    ],
)
async def test_bad_completions(
    http: httpx.AsyncClient, backend: FakeBackend, fields: dict[str, Any], param: str, said: str
) -> None:
    answer = await http.post("/v1/completions", json=completion(**fields))
    error = answer.json()["error"]
    assert answer.status_code == 400, error
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert said in error["message"]
    assert backend.submitted == []


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"messages": []}, "messages", "at least one"),
        ({"messages": "hi"}, "messages", "list"),
        ({"messages": [{"content": "x"}]}, "messages.0", "role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "string"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content", "image_url"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "messages.0", "tool calls"),
        ({"messages": [{"role": "user", "content": "fox " * 300}]}, "messages", "at most 256"),
        ({"max_tokens": None, "max_completion_tokens": 4000}, "max_completion_tokens", "4000"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"tool_choice": "required"}, "tool_choice", "not supported"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs to be true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20"),
        ({"logprobs": 2}, "logprobs", "true or false"),
        ({"modalities": ["audio"]}, "modalities", "text"),
        ({"chat_template_kwargs": 3}, "chat_template_kwargs", "an object"),
    ],
)
async def test_bad_chats(http: httpx.AsyncClient, fields: dict[str, Any], param: str, said: str) -> None:
    answer = await http.post("/v1/chat/completions", json=chat(**fields))
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), error
    assert said in error["message"]


async def test_what_asks_for_nothing_is_not_refused(http: httpx.AsyncClient) -> None:
    harmless: dict[str, Any] = {
        "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "stop": None, "logit_bias": None,
        "top_k": -1, "seed": -1, "n": None, "store": True, "metadata": {"a": "b"}, "temperature": None,
    }  # fmt: skip
    assert (await http.post("/v1/chat/completions", json=chat(**harmless))).status_code == 200
    assert (await http.post("/v1/completions", json=completion(best_of=1, suffix=None))).status_code == 200


async def test_a_model_without_a_chat_template_says_so(piece_codec: TextCodec, backend: FakeBackend) -> None:
    app = http_app(FrontEnd(backend, {"tiny": piece_codec}))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
        answer = await client.post("/v1/chat/completions", json=chat())
    assert answer.status_code == 400 and "no chat template" in answer.json()["error"]["message"]


@pytest.mark.parametrize("content", [b"{bad", b"", b"\xff\xfe", b"[1]", b'"x"', b'{"prompt": NaN}'])
async def test_bad_bodies(http: httpx.AsyncClient, content: bytes) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        answer = await http.post(path, content=content)
        assert answer.status_code == 400
        assert "JSON" in answer.json()["error"]["message"]


async def test_a_body_beyond_the_limit(http: httpx.AsyncClient) -> None:
    answer = await http.post("/v1/completions", json=completion(prompt="x" * 200_000))
    assert answer.status_code == 413 and "100000 bytes" in answer.json()["error"]["message"]
    assert (await http.get("/livez")).status_code == 200


async def test_unknown_paths_methods_and_models(http: httpx.AsyncClient, refusals: list[tuple[str, Code]]) -> None:
    assert (await http.get("/v2/nothing")).json()["error"]["type"] == "invalid_request_error"
    assert (await http.get("/v2/nothing")).status_code == 404
    assert (await http.get("/v1/completions")).status_code == 405
    missing = await http.post("/v1/completions", json=completion(model="huge"))
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
    assert (await http.get("/v1/models/huge")).status_code == 404
    assert refusals == [("http", Code.NOT_FOUND)] * 2
    assert (await http.post("/v1/completions", json={"prompt": "x"})).status_code == 200  # there is only one


async def test_nobody_serves_the_model(http: httpx.AsyncClient, backend: FakeBackend) -> None:
    backend.spec = None
    answer = await http.post("/v1/completions", json=completion())
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")


@pytest.mark.parametrize("stream", [False, True])
async def test_overload_says_when_to_come_back(http: httpx.AsyncClient, backend: FakeBackend, stream: bool) -> None:
    backend.script.refuse = RequestFailed(Code.RESOURCE_EXHAUSTED, "The queue is full; try again in 3 s.", 2.2)
    answer = await http.post("/v1/completions", json=completion(stream=stream))
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "3")
    assert answer.headers["retry-after-ms"] == "2200"
    assert answer.json()["error"] == {
        "message": "The queue is full; try again in 3 s.",
        "type": "rate_limit_error",
        "param": None,
        "code": "rate_limit_exceeded",
    }


async def test_a_duplicate_id_is_a_conflict_and_not_retried(http: httpx.AsyncClient, backend: FakeBackend) -> None:
    backend.script.hold_at = 1
    first = asyncio.create_task(http.post("/v1/completions", json=completion(request_id="same")))
    await backend.until(lambda: bool(backend.live))
    second = await http.post("/v1/completions", json=completion(request_id="same"))
    assert (second.status_code, second.headers["x-should-retry"]) == (409, "false")
    backend.go.set()
    assert (await first).status_code == 200


async def test_an_error_inside_a_stream_ends_it_without_done(http: httpx.AsyncClient, backend: FakeBackend) -> None:
    backend.script.fail_at = 2
    answer = await http.post("/v1/completions", json=completion(stream=True, max_tokens=9))
    events = answer.text.strip().split("\n\n")
    assert answer.status_code == 200 and len(events) == 3
    assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "unavailable"


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_cancels(http_url: str, backend: FakeBackend, stream: bool, at: int) -> None:
    backend.script.hold_at = at
    reader, writer = await asyncio.open_connection("127.0.0.1", int(http_url.rsplit(":", 1)[1]))
    body = json.dumps(completion(stream=stream, n=2, request_id="gone")).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    await backend.until(lambda: len(backend.live) == 2)
    if stream and at:
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    writer.close()
    await backend.until(lambda: len(backend.closed) == 2)
    assert backend.closed == {"gone-0": FinishReason.CANCELLED, "gone-1": FinishReason.CANCELLED}
    assert backend.live == {}


async def test_one_refused_choice_leaves_none_running(http: httpx.AsyncClient, backend: FakeBackend) -> None:
    backend.script.hold_at = 0
    taken = asyncio.create_task(http.post("/v1/completions", json=completion(request_id="a-2")))
    await backend.until(lambda: bool(backend.live))
    answer = await http.post("/v1/completions", json=completion(request_id="a", n=4))
    assert answer.status_code == 409
    assert set(backend.live) == {"a-2"} and set(backend.closed) == {"a-0", "a-1"}
    backend.go.set()
    await taken


async def test_one_failed_choice_ends_the_others(http: httpx.AsyncClient, backend: FakeBackend) -> None:
    def each(request: Request, position: int) -> int:
        if request.id.endswith("-1") and position == 1:
            raise RequestFailed(Code.INTERNAL, "It broke.")
        return 65

    backend.script = Script(each=each)
    answer = await http.post("/v1/completions", json=completion(n=3, max_tokens=200))
    assert answer.status_code == 500 and backend.live.keys() <= {f"{answer.headers['x-request-id']}-1"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.filterwarnings("ignore")
async def test_a_bug_is_told_as_ours(http: httpx.AsyncClient, backend: FakeBackend, stream: bool) -> None:
    def each(_request: Request, position: int) -> int:
        if position == 1:
            raise ZeroDivisionError("secret detail")
        return 65

    backend.script = Script(each=each)
    answer = await http.post("/v1/completions", json=completion(stream=stream))
    assert answer.status_code == (200 if stream else 500)
    assert "internal_error" in answer.text and "secret" not in answer.text and "[DONE]" not in answer.text


async def test_tokenize_and_detokenize(http: httpx.AsyncClient, codec: TextCodec) -> None:
    answer = await http.post("/tokenize", json={"model": "tiny", "prompt": "Grüße 🙂"})
    ids = list(codec.encode("Grüße 🙂"))
    assert answer.json() == {"tokens": ids, "count": len(ids), "max_model_len": 256}
    assert (await http.post("/detokenize", json={"tokens": ids})).json() == {"prompt": "Grüße 🙂"}
    rendered = await http.post("/tokenize", json={"messages": [{"role": "user", "content": "Hi"}]})
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert rendered.json()["tokens"] == list(codec.encode(text))
    assert (await http.post("/detokenize", json={"tokens": [2]})).json() == {"prompt": "<|im_end|>"}
    assert (await http.post("/detokenize", json={"tokens": [-1]})).status_code == 400
    assert (await http.post("/detokenize", json={"tokens": "x"})).status_code == 400
    assert (await http.post("/tokenize", json={})).status_code == 400
    assert (await http.post("/tokenize", json={"prompt": ""})).json()["count"] == 0


async def test_keys(backend: FakeBackend, codec: TextCodec) -> None:
    app = http_app(FrontEnd(backend, {"tiny": codec}, keys=ApiKeys(["sesame", "other"])))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
        for header in ({}, {"Authorization": "Bearer nope"}, {"Authorization": "sesame"}):
            answer = await client.post("/v1/completions", json=completion(), headers=header)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
            assert (await client.get("/v1/models", headers=header)).status_code == 401
        assert (await client.get("/health")).status_code == 200
        headers = {"Authorization": "Bearer other"}
        assert (await client.get("/v1/models", headers=headers)).status_code == 200


async def test_the_trace_and_timeout_are_carried(http: httpx.AsyncClient, backend: FakeBackend) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    await http.post("/v1/completions", json=completion(timeout_s=2.5), headers={"traceparent": trace})
    await http.post("/v1/completions", json=completion(timeout_s=1e9), headers={"traceparent": "rubbish"})
    assert [(r.trace, r.timeout_s) for r in backend.submitted] == [(trace, 2.5), ("", 3600.0)]
    late = await http.post("/v1/completions", json=completion(timeout_s=0))
    assert late.status_code == 504


async def test_a_port_in_use_is_a_sentence(front_end: FrontEnd) -> None:
    app = http_app(front_end)
    server = await serve_http(app, "127.0.0.1", 0)
    with pytest.raises(PortUnavailable, match=f"127.0.0.1:{server.port} .*in use.*--http-port"):
        await serve_http(app, "127.0.0.1", server.port)
    await server.stop(grace_s=0)


async def test_stopping_lets_answers_finish(front_end: FrontEnd, backend: FakeBackend) -> None:
    server = await serve_http(http_app(front_end), "127.0.0.1", 0)
    backend.script.hold_at = 1
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", trust_env=False) as client:
        asking = asyncio.create_task(client.post("/v1/completions", json=completion()))
        await backend.until(lambda: bool(backend.live))
        stopping = asyncio.create_task(server.stop(grace_s=20))
        await asyncio.sleep(0)
        backend.go.set()
        assert (await asking).status_code == 200
        await stopping
        with pytest.raises(httpx.ConnectError):
            await client.get("/livez")


async def test_stopping_without_grace_cancels(front_end: FrontEnd, backend: FakeBackend) -> None:
    server = await serve_http(http_app(front_end), "127.0.0.1", 0)
    backend.script.hold_at = 1
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", trust_env=False) as client:
        asking = asyncio.create_task(client.post("/v1/completions", json=completion(request_id="cut")))
        await backend.until(lambda: bool(backend.live))
        await server.stop(grace_s=0)
        await asyncio.gather(asking, return_exceptions=True)
    assert backend.closed == {"cut": FinishReason.CANCELLED}


async def test_a_client_that_does_not_read_stalls_only_itself(http_url: str, backend: FakeBackend) -> None:
    """Its socket fills, its stream is not read any more, and the backend's own limit on unread streams can act."""
    backend.spec = dataclasses.replace(SPEC, max_model_len=10**9, pool_blocks=10**9)
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", int(http_url.rsplit(":", 1)[1])))
    body = json.dumps(completion(stream=True, max_tokens=10**8, request_id="slow")).encode()
    sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    await backend.until(lambda: "slow" in backend.live)
    made, still = 0, 0
    for _ in range(2000):
        await asyncio.sleep(0.005)
        still = still + 1 if backend.live["slow"].made == made > 0 else 0
        made = backend.live["slow"].made
        if still == 40:
            break
    assert still == 40, f"the server kept on writing, {made} tokens so far"
    sock.close()
    await backend.until(lambda: "slow" in backend.closed)
