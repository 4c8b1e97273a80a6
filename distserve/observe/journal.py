"""The journal: what one machine was told and what it asked for, one JSON object a line.

The first line tells what the journal is of (``about``: whatever is needed to build a fresh machine). A journal fed
through a fresh machine gives the same effects (``replay``); if not, the machine read a clock, a global or a set.
Knows no machine and no policy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import orjson

from distserve.core.effects import Effect
from distserve.core.events import Event
from distserve.observe.codec import decode_tagged, encode

FORMAT = 1
_BUFFER_BYTES = 1 << 18
_FLUSH_AFTER_S = 1.0


class Observer(Protocol):
    """Whoever watches a machine: a journal, metrics."""

    def write(self, now: float, event: Any, effects: Sequence[Any]) -> None: ...


class Machine(Protocol):
    """One of the three state machines, as far as a replay needs it."""

    def handle(self, event: Any, now: float) -> list[Any]: ...


class JournalError(ValueError):
    """A file is not a journal, or a line in its middle cannot be read."""


class ReplayDiverged(AssertionError):
    """A fresh machine answered an event with other effects than the journal holds."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One event with its effects. ``now`` in the seconds of the clock of the process that wrote it."""

    now: float
    event: Event
    effects: tuple[Effect, ...]


class Journal:
    """An open journal. Buffered: what was written reaches the file after about a second, or at ``close``."""

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = path.open("wb", buffering=_BUFFER_BYTES)
        self._flushed_at: float | None = None
        self._put({"journal": FORMAT, "about": dict(about)})
        self._file.flush()

    def write(self, now: float, event: Event, effects: Sequence[Effect]) -> None:
        """Append one event with its effects."""
        self._put({"now": now, "event": encode(event), "effects": [encode(e) for e in effects]})
        if self._flushed_at is None or now - self._flushed_at >= _FLUSH_AFTER_S:
            self._file.flush()
            self._flushed_at = now

    def close(self) -> None:
        """Flush and close. Idempotent."""
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _put(self, line: dict[str, Any]) -> None:
        self._file.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))


def read_about(path: Path) -> dict[str, Any]:
    """What the journal is of. Raises ``JournalError`` if the file is none."""
    with path.open("rb") as file:
        return _about(path, file.readline())


def read(path: Path) -> Iterator[Entry]:
    """The entries in order. A last line cut short by a crash ends the journal; one before it is an error."""
    with path.open("rb") as file:
        _about(path, file.readline())
        for number, line in enumerate(file, start=2):
            if not line.endswith(b"\n"):
                return
            try:
                yield _entry(orjson.loads(line))
            except (orjson.JSONDecodeError, KeyError, ValueError) as error:
                raise JournalError(f"{path}:{number}: {error}") from error


def replay(path: Path, machine_factory: Callable[[dict[str, Any]], Machine]) -> int:
    """Feed a journal through a fresh machine and compare effects exactly. Returns how many events agreed.

    ``machine_factory`` builds the machine from the journal's ``about``. Raises ``ReplayDiverged`` at the first
    difference, naming the event and both lists.
    """
    machine = machine_factory(read_about(path))
    agreed = 0
    for entry in read(path):
        effects = tuple(machine.handle(entry.event, entry.now))
        if effects != entry.effects:
            raise ReplayDiverged(_difference(agreed, entry, effects))
        agreed += 1
    return agreed


def _about(path: Path, line: bytes) -> dict[str, Any]:
    try:
        header = orjson.loads(line)
    except orjson.JSONDecodeError:
        header = None
    if not isinstance(header, dict) or header.get("journal") != FORMAT:
        raise JournalError(f"{path} is not a journal of format {FORMAT}")
    return dict(header["about"])


def _entry(line: dict[str, Any]) -> Entry:
    return Entry(line["now"], decode_tagged(line["event"]), tuple(decode_tagged(e) for e in line["effects"]))


def _difference(position: int, entry: Entry, effects: tuple[Any, ...]) -> str:
    for index, (recorded, fresh) in enumerate(zip(entry.effects, effects, strict=False)):
        if recorded != fresh:
            return f"event {position} ({entry.event}): effect {index} was {recorded}, is {fresh}"
    return (
        f"event {position} ({entry.event}): {len(entry.effects)} effects were recorded, {len(effects)} came: "
        f"recorded {entry.effects}, fresh {effects}"
    )
