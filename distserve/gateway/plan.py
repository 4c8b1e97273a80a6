"""From what a client asked to core requests: the one place where limits, ranges and defaults are.

Owns every check that needs no instance, for all front ends alike; a refusal is a ``RequestFailed`` with a sentence that
says what is wrong and what to do, and the name of the field. Knows nothing of HTTP, gRPC or streams.
"""

from __future__ import annotations

import math
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from distserve.core.types import Code, ModelSpec, Request, Sampling, Stopping
from distserve.gateway.ask import Ask, Chat, Prompt
from distserve.gateway.backend import RequestFailed
from distserve.gateway.limits import Limits
from distserve.gateway.template import TemplateRefused
from distserve.gateway.text import TextCodec

SEEDS = 1 << 64
MAX_LOGPROBS = 20
MAX_STOP_TOKENS = 256
MAX_PRIORITY = 1000
MAX_NAME_CHARS = 128
_REQUEST_ID = re.compile(r"[!-~]{1,128}")
_TRACE = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")

# field → (lowest, highest, whether the lowest itself is excluded)
_RANGES: dict[str, tuple[float, float, bool]] = {
    "temperature": (0.0, 2.0, False),
    "top_p": (0.0, 1.0, True),
    "min_p": (0.0, 1.0, False),
    "repetition_penalty": (0.0, 10.0, True),
    "presence_penalty": (-2.0, 2.0, False),
    "frequency_penalty": (-2.0, 2.0, False),
}


@dataclass(frozen=True, slots=True)
class Served:
    """A model as it can be asked now. ``max_tokens``: prompt and output together."""

    name: str
    codec: TextCodec
    spec: ModelSpec
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Plan:
    """An admitted ask: ``requests[i * n + k]`` is answer k to prompt i; that number is the index clients see."""

    request_id: str
    served: Served
    requests: tuple[Request, ...]
    prompt_tokens: tuple[int, ...]  # of each prompt
    n: int
    seed: int
    stop: tuple[str, ...]
    include_stop: bool
    skip_special_tokens: bool
    tokenize_s: float


