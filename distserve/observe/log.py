"""Logging set-up of a process: one line an entry on stderr, for people or as JSON. Chooses no level for others.

Fields beyond the message are passed as ``extra={"data": {…}}``.
"""

from __future__ import annotations

import logging
import sys
from typing import IO

import orjson

LEVELS = ("debug", "info", "warning", "error")
_QUIET = ("asyncio", "httpx", "urllib3", "uvicorn.access")


class _Lines(logging.Formatter):
    """``07:41:02.318 info  distserve.launch: words (key=value …)``."""

    def __init__(self, who: str) -> None:
        super().__init__("%(asctime)s", "%H:%M:%S")
        self._who = who

    def format(self, record: logging.LogRecord) -> str:
        when = f"{self.formatTime(record, '%H:%M:%S')}.{int(record.msecs):03d}"
        data = getattr(record, "data", None) or {}
        facts = " (" + " ".join(f"{k}={v}" for k, v in data.items()) + ")" if data else ""
        text = f"{when} {record.levelname.lower():<7} {self._who}: {record.getMessage()}{facts}"
        return text + "\n" + self.formatException(record.exc_info) if record.exc_info else text


class _Json(logging.Formatter):
    """One JSON object a line."""

    def __init__(self, who: str) -> None:
        super().__init__()
        self._who = who

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": record.created,
            "level": record.levelname.lower(),
            "who": self._who,
            "logger": record.name,
            "message": record.getMessage(),
            **(getattr(record, "data", None) or {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()


def set_up(who: str, level: str = "info", *, json_lines: bool = False, stream: IO[str] | None = None) -> None:
    """Send this process's log to ``stream`` (stderr). ``who`` names the process in every line."""
    if level not in LEVELS:
        raise ValueError(f"log level {level!r} is none of {', '.join(LEVELS)}")
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(_Json(who) if json_lines else _Lines(who))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
