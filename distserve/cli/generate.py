"""``distserve generate``: one prompt, its answer as it comes, and an account of how it was served."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from typing import Any

from google.protobuf.json_format import MessageToDict

from distserve.cli.paint import Paint, amount, span
from distserve.cli.remote import remote
from distserve.v1 import inference_pb2 as pb


def generate(parsed: argparse.Namespace) -> int:
    prompt = sys.stdin.read() if parsed.prompt == "-" else parsed.prompt
    messages = [("system", parsed.system)] if parsed.system else []
    request = request_of(parsed, [*messages, ("user", prompt)] if parsed.chat or messages else prompt)
    request.request_id = parsed.request_id
    request.stopping.ignore_eos = parsed.ignore_eos
    show: Callable[[str], None] = (lambda _: None) if parsed.json else write_now
    with remote(parsed) as gateway:
        text, finished, summary = follow(gateway.inference.Generate(request, **gateway.call), show)
    if parsed.json:
        print(json.dumps(as_json(text, finished, summary), indent=2))
        return 0
    print()
    if not parsed.quiet:
        print(account(summary, Paint(sys.stderr, parsed.plain)), file=sys.stderr)
    return 0


def request_of(parsed: argparse.Namespace, prompt: str | list[tuple[str, str]]) -> Any:
    """The request with the sampling flags of the command; only those that were given are set."""
    request = pb.GenerateRequest(model=parsed.model)
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.chat.messages.extend(pb.ChatMessage(role=role, content=content) for role, content in prompt)
    for name in ("temperature", "top_p", "top_k", "min_p", "seed"):
        if (value := getattr(parsed, name)) is not None:
            setattr(request.sampling, name, value)
    request.stopping.max_tokens = parsed.max_tokens
    request.stopping.stop.extend(parsed.stop)
    return request


def follow(responses: Iterable[Any], show: Callable[[str], None]) -> tuple[str, Any, Any]:
    """Read an answer to its end: (text, Finished, Summary). New text is shown as it comes."""
    parts: list[str] = []
    finished, summary = pb.Finished(), pb.Summary()
    for response in responses:
        match response.WhichOneof("event"):
            case "delta":
                parts.append(response.delta.text)
                show(response.delta.text)
            case "finished":
                finished = response.finished
            case "summary":
                summary = response.summary
    return "".join(parts), finished, summary


def write_now(text: str) -> None:
    """Print without waiting for the end of a line."""
    sys.stdout.write(text)
    sys.stdout.flush()


def account(summary: Any, paint: Paint) -> str:
    """Which instance did what, bytes moved, and where the time went, in a few lines."""
    served, usage, t = summary.served, summary.usage, summary.served.timings
    tokens = usage.completion_tokens
    tpot = (t.total_s - t.ttft_s) / (tokens - 1) if tokens > 1 else 0.0
    moved = served.prefill_instance != served.decode_instance
    cached = f" ({usage.cached_tokens} from cache)" if usage.cached_tokens else ""
    lines = [
        f"prefill  {served.prefill_instance}: {usage.prompt_tokens} prompt tokens{cached}",
        f"decode   {served.decode_instance}: {tokens} tokens",
        f"KV       {amount(served.kv_bytes_moved)} moved" if moved else "KV       stayed where it was",
        f"TTFT     {span(t.ttft_s)} = gateway {span(t.gateway_s)} + dispatch {span(t.dispatch_s)} "
        f"+ queue {span(t.queue_s)} + prefill {span(t.prefill_s)}",
    ]
    if moved:
        lines.append(
            f"hand-off {span(t.reserve_s + t.transfer_s + t.decode_queue_s)} = reserve {span(t.reserve_s)} "
            f"+ transfer {span(t.transfer_s)} + decode queue {span(t.decode_queue_s)}"
        )
    lines.append(f"TPOT     {span(tpot)}   total {span(t.total_s)}")
    if served.attempts > 1:
        lines.append(f"attempts {served.attempts}")
    return "\n".join(paint(line, "dim") for line in lines)


def as_json(text: str, finished: Any, summary: Any) -> dict[str, Any]:
    """The whole answer as one document, field names as in the proto."""
    shown = MessageToDict(summary, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    reason = pb.Finished.Reason.Name(finished.reason).removeprefix("REASON_").lower()
    return {"text": text, "finish_reason": reason, **shown}