async def make_plan(ask: Ask, served: Served, limits: Limits) -> Plan:
    """Check, fill in and tokenize. Raises ``RequestFailed``, nearly always with INVALID_ARGUMENT."""
    n = _whole(ask, "n", ask.n, 1, limits.max_n, default=1)
    _check_counts(ask, n, limits)
    seed = secrets.randbelow(SEEDS) if ask.seed is None else ask.seed % SEEDS
    sampling = _sampling(ask, served.spec, limits)
    stop = _stop(ask, limits)
    started = time.perf_counter()
    prompts = [await tokenize(served, prompt, ask, limits) for prompt in ask.prompts]
    tokenize_s = time.perf_counter() - started
    request_id = _request_id(ask)
    timeout_s = _timeout(ask, limits)
    total = len(prompts) * n
    requests = tuple(
        Request(
            id=request_id if total == 1 else f"{request_id}-{index}",
            model=served.name,
            prompt_token_ids=prompts[index // n],
            sampling=replace(sampling, seed=(seed + index % n) % SEEDS),
            stopping=_stopping(ask, served, len(prompts[index // n])),
            timeout_s=timeout_s,
            priority=_whole(ask, "priority", ask.priority, -MAX_PRIORITY, MAX_PRIORITY, default=0),
            tenant=_name(ask, "tenant", ask.tenant),
            slo_class=_name(ask, "slo_class", ask.slo_class),
            trace=ask.trace if _TRACE.fullmatch(ask.trace) else "",
        )
        for index in range(total)
    )
    lengths = tuple(map(len, prompts))
    skip = ask.skip_special_tokens
    return Plan(request_id, served, requests, lengths, n, seed, stop, ask.include_stop, skip, tokenize_s)


async def tokenize(served: Served, prompt: Prompt, ask: Ask, limits: Limits) -> tuple[int, ...]:
    """A prompt's token ids, checked: not empty, in the vocabulary. Its length is checked with the output's."""
    field = ask.name_of("prompt")
    match prompt:
        case Chat():
            text = _render(served, prompt, field)
            ids = await served.codec.encode_aside(_short(text, field, limits), add_special_tokens=False)
        case str():
            ids = await served.codec.encode_aside(_short(prompt, field, limits), ask.add_special_tokens)
        case _:
            ids = prompt
            check_token_ids(ids, served.spec.vocab_size, field)
    if not ids:
        raise invalid(field, "The prompt is empty; send at least one token.")
    if 0 < limits.max_prompt_tokens < len(ids):
        raise invalid(field, f"The prompt has {len(ids)} tokens; at most {limits.max_prompt_tokens} are accepted.")
    return ids


def check_token_ids(ids: Sequence[int], vocab_size: int, field: str) -> None:
    """Every id must be in the vocabulary."""
    wrong = next((i for i in ids if not 0 <= i < vocab_size), None)
    if wrong is not None:
        raise invalid(field, f"Token id {wrong} is not in the model's vocabulary; ids run from 0 to {vocab_size - 1}.")


def invalid(field: str, sentence: str) -> RequestFailed:
    """A refusal of one field."""
    return RequestFailed(Code.INVALID_ARGUMENT, sentence, param=field)


def _check_counts(ask: Ask, n: int, limits: Limits) -> None:
    count = len(ask.prompts)
    field = ask.name_of("prompt")
    if count == 0:
        raise invalid(field, "The list of prompts is empty; send at least one prompt.")
    if count > limits.max_prompts:
        raise invalid(field, f"{count} prompts in one call are too many; send at most {limits.max_prompts}.")
    if count * n > limits.max_requests:
        raise invalid(
            "n", f"{count} prompts with n={n} make {count * n} answers; ask for at most {limits.max_requests}."
        )


def _render(served: Served, chat: Chat, field: str) -> str:
    if not served.codec.has_chat:
        raise invalid(
            field,
            f"The model '{served.name}' has no chat template; send a text prompt to completions instead.",
        )
    try:
        return served.codec.render(chat.messages, chat.add_generation_prompt, chat.variables)
    except TemplateRefused as refusal:
        raise invalid(field, f"The model's chat template does not take these messages: {refusal}.") from refusal


def _short(text: str, field: str, limits: Limits) -> str:
    """The text, unless it is so long that even tokenizing it would be a burden."""
    if len(text) > limits.max_prompt_chars:
        raise invalid(field, f"The prompt has {len(text)} characters; at most {limits.max_prompt_chars} are accepted.")
    return text


def _sampling(ask: Ask, spec: ModelSpec, limits: Limits) -> Sampling:
    top_k = 0 if ask.top_k == -1 else ask.top_k
    return Sampling(
        temperature=_number(ask, "temperature", ask.temperature, default=1.0),
        top_k=_whole(ask, "top_k", top_k, 0, 2**31 - 1, default=0),
        top_p=_number(ask, "top_p", ask.top_p, default=1.0),
        min_p=_number(ask, "min_p", ask.min_p, default=0.0),
        repetition_penalty=_number(ask, "repetition_penalty", ask.repetition_penalty, default=1.0),
        presence_penalty=_number(ask, "presence_penalty", ask.presence_penalty, default=0.0),
        frequency_penalty=_number(ask, "frequency_penalty", ask.frequency_penalty, default=0.0),
        logprobs=_whole(ask, "logprobs", ask.logprobs, 0, MAX_LOGPROBS, default=-1),
        logit_bias=_logit_bias(ask, spec, limits.max_logit_bias),
    )


def _logit_bias(ask: Ask, spec: ModelSpec, most: int) -> tuple[tuple[int, float], ...]:
    field = ask.name_of("logit_bias")
    if len(ask.logit_bias) > most:
        raise invalid(field, f"{len(ask.logit_bias)} biased tokens are too many; send at most {most}.")
    check_token_ids(tuple(ask.logit_bias), spec.vocab_size, field)
    for token_id, bias in ask.logit_bias.items():
        if not -100.0 <= bias <= 100.0:
            raise invalid(field, f"The bias {bias} of token {token_id} is out of range; send -100 to 100.")
    return tuple(sorted(ask.logit_bias.items()))


def _stop(ask: Ask, limits: Limits) -> tuple[str, ...]:
    field = ask.name_of("stop")
    if len(ask.stop) > limits.max_stops:
        raise invalid(field, f"{len(ask.stop)} stop texts are too many; send at most {limits.max_stops}.")
    for text in ask.stop:
        if not text:
            raise invalid(field, "A stop text is empty; leave it out.")
        if len(text) > limits.max_stop_chars:
            raise invalid(
                field, f"A stop text has {len(text)} characters; at most {limits.max_stop_chars} are accepted."
            )
    return ask.stop


def _stopping(ask: Ask, served: Served, prompt_tokens: int) -> Stopping:
    max_tokens = _max_tokens(ask, served, prompt_tokens)
    min_tokens = _whole(ask, "min_tokens", ask.min_tokens, 0, max_tokens, default=0)
    field = ask.name_of("stop_token_ids")
    if len(ask.stop_token_ids) > MAX_STOP_TOKENS:
        raise invalid(field, f"{len(ask.stop_token_ids)} stop token ids are too many; send at most {MAX_STOP_TOKENS}.")
    check_token_ids(ask.stop_token_ids, served.spec.vocab_size, field)
    own = () if ask.ignore_eos else served.spec.eos_token_ids
    return Stopping(max_tokens, min_tokens, tuple(dict.fromkeys((*own, *ask.stop_token_ids))))


def _max_tokens(ask: Ask, served: Served, prompt_tokens: int) -> int:
    """The output the request may have: what was asked if it fits, otherwise as much as fits if nothing was asked."""
    room = served.max_tokens - prompt_tokens
    if room < 1:
        raise invalid(
            ask.name_of("prompt"),
            f"The prompt has {prompt_tokens} tokens, but prompt and output together can have at most "
            f"{served.max_tokens}; send a shorter prompt.",
        )
    if ask.max_tokens is None:
        return room if ask.default_max_tokens is None else min(room, ask.default_max_tokens)
    field = ask.name_of("max_tokens")
    if ask.max_tokens < 1:
        raise invalid(field, f"{field} is {ask.max_tokens}, but must be at least 1.")
    if ask.max_tokens > room:
        raise invalid(
            field,
            f"{field} is {ask.max_tokens}, but beside the prompt's {prompt_tokens} tokens only {room} fit into the "
            f"{served.max_tokens} that prompt and output together can have; ask for fewer.",
        )
    return ask.max_tokens


def _request_id(ask: Ask) -> str:
    if not ask.request_id:
        return f"{ask.drawn_id_prefix}-{secrets.token_hex(12)}"
    if not _REQUEST_ID.fullmatch(ask.request_id):
        raise invalid("request_id", "The request id must be 1 to 128 printable ASCII characters without spaces.")
    return ask.request_id


def _name(ask: Ask, name: str, value: str) -> str:
    if len(value) > MAX_NAME_CHARS:
        field = ask.name_of(name)
        raise invalid(field, f"{field} has {len(value)} characters; at most {MAX_NAME_CHARS} are accepted.")
    return value


def _timeout(ask: Ask, limits: Limits) -> float:
    if ask.timeout_s is None:
        return limits.default_timeout_s
    if not ask.timeout_s > 0:
        raise RequestFailed(Code.DEADLINE_EXCEEDED, "The deadline had passed before the request began.")
    return min(ask.timeout_s, limits.max_timeout_s)


def _number(ask: Ask, name: str, value: float | None, default: float) -> float:
    if value is None:
        return default
    low, high, open_low = _RANGES[name]
    if not math.isfinite(value) or not low <= value <= high or (open_low and value == low):
        bounds = f"more than {low:g} and at most {high:g}" if open_low else f"from {low:g} to {high:g}"
        raise invalid(ask.name_of(name), f"{ask.name_of(name)} is {value:g}, but must be {bounds}.")
    return value


def _whole(ask: Ask, name: str, value: int | None, low: int, high: int, default: int) -> int:
    if value is None:
        return default
    if not low <= value <= high:
        raise invalid(ask.name_of(name), f"{ask.name_of(name)} is {value}, but must be from {low} to {high}.")
    return value
