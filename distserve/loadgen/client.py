"""One request to an OpenAI-compatible server, and what a stop-watch says about it.

Latency counts from the moment a request was *due*: a client that sends late must not hide a server's queue.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from distserve.loadgen.http import HttpFailed, Target, post_events
from distserve.loadgen.workload import Ask


@dataclass(slots=True)
class Record:
    """What came of one request. Times in seconds, on the clock of ``time.perf_counter``."""

    due: float
    sent: float
    token_times: list[float] = field(default_factory=list)
    end: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    finish_reason: str = ""
    error: str = ""
    cut_off: bool = False  # ended by the client, because the run was decided

    @property
    def ok(self) -> bool:
        return not self.error and not self.cut_off and bool(self.token_times)

    @property
    def ttft_s(self) -> float:
        return self.token_times[0] - self.due

    @property
    def tpot_s(self) -> float:
        """Mean time per token after the first; 0 when there was no second."""
        if self.output_tokens < 2:
            return 0.0
        return (self.token_times[-1] - self.token_times[0]) / (self.output_tokens - 1)

    @property
    def e2e_s(self) -> float:
        return self.end - self.due

    @property
    def gaps_s(self) -> list[float]:
        """Time between the messages that carried tokens."""
        return [b - a for a, b in zip(self.token_times, self.token_times[1:], strict=False)]


@dataclass(frozen=True, slots=True)
class Client:
    """How requests are put: the server, the model, and what goes along with every request."""

    target: Target
    model: str
    ignore_eos: bool = True
    temperature: float = 0.0
    api_key: str = ""
    timeout_s: float = 600.0
    count_empty: bool = False  # count messages without text as tokens
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    async def send(self, ask: Ask, due: float | None = None) -> Record:
        """Send one request and read its answer to the end. Errors are in the record."""
        sent = time.perf_counter()
        record = Record(due if due is not None else sent, sent)
        path = "/v1/chat/completions" if ask.is_chat else "/v1/completions"
        try:
            async for came, data in post_events(self.target, path, self._body(ask), self.headers, self.timeout_s):
                if data == b"[DONE]":
                    break
                self._take(record, came, orjson.loads(data))
        except (HttpFailed, OSError, TimeoutError, orjson.JSONDecodeError) as error:
            record.error = f"{type(error).__name__}: {error}" if not isinstance(error, HttpFailed) else str(error)
        record.end = time.perf_counter()
        if not record.error and not record.token_times:
            record.error = "the answer had no token"
        record.output_tokens = record.output_tokens or len(record.token_times)
        return record

    def _body(self, ask: Ask) -> dict[str, Any]:
        prompt = {"messages": list(ask.prompt)} if ask.is_chat else {"prompt": ask.prompt}
        body = {
            "model": self.model,
            **prompt,
            "max_tokens": ask.max_tokens,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return body | ({"ignore_eos": True} if self.ignore_eos else {}) | dict(self.extra)

    def _take(self, record: Record, came: float, message: Any) -> None:
        if not isinstance(message, dict):
            raise HttpFailed(f"an event is no JSON object: {message!r}")
        if error := message.get("error"):
            raise HttpFailed(str(error.get("message", error) if isinstance(error, dict) else error))
        if usage := message.get("usage"):
            record.prompt_tokens = int(usage.get("prompt_tokens") or 0)
            record.output_tokens = int(usage.get("completion_tokens") or 0)
        for choice in message.get("choices") or ():
            text = choice.get("text") or (choice.get("delta") or {}).get("content")
            if text or (self.count_empty and not choice.get("finish_reason")):
                record.token_times.append(came)
            record.finish_reason = choice.get("finish_reason") or record.finish_reason
