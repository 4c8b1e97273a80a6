"""Answers in OpenAI's shapes: whole bodies and stream chunks, as plain dicts for orjson.

Owns the JSON of completions and chat completions, log probabilities and the ``distserve`` object that says how a
request was served. Pure.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from distserve.core.effects import Account
from distserve.core.types import Token
from distserve.gateway.answer import Answer, Ended, Piece
from distserve.gateway.http.body import View
from distserve.gateway.plan import Plan
from distserve.gateway.text import TextCodec

LOWEST_LOGPROB = -9999.0
"""What minus infinity is written as: JSON has no word for it."""

Json = dict[str, Any]


class Shape:
    """Writes one answer. Remembers which choices have begun, and collects the whole when it is not streamed."""

    def __init__(self, plan: Plan, view: View) -> None:
        self._plan = plan
        self._view = view
        self._codec = plan.served.codec
        self._created = int(time.time())
        self._begun: set[int] = set()
        self._echo = _echo(plan) if view.echo else ()
        self._texts: list[list[str]] = [[] for _ in plan.requests]
        self._pieces: list[list[Piece]] = [[] for _ in plan.requests]
        self._ended: dict[int, Ended] = {}

    # ── streamed ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def chunks(self, event: Piece | Ended) -> list[Json]:
        """The chunks that an event makes: none, when all it brings is held back."""
        if isinstance(event, Ended):
            self._ended[event.index] = event
            return [*self._opening(event.index), self._ending(event)]
        logprobs = self._logprobs([event])
        if not event.text and logprobs is None:
            return []
        chunks = self._opening(event.index)
        chunks.append(self._chunk(event.index, event.text, logprobs, None))
        return chunks

    def usage_chunk(self, answer: Answer) -> Json:
        """The chunk after the last, when the client asked for usage."""
        return self._envelope(stream=True) | {"choices": [], "usage": self.usage(answer), "distserve": self.served()}

    def _opening(self, index: int) -> list[Json]:
        """What a choice's stream begins with: the assistant's role, or the echoed prompt."""
        if index in self._begun:
            return []
        self._begun.add(index)
        if self._view.chat:
            chunk = self._chunk(index, "", None, None)
            chunk["choices"][0]["delta"] = {"role": "assistant", "content": ""}
            return [chunk]
        return [self._chunk(index, self._prompt_text(index), None, None)] if self._echo else []

    def _ending(self, ended: Ended) -> Json:
        chunk = self._chunk(ended.index, "", None, ended)
        if self._view.chat:
            chunk["choices"][0]["delta"] = {}
        return chunk | {"distserve": served_object(ended.account)}

    def _chunk(self, index: int, text: str, logprobs: Json | None, ended: Ended | None) -> Json:
        content: Json = {"delta": {"content": text}} if self._view.chat else {"text": text}
        choice = {"index": index} | content | {"logprobs": logprobs} | _finish(ended)
        chunk = self._envelope(stream=True) | {"choices": [choice]}
        if self._view.include_usage:
            chunk["usage"] = None
        return chunk

    # ── whole ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def collect(self, event: Piece | Ended) -> None:
        """Keep an event for ``whole``."""
        if isinstance(event, Ended):
            self._ended[event.index] = event
        else:
            self._texts[event.index].append(event.text)
            self._pieces[event.index].append(event)

    def whole(self, answer: Answer) -> Json:
        """The body of an answer that is not streamed; every choice must have ended."""
        choices = [self._whole_choice(index) for index in range(len(self._texts))]
        return self._envelope(stream=False) | {
            "choices": choices,
            "usage": self.usage(answer),
            "distserve": self.served(),
        }

    def _whole_choice(self, index: int) -> Json:
        text = self._prompt_text(index) + "".join(self._texts[index])
        message = {"message": {"role": "assistant", "content": text, "refusal": None}}
        content: Json = message if self._view.chat else {"text": text}
        logprobs = {"logprobs": self._logprobs(self._pieces[index])}
        return {"index": index} | content | logprobs | _finish(self._ended[index])

    # ── both ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def usage(self, answer: Answer) -> Json:
        """Token counts: each prompt once, all choices."""
        prompt, completion = sum(self._plan.prompt_tokens), answer.completion_tokens
        firsts = [self._ended.get(i) for i in range(0, len(self._plan.requests), self._plan.n)]
        cached = sum(e.account.timings.cached_tokens for e in firsts if e is not None and e.account is not None)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def account(self) -> Account | None:
        """How the first choice was served."""
        return self._ended[0].account if 0 in self._ended else None

    def served(self) -> Json | None:
        """The ``distserve`` object: the first choice's, with every choice's under ``choices`` if there are several."""
        first = served_object(self.account())
        if first is not None and len(self._plan.requests) > 1:
            first["choices"] = [served_object(self._ended[i].account) for i in sorted(self._ended)]
        return first

    def _envelope(self, stream: bool) -> Json:
        kind = ("chat.completion.chunk" if stream else "chat.completion") if self._view.chat else "text_completion"
        return {
            "id": self._plan.request_id,
            "object": kind,
            "created": self._created,
            "model": self._plan.served.name,
            "system_fingerprint": f"fp_{self._plan.served.spec.fingerprint[:16]}",
        }

    def _prompt_text(self, index: int) -> str:
        return self._echo[index // self._plan.n] if self._echo else ""

    def _logprobs(self, pieces: Sequence[Piece]) -> Json | None:
        alternatives = self._view.alternatives
        if alternatives is None or not any(piece.tokens for piece in pieces):
            return None
        if self._view.chat:
            tokens = [token for piece in pieces for token in piece.tokens]
            return {"content": [_chat_logprob(self._codec, token) for token in tokens], "refusal": None}
        return _completion_logprobs(self._codec, pieces, alternatives)


def served_object(account: Account | None) -> Json | None:
    """How a request was served. ``gateway + dispatch + queue + prefill`` sum to ``ttft_s``."""
    if account is None:
        return None
    parts = account.timings
    return {
        "prefill_instance": account.prefill_instance,
        "decode_instance": account.decode_instance,
        "attempts": account.attempts,
        "kv_bytes_moved": parts.kv_bytes_moved,
        "cached_tokens": parts.cached_tokens,
        "timings": {
            "gateway_s": parts.gateway_s,
            "dispatch_s": parts.dispatch_s,
            "queue_s": parts.queue_s,
            "prefill_s": parts.prefill_s,
            "ttft_s": account.ttft_s,
            "reserve_s": parts.reserve_s,
            "transfer_s": parts.transfer_s,
            "decode_queue_s": parts.decode_queue_s,
            "total_s": account.total_s,
        },
    }


def _finish(ended: Ended | None) -> Json:
    """``stop_reason`` is the stop text or stop token id, as vLLM has it."""
    if ended is None:
        return {"finish_reason": None}
    return {"finish_reason": ended.reason.value, "stop_reason": ended.matched}


def _echo(plan: Plan) -> tuple[str, ...]:
    prompts = [plan.requests[i * plan.n].prompt_token_ids for i in range(len(plan.prompt_tokens))]
    return tuple(plan.served.codec.decode(ids) for ids in prompts)


def _chat_logprob(codec: TextCodec, token: Token) -> Json:
    top = [_chat_entry(codec, token_id, logprob) for token_id, logprob in token.top]
    return _chat_entry(codec, token.id, token.logprob) | {"top_logprobs": top}


def _chat_entry(codec: TextCodec, token_id: int, logprob: float | None) -> Json:
    content = codec.token_bytes(token_id)
    return {
        "token": content.decode(errors="replace"),
        "logprob": _finite(logprob),
        "bytes": list(content),
    }


def _completion_logprobs(codec: TextCodec, pieces: Sequence[Piece], alternatives: int) -> Json:
    tokens = [token for piece in pieces for token in piece.tokens]
    top = [_top(codec, token) for token in tokens] if alternatives else None
    return {
        "tokens": [_token_text(codec, token.id) for token in tokens],
        "token_logprobs": [_finite(token.logprob) for token in tokens],
        "top_logprobs": top,
        "text_offset": [offset for piece in pieces for offset in piece.offsets],
    }


def _top(codec: TextCodec, token: Token) -> dict[str, float]:
    """The likeliest tokens, and the chosen one if it is not among them."""
    top = {_token_text(codec, token_id): _finite(logprob) for token_id, logprob in token.top}
    top.setdefault(_token_text(codec, token.id), _finite(token.logprob))
    return top


def _token_text(codec: TextCodec, token_id: int) -> str:
    """The token's text, or OpenAI's ``bytes:\\xe2\\x82`` when it is not whole characters."""
    content = codec.token_bytes(token_id)
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def _finite(logprob: float | None) -> float:
    return LOWEST_LOGPROB if logprob is None else max(logprob, LOWEST_LOGPROB)
