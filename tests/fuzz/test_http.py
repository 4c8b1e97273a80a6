"""HTTP from strangers: every body, header and query ends in an answer or a refusal with a sentence, never our fault."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from urllib.parse import quote_from_bytes

import httpx
import orjson
from hypothesis import example, given
from hypothesis import strategies as st

from tests.fuzz.front import Front
from tests.fuzz.hostile import bent_bytes, bent_json, bounded, nested

COMPLETION: dict[str, Any] = {
    "model": "tiny", "prompt": "Hello", "max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "n": 2,
    "stop": ["x"], "seed": 1, "logprobs": 1, "logit_bias": {"5": 1.0}, "stream": True, "echo": False,
    "stream_options": {"include_usage": True}, "stop_token_ids": [7], "user": "me", "priority": 1,
}  # fmt: skip
CHAT: dict[str, Any] = {
    "model": "tiny", "max_completion_tokens": 3, "logprobs": True, "top_logprobs": 2,
    "messages": [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}], "name": "me"},
    ],
    "chat_template_kwargs": {"style": "formal", "tools": [{"name": "f"}]}, "response_format": {"type": "text"},
}  # fmt: skip
BODIES = {
    "/v1/completions": COMPLETION,
    "/v1/chat/completions": CHAT,
    "/tokenize": {"model": "tiny", "prompt": "Hello", "add_special_tokens": True},
    "/detokenize": {"model": "tiny", "tokens": [1, 2, 3], "skip_special_tokens": False},
}
KNOWN = (
    *COMPLETION, *CHAT, "best_of", "suffix", "min_p", "min_tokens", "timeout_s", "tenant", "slo_class", "request_id",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "tool_choice", "tools", "modalities", "audio",
    "guided_json", "add_generation_prompt", "ignore_eos", "skip_special_tokens", "include_stop_str_in_output",
)  # fmt: skip
OURS = {400, 404, 405, 409, 413, 429, 499, 503, 504}
LONGEST_SENTENCE = 2000

paths = st.sampled_from(sorted(BODIES))


def check(answer: httpx.Response) -> None:
    """An answer, or OpenAI's error with a sentence."""
    if answer.status_code == 200:
        kind = answer.headers["content-type"]
        assert answer.text.endswith("data: [DONE]\n\n") if "event-stream" in kind else isinstance(answer.json(), dict)
        return
    assert answer.status_code in OURS, answer.text[:500]
    error = answer.json()["error"]
    assert error["message"].strip() and len(error["message"]) <= LONGEST_SENTENCE, error["message"][:200]
    assert "Traceback" not in error["message"] and error["type"]


def post(front: Front, path: str, content: bytes, headers: dict[str, str] | None = None) -> None:
    check(front.run(front.http.post(path, content=content, headers=headers or {})))
    front.still_serves()


@bounded(140)
@given(data=st.data())
def test_bodies_near_valid_ones(front: Front, data: st.DataObject) -> None:
    path = data.draw(paths)
    body = data.draw(bent_json(BODIES[path], KNOWN))
    post(front, path, json.dumps(body).encode())


@bounded(80)
@given(data=st.data())
def test_bodies_of_broken_bytes(front: Front, data: st.DataObject) -> None:
    path = data.draw(paths)
    whole = orjson.dumps(BODIES[path])
    odd = st.sampled_from(
        (b"", b"NaN", b'{"prompt": Infinity}', b'{"a":1,"a":2}', b'"\\ud800"', b'{"prompt":"\\ud800"}', b"[" * 100_000,
         b'{"a":' * 3000, b"9" * 100_000, b'{"max_tokens":' + b"9" * 9000 + b"}", b"\xef\xbb\xbf{}", b"\xff\xfe{\0}\0")
    )  # fmt: skip
    post(front, path, data.draw(bent_bytes(whole) | st.binary(max_size=60) | odd))


@bounded(60)
@given(
    name=st.sampled_from(("authorization", "x-request-id", "traceparent", "content-type", "content-length", "x-odd")),
    value=st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=300),
)
def test_headers(front: Front, name: str, value: str) -> None:
    request = front.http.build_request("POST", "/v1/completions", json=COMPLETION)
    request.headers = httpx.Headers([*request.headers.raw, (name.encode(), value.strip().encode("latin-1"))])
    check(front.run(front.http.send(request)))
    front.still_serves()


@bounded(60)
@given(
    path=st.sampled_from(["/v1/models/", "/v1/", "/", "/metrics", *BODIES]),
    rest=st.binary(max_size=30),
    query=st.binary(max_size=30),
    method=st.sampled_from(("GET", "POST", "PUT", "HEAD", "OPTIONS", "DELETE")),
)
def test_paths_and_queries(front: Front, path: str, rest: bytes, query: bytes, method: str) -> None:
    answer = front.run(front.http.request(method, f"{path}{quote_from_bytes(rest)}?{quote_from_bytes(query)}"))
    if answer.content:
        check(answer)
    else:
        assert answer.status_code in OURS | {200, 204, 307}
    front.still_serves()


RAW = (
    b"POST /v1/completions?a=b HTTP/1.1\r\nHost: gateway\r\nContent-Type: application/json\r\nX-Request-Id: r\r\n"
    b"Connection: close\r\nContent-Length: 48\r\n\r\n" + b'{"model":"tiny","prompt":"Hello","max_tokens":2}'
)


@bounded(80)
@given(raw=bent_bytes(RAW) | st.binary(max_size=200))
@example(raw=RAW.replace(b"/v1/completions", b"/v1/\xff\xfe"))
@example(raw=RAW.replace(b"Content-Length: 48", b"Content-Length: 99999999999999999999"))
@example(raw=RAW.replace(b"Content-Length: 48", b"Transfer-Encoding: chunked"))
@example(raw=RAW.replace(b"X-Request-Id: r", b"X-Request-Id: \xff\x00\x01"))
def test_what_is_no_http_at_all(front: Front, raw: bytes) -> None:
    said = front.run(_exchange(front.server.port, raw))
    status = said.split(b" ", 2)[1:2]
    assert not said or (said.startswith(b"HTTP/1.") and not status[0].startswith(b"5")), said[:300]
    front.still_serves()


async def _exchange(port: int, raw: bytes) -> bytes:
    """Say this, then nothing more; returns all that comes back."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(raw)
        writer.write_eof()
        return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


def test_lists_within_lists_are_refused_where_a_refusal_quotes_them(front: Front) -> None:
    """repr and json.dumps of a deep value overflow the interpreter's stack."""
    deep = nested(900, list)

    def text(body: dict[str, Any]) -> bytes:
        return json.dumps(body).encode()

    for fields in ({"logit_bias": {"1": deep}}, {"response_format": {"type": deep}}):
        answer = front.run(front.http.post("/v1/completions", content=text(COMPLETION | fields)))
        assert answer.status_code == 400
    part = [{"role": "user", "content": [{"type": deep}]}]
    for fields in ({"messages": part}, {"chat_template_kwargs": {"tools": deep}}):
        answer = front.run(front.http.post("/v1/chat/completions", content=text(CHAT | fields)))
        assert answer.status_code == 400
    front.still_serves()
