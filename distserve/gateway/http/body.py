"""OpenAI request bodies as ``Ask``.

Owns the field names of completions and chat completions, and what of OpenAI's API is refused (with a sentence) rather
than ignored: whatever would change the answer. Other unknown fields are ignored, as the field does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distserve.gateway.ask import Ask, Chat, Prompt
from distserve.gateway.fields import Fields, generation_fields, refuse, shown, whole_numbers
from distserve.gateway.plan import invalid

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default for completions; chat completions run until the model's length."""

_UNSUPPORTED = {
    "guided_json": "constrain the answer in the prompt",
    "guided_regex": "constrain the answer in the prompt",
    "guided_choice": "constrain the answer in the prompt",
    "guided_grammar": "constrain the answer in the prompt",
    "structured_outputs": "constrain the answer in the prompt",
    "prompt_logprobs": "ask for logprobs of the output",
    "use_beam_search": "sample with n instead",
}
_COMPLETION_UNSUPPORTED = _UNSUPPORTED | {"suffix": "put all context into the prompt"}
_CHAT_UNSUPPORTED = _UNSUPPORTED | {
    "tools": "describe the tools in a message",
    "functions": "describe the functions in a message",
    "audio": "this is a text model",
    "continue_final_message": "use completions to continue a text",
}
_MAX_MESSAGES = 4096


@dataclass(frozen=True, slots=True)
class View:
    """How the client wants to see the answer; of no concern to who makes it."""

    chat: bool
    stream: bool = False
    include_usage: bool = False
    echo: bool = False
    alternatives: int | None = None  # log probabilities: None for none, else how many of the likeliest


def completion_ask(fields: Fields, request_id: str, trace: str) -> tuple[Ask, View]:
    """A body of ``/v1/completions``. Raises ``RequestFailed``."""
    refuse(fields, _COMPLETION_UNSUPPORTED)
    _refuse_common(fields)
    n, best_of = fields.whole("n"), fields.whole("best_of")
    if best_of is not None and best_of != (1 if n is None else n):
        raise invalid("best_of", f"best_of={best_of} is not supported; leave it out, or make it equal to n.")
    logprobs = fields.whole("logprobs")
    echo = fields.flag("echo") or False
    if echo and logprobs is not None:
        raise invalid("echo", "echo cannot be combined with logprobs: prompt tokens have none; leave one out.")
    ask = Ask(
        prompts=_prompts(fields.get("prompt")),
        model=fields.text("model") or "",
        request_id=fields.text("request_id") or request_id,
        drawn_id_prefix="cmpl",
        add_special_tokens=fields.flag("add_special_tokens") is not False,
        n=n,
        logprobs=logprobs,
        max_tokens=fields.whole("max_tokens"),
        default_max_tokens=DEFAULT_COMPLETION_TOKENS,
        trace=trace,
        **generation_fields(fields),
    )
    stream, include_usage = _streaming(fields)
    return ask, View(False, stream, include_usage, echo, logprobs)


def chat_ask(fields: Fields, request_id: str, trace: str) -> tuple[Ask, View]:
    """A body of ``/v1/chat/completions``. Raises ``RequestFailed``."""
    refuse(fields, _CHAT_UNSUPPORTED)
    _refuse_common(fields)
    newer = fields.whole("max_completion_tokens")
    length_name = "max_tokens" if newer is None else "max_completion_tokens"
    alternatives = _alternatives(fields)
    ask = Ask(
        prompts=(read_chat(fields),),
        model=fields.text("model") or "",
        request_id=fields.text("request_id") or request_id,
        drawn_id_prefix="chatcmpl",
        n=fields.whole("n"),
        logprobs=alternatives,
        max_tokens=fields.whole("max_tokens") if newer is None else newer,
        trace=trace,
        names={"prompt": "messages", "max_tokens": length_name, "logprobs": "top_logprobs"},
        **generation_fields(fields),
    )
    stream, include_usage = _streaming(fields)
    return ask, View(True, stream, include_usage, alternatives=alternatives)


def read_chat(fields: Fields) -> Chat:
    """``messages`` and what goes with them."""
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise invalid("messages", "messages must be a list of at least one message with role and content.")
    if len(messages) > _MAX_MESSAGES:
        raise invalid("messages", f"{len(messages)} messages are too many; send at most {_MAX_MESSAGES}.")
    prompted = fields.flag("add_generation_prompt")
    variables = fields.object("chat_template_kwargs") or {}
    return Chat(tuple(_message(i, m) for i, m in enumerate(messages)), prompted is not False, variables)


def _message(position: int, message: Any) -> Mapping[str, Any]:
    where = f"messages.{position}"
    if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not message["role"]:
        raise invalid(where, f"{where} must be an object with a role and a content.")
    if message.get("tool_calls") or message.get("function_call"):
        raise invalid(where, f"{where} has tool calls, which are not supported; put their text into content.")
    return {**message, "content": _content(f"{where}.content", message.get("content"))}


def _content(where: str, content: Any) -> str:
    """A string, or OpenAI's list of parts, of which only text is understood."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid(where, f"{where} must be a string or a list of text parts.")
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = shown(part.get("type")) if isinstance(part, dict) else type(part).__name__
            raise invalid(where, f"{where} has a part of type {kind}, but only text parts are supported.")
        texts.append(part["text"])
    return "".join(texts)


def _prompts(prompt: Any) -> tuple[Prompt, ...]:
    """A string, token ids, or a list of either."""
    match prompt:
        case str():
            return (prompt,)
        case [int(), *_]:
            return (whole_numbers("prompt", prompt),)
        case []:
            raise invalid("prompt", "The prompt is empty; send at least one token.")
        case list() if all(isinstance(p, str) for p in prompt):
            return tuple(prompt)
        case list() if all(isinstance(p, list) for p in prompt):
            return tuple(whole_numbers("prompt", p) for p in prompt)
        case None:
            raise invalid("prompt", "The prompt is missing; send a string, token ids, or a list of either.")
        case _:
            raise invalid("prompt", "prompt must be a string, a list of strings, token ids or a list of token ids.")


def _alternatives(fields: Fields) -> int | None:
    """Chat says ``logprobs: true`` and, beside it, how many ``top_logprobs``."""
    wanted, top = fields.flag("logprobs"), fields.whole("top_logprobs")
    if top is not None and not wanted:
        raise invalid("top_logprobs", "top_logprobs needs logprobs to be true.")
    return (top or 0) if wanted else None


def _streaming(fields: Fields) -> tuple[bool, bool]:
    """Returns (stream, include_usage)."""
    stream = fields.flag("stream") or False
    options = fields.object("stream_options")
    if options is not None and not stream:
        raise invalid("stream_options", "stream_options needs stream to be true.")
    return stream, Fields(options or {}).flag("include_usage") or False


def _refuse_common(fields: Fields) -> None:
    form = fields.object("response_format")
    if form is not None and form.get("type") not in (None, "text"):
        kind = shown(form.get("type"))
        raise invalid("response_format", f"response_format {kind} is not supported; only 'text' is.")
    modalities = fields.get("modalities")
    if modalities and modalities != ["text"]:
        raise invalid("modalities", "Only the modality 'text' is supported.")
    choice = fields.get("tool_choice")
    if choice not in (None, "none", "auto"):
        raise invalid("tool_choice", "tool_choice is not supported; leave it out.")
