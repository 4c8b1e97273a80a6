"""``distserve chat``: a conversation on a terminal. All of it is sent each time; the prefix cache makes that cheap."""

from __future__ import annotations

import argparse
import sys

from distserve.cli.failure import CommandFailed
from distserve.cli.generate import account, follow, request_of, write_now
from distserve.cli.paint import Paint
from distserve.cli.remote import Remote, remote

_HELP = "/new starts over, /stats shows how the last answer was served, /quit (or Ctrl-D) ends"


def chat(parsed: argparse.Namespace) -> int:
    paint = Paint(plain=parsed.plain)
    start = [("system", parsed.system)] if parsed.system else []
    said = list(start)
    last = ""
    with remote(parsed) as gateway:
        print(paint(_HELP, "dim"))
        while (line := _ask(paint)) is not None:
            match line.strip():
                case "":
                    continue
                case "/quit":
                    break
                case "/new":
                    said = list(start)
                case "/stats":
                    print(last or "no answer yet")
                case "/help":
                    print(_HELP)
                case words:
                    answer, last = _answer(parsed, gateway, [*said, ("user", words)], paint)
                    said += [("user", words), ("assistant", answer)]
    return 0


def _ask(paint: Paint) -> str | None:
    """A line from the user; None at the end of the input."""
    try:
        return input(paint("you> ", "bold", "cyan") if sys.stdin.isatty() else "")
    except EOFError:
        print()
        return None


def _answer(
    parsed: argparse.Namespace, gateway: Remote, messages: list[tuple[str, str]], paint: Paint
) -> tuple[str, str]:
    """One answer, shown as it comes; Ctrl-C cuts it short. Returns it and its account."""
    call = gateway.inference.Generate(request_of(parsed, messages), **gateway.call)
    heard: list[str] = []

    def show(text: str) -> None:
        heard.append(text)
        write_now(text)

    try:
        text, _, summary = follow(call, show)
    except KeyboardInterrupt:
        call.cancel()
        print(paint(" (cut short)", "dim"))
        return "".join(heard), ""
    print()
    if not text and not summary.usage.completion_tokens:
        raise CommandFailed("the gateway answered nothing")
    return text, account(summary, paint)
