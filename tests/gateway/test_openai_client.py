"""The official OpenAI client against our HTTP front end, streaming and not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

from distserve.core.types import Code, FinishReason
from distserve.gateway.backend import RequestFailed
from distserve.gateway.text import TextCodec
from tests.gateway.fake_backend import FakeBackend, Script

ANSWER = " The capital of France is Paris. Grüße 🙂!"


@pytest.fixture
async def client(http_url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{http_url}/v1", api_key="none", max_retries=0, timeout=20) as client:
        yield client


@pytest.fixture(autouse=True)
def script(backend: FakeBackend, codec: TextCodec) -> Script:
    """Every request is answered with ANSWER and the end token."""
    backend.script = Script(tokens=[*codec.encode(ANSWER), 2])
    return backend.script


async def test_completion(client: openai.AsyncOpenAI, codec: TextCodec, backend: FakeBackend) -> None:
    answer = await client.completions.create(model="tiny", prompt="What?", max_tokens=100)
    assert answer.choices[0].text == ANSWER
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    prompt, completion = len(codec.encode("What?")), len(codec.encode(ANSWER)) + 1
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt, completion)
    assert answer.usage.prompt_tokens_details is not None and answer.usage.prompt_tokens_details.cached_tokens == 3
    assert answer.id == backend.submitted[0].id
    served = answer.model_extra["distserve"] if answer.model_extra else {}
    assert (served["prefill_instance"], served["decode_instance"]) == ("p0#1", "d0#2")
    assert served["kv_bytes_moved"] == 4096
    parts = served["timings"]
    assert sum(parts[f"{p}_s"] for p in ("gateway", "dispatch", "queue", "prefill")) == pytest.approx(parts["ttft_s"])


async def test_completion_defaults_to_sixteen_tokens(client: openai.AsyncOpenAI, script: Script) -> None:
    script.tokens = ()
    answer = await client.completions.create(model="tiny", prompt="What?")
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None and answer.usage.completion_tokens == 16


@pytest.mark.parametrize("batch", [1, 3, 100])
async def test_streamed_completion(client: openai.AsyncOpenAI, script: Script, batch: int) -> None:
    script.batch = batch
    stream = await client.completions.create(
        model="tiny", prompt="What?", max_tokens=100, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].text for c in chunks if c.choices) == ANSWER
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert all(c.usage is None for c in chunks[:-1])
    assert chunks[-1].usage.completion_tokens == len(script.tokens)


async def test_streamed_chat(client: openai.AsyncOpenAI, backend: FakeBackend, codec: TextCodec) -> None:
    system: Any = {"role": "system", "content": "Brief."}
    user: Any = {"role": "user", "content": [{"type": "text", "text": "Hi"}]}
    stream = await client.chat.completions.create(model="tiny", messages=[system, user], stream=True)
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(c.choices[0].delta.role is None for c in chunks[1:])
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == ANSWER
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[-1].model_extra is not None
    assert chunks[-1].model_extra["distserve"]["decode_instance"] == "d0#2"
    expected = "<|im_start|>system\nBrief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert backend.submitted[0].prompt_token_ids == codec.encode(expected)
    assert backend.submitted[0].stopping.max_tokens == 256 - len(codec.encode(expected))


def test_sync_client(http_url_in_thread: str) -> None:
    with openai.OpenAI(base_url=f"{http_url_in_thread}/v1", api_key="none", max_retries=0, timeout=20) as client:
        assert [m.id for m in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny").id == "tiny"
        stream = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "Hi"}], max_completion_tokens=5, stream=True
        )
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"


async def test_several_prompts_and_choices(client: openai.AsyncOpenAI, backend: FakeBackend, codec: TextCodec) -> None:
    backend.script = Script(each=lambda request, i: int(request.id.rsplit("-", 1)[1]) + 65)
    answer = await client.completions.create(model="tiny", prompt=["a b", "c"], n=2, seed=7, max_tokens=3)
    expected = [codec.decode([65 + i] * 3) for i in range(4)]
    assert [(c.index, c.text) for c in answer.choices] == list(enumerate(expected))
    assert [r.id for r in backend.submitted] == [f"{answer.id}-{i}" for i in range(4)]
    assert [r.sampling.seed for r in backend.submitted] == [7, 8, 7, 8]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(codec.encode("a b")) + len(codec.encode("c"))
    assert answer.usage.completion_tokens == 12
    assert answer.model_extra is not None and len(answer.model_extra["distserve"]["choices"]) == 4


async def test_several_streamed_choices(client: openai.AsyncOpenAI, backend: FakeBackend, codec: TextCodec) -> None:
    backend.script = Script(each=lambda request, i: int(request.id.rsplit("-", 1)[1]) + 65)
    stream = await client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hi"}], n=3, max_tokens=4, stream=True
    )
    texts, roles, ends = ["", "", ""], [0, 0, 0], ["", "", ""]
    async for chunk in stream:
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        roles[choice.index] += choice.delta.role == "assistant"
        ends[choice.index] += choice.finish_reason or ""
    assert texts == [codec.decode([65 + i] * 4) for i in range(3)]
    assert roles == [1, 1, 1] and ends == ["length"] * 3


async def test_token_prompts(client: openai.AsyncOpenAI, backend: FakeBackend) -> None:
    await client.completions.create(model="tiny", prompt=[5, 6, 7])
    await client.completions.create(model="tiny", prompt=[[8], [9, 10]])
    assert [r.prompt_token_ids for r in backend.submitted] == [(5, 6, 7), (8,), (9, 10)]


async def all_choices(answer: Any) -> list[Any]:
    """A whole answer's choices, or each chunk's."""
    if isinstance(answer, openai.AsyncStream):
        return [chunk.choices[0] async for chunk in answer]
    return list(answer.choices)


@pytest.mark.parametrize("stream", [False, True])
async def test_stop_text_over_token_borders(client: openai.AsyncOpenAI, backend: FakeBackend, stream: bool) -> None:
    answer = await client.completions.create(
        model="tiny", prompt="What?", max_tokens=100, stop=["of Fra", "Köln"], stream=stream
    )
    choices = await all_choices(answer)
    assert "".join(c.text for c in choices) == " The capital "
    assert choices[-1].finish_reason == "stop"
    assert choices[-1].model_extra is not None and choices[-1].model_extra["stop_reason"] == "of Fra"
    assert list(backend.closed.values()) == [FinishReason.STOP]


async def test_extensions_reach_the_request(client: openai.AsyncOpenAI, backend: FakeBackend) -> None:
    extra = {
        "top_k": 5, "min_p": 0.1, "min_tokens": 2, "ignore_eos": True, "stop_token_ids": [9],
        "repetition_penalty": 1.1, "priority": 3, "tenant": "acme", "request_id": "mine", "unknown_field": 1,
    }  # fmt: skip
    await client.completions.create(
        model="tiny", prompt="x", temperature=0.5, top_p=0.9, presence_penalty=1, frequency_penalty=-1,
        logit_bias={"7": -100}, seed=3, max_tokens=8, user="someone", extra_body=extra,
    )  # fmt: skip
    request = backend.submitted[0]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 5, 0.1)
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.1, 1.0, -1.0)
    assert (sampling.seed, sampling.logit_bias, sampling.logprobs) == (3, ((7, -100.0),), -1)
    assert (request.stopping.max_tokens, request.stopping.min_tokens, request.stopping.stop_token_ids) == (8, 2, (9,))
    assert (request.id, request.priority, request.tenant) == ("mine", 3, "acme")


async def test_end_tokens_are_the_models_and_the_clients(client: openai.AsyncOpenAI, backend: FakeBackend) -> None:
    await client.completions.create(model="tiny", prompt="x", extra_body={"stop_token_ids": [9, 2]})
    await client.completions.create(model="tiny", prompt="x")
    first, second = backend.submitted
    assert first.stopping.stop_token_ids == (2, 9)
    assert first.sampling.seed != second.sampling.seed  # drawn


async def test_a_stop_token_leaves_no_text(client: openai.AsyncOpenAI, script: Script, codec: TextCodec) -> None:
    ids = codec.encode(" fox dog")
    script.tokens = ids
    answer = await client.completions.create(model="tiny", prompt="x", extra_body={"stop_token_ids": [ids[-1]]})
    assert answer.choices[0].text == codec.decode(ids[:-1])
    assert answer.choices[0].model_extra is not None
    assert answer.choices[0].model_extra["stop_reason"] == ids[-1]
    shown = await client.completions.create(
        model="tiny", prompt="x", extra_body={"stop_token_ids": [ids[-1]], "include_stop_str_in_output": True}
    )
    assert shown.choices[0].text == " fox dog"


@pytest.mark.parametrize("stream", [False, True])
async def test_chat_logprobs(client: openai.AsyncOpenAI, script: Script, codec: TextCodec, stream: bool) -> None:
    script.tokens = codec.encode("🙂 a")
    answer = await client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "x"}], max_tokens=len(script.tokens), logprobs=True,
        top_logprobs=2, stream=stream,
    )  # fmt: skip
    entries = [e for c in await all_choices(answer) if c.logprobs for e in c.logprobs.content]
    assert bytes(b for entry in entries for b in entry.bytes or ()).decode() == "🙂 a"
    assert len(entries) == len(script.tokens)
    assert all(e.logprob == -0.5 and [t.logprob for t in e.top_logprobs] == [-0.5, -1.5] for e in entries)


async def test_completion_logprobs(client: openai.AsyncOpenAI, script: Script, codec: TextCodec) -> None:
    script.tokens = codec.encode("The 🙂fox")
    answer = await client.completions.create(model="tiny", prompt="x", max_tokens=len(script.tokens), logprobs=1)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens is not None and logprobs.text_offset is not None
    assert logprobs.tokens[0] == "The" or logprobs.tokens[0].startswith("T")
    assert any(token.startswith("bytes:\\x") for token in logprobs.tokens)
    text = answer.choices[0].text
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        if not token.startswith("bytes:"):
            assert text[offset : offset + len(token)] == token
    assert logprobs.token_logprobs == [-0.5] * len(script.tokens)
    assert logprobs.top_logprobs is not None and all(len(top) == 1 for top in logprobs.top_logprobs)


@pytest.mark.parametrize("stream", [False, True])
async def test_echo(client: openai.AsyncOpenAI, stream: bool) -> None:
    answer = await client.completions.create(model="tiny", prompt="Ask: ", echo=True, max_tokens=100, stream=stream)
    text = "".join(choice.text for choice in await all_choices(answer))
    assert text == "Ask: " + ANSWER


async def test_errors_map_to_the_clients_exceptions(client: openai.AsyncOpenAI, backend: FakeBackend) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        await client.completions.create(model="huge", prompt="x")
    assert missing.value.code == "model_not_found" and "'tiny'" in missing.value.message
    with pytest.raises(openai.BadRequestError) as bad:
        await client.completions.create(model="tiny", prompt="x", temperature=3)
    assert bad.value.param == "temperature" and bad.value.type == "invalid_request_error"
    for code, kind in [
        (Code.RESOURCE_EXHAUSTED, openai.RateLimitError),
        (Code.UNAVAILABLE, openai.InternalServerError),
        (Code.ALREADY_EXISTS, openai.ConflictError),
        (Code.UNAUTHENTICATED, openai.AuthenticationError),
        (Code.INTERNAL, openai.InternalServerError),
    ]:
        backend.script.refuse = RequestFailed(code, "No.", 3.5)
        with pytest.raises(kind) as refused:
            await client.completions.create(model="tiny", prompt="x", stream=True)
        assert "No." in refused.value.message


async def test_the_client_waits_as_told_and_tries_again(http_url: str, backend: FakeBackend) -> None:
    backend.script.refuse = RequestFailed(Code.RESOURCE_EXHAUSTED, "The queue is full.", 0.001)

    async with openai.AsyncOpenAI(base_url=f"{http_url}/v1", api_key="none", max_retries=1) as client:
        asking = asyncio.create_task(client.completions.create(model="tiny", prompt="x", max_tokens=100))
        await backend.until(lambda: backend.refused > 0)
        backend.script.refuse = None
        assert (await asking).choices[0].text == ANSWER


@pytest.mark.parametrize("at", [0, 5])
async def test_an_error_before_and_after_the_first_token(client: openai.AsyncOpenAI, script: Script, at: int) -> None:
    script.fail_at = at
    got = []
    with pytest.raises(openai.APIError) as failed:
        async for chunk in await client.completions.create(model="tiny", prompt="x", max_tokens=50, stream=True):
            got.append(chunk)
    assert "instance died" in failed.value.message
    assert bool(got) == (at > 0)
    assert isinstance(failed.value, openai.APIStatusError) == (at == 0)


@pytest.mark.parametrize("stream", [False, True])
async def test_cancelled_by_an_operator(client: openai.AsyncOpenAI, backend: FakeBackend, stream: bool) -> None:
    backend.script.hold_at = 3

    async def ask() -> None:
        answer = await client.completions.create(model="tiny", prompt="x", max_tokens=50, stream=stream)
        if isinstance(answer, openai.AsyncStream):
            async for _ in answer:
                pass

    asking = asyncio.create_task(ask())
    await backend.until(lambda: bool(backend.live))
    assert await backend.cancel(next(iter(backend.live)))
    with pytest.raises(openai.APIError, match="cancelled"):
        await asking
