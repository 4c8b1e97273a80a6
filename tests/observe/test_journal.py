"""The codec over core's dataclasses, the journal file, and replay."""

from __future__ import annotations

import dataclasses
import random
import types
from enum import Enum
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import orjson
import pytest

from distserve.core.effects import CONTROLLER, Deliver, Send
from distserve.core.events import Abandon, Dispatched, StepDone, Tick
from distserve.core.types import Endpoint, GatewayRef, InstanceRef, Token
from distserve.observe import codec
from distserve.observe.journal import (
    Entry,
    Journal,
    JournalError,
    ReplayDiverged,
    read,
    read_about,
    replay,
)

PREFILL = Endpoint(InstanceRef("p0", 3), "127.0.0.1:1", "127.0.0.1:2")


def made_up(hint: Any, rng: random.Random) -> Any:
    """A random value of an annotation."""
    if dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint)
        return hint(**{f.name: made_up(hints[f.name], rng) for f in dataclasses.fields(hint)})
    if isinstance(hint, type) and issubclass(hint, Enum):
        return rng.choice(list(hint))
    if get_origin(hint) in (Union, types.UnionType):
        return made_up(rng.choice(get_args(hint)), rng)
    if get_origin(hint) is tuple:
        arguments = get_args(hint)
        if arguments[-1] is Ellipsis:
            return tuple(made_up(arguments[0], rng) for _ in range(rng.randrange(3)))
        return tuple(made_up(a, rng) for a in arguments)
    scalars: dict[Any, Any] = {
        int: rng.randrange(2**64),
        float: rng.random() * 10 ** rng.randrange(-9, 9),
        str: rng.choice(["", "a", "ünï\n\"'"]),
        bool: rng.random() < 0.5,
        type(None): None,
    }
    return scalars[hint]


@pytest.mark.parametrize("name", codec.known())
def test_every_core_class_survives_the_trip(name: str) -> None:
    rng = random.Random(name)
    for _ in range(20):
        value = made_up(codec._CLASSES[name], rng)
        assert codec.decode_tagged(orjson.loads(orjson.dumps(codec.encode(value)))) == value


def test_a_class_in_a_union_is_named() -> None:
    encoded = orjson.loads(orjson.dumps(codec.encode(Send(CONTROLLER, Tick()))))
    assert encoded == {"Send": {"to": {"Controller": {}}, "event": {"Tick": {}}}}


@pytest.mark.parametrize(
    ("tagged", "words"),
    [
        ({"Nonsense": {}}, "unknown class"),
        ({"Tick": {}, "Abandon": {}}, "one class name"),
        ({"Abandoned": {"source": {"id": "p", "incarnation": "x"}, "request_id": "r", "epoch": 1}}, "int expected"),
        ({"Send": {"to": {"Tick": {}}, "event": {"Tick": {}}}}, "none of"),
        ({"Abandoned": {"epoch": 1}}, "Abandoned"),
    ],
)
def test_what_does_not_fit_is_refused(tagged: dict[str, Any], words: str) -> None:
    with pytest.raises(codec.UndecodableError, match=words):
        codec.decode_tagged(tagged)


class Echo:
    """A machine that counts: its answers depend on everything it was told."""

    def __init__(self, start: int) -> None:
        self.count = start

    def handle(self, event: Any, now: float) -> list[Any]:
        self.count += 1
        return [Deliver("r", self.count, (Token(self.count, now),))] if not isinstance(event, Tick) else []


def write_echo_journal(path: Path) -> int:
    machine = Echo(5)
    events = [Tick(), Dispatched("r", 65536, PREFILL, PREFILL), StepDone(1, (("r", Token(7, -0.1)),), 0.25), Tick()]
    with Journal(path, {"start": 5}) as journal:
        for i, event in enumerate(events):
            now = 0.1 * i
            journal.write(now, event, machine.handle(event, now))
    return len(events)


def test_a_journal_reads_back_and_replays(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "echo.jsonl"
    count = write_echo_journal(path)
    entries = list(read(path))
    assert len(entries) == count
    assert entries[1] == Entry(0.1, Dispatched("r", 65536, PREFILL, PREFILL), (Deliver("r", 7, (Token(7, 0.1),)),))
    assert read_about(path) == {"start": 5}
    assert replay(path, lambda about: Echo(about["start"])) == count


def test_a_replay_that_differs_says_where(tmp_path: Path) -> None:
    path = tmp_path / "echo.jsonl"
    write_echo_journal(path)
    with pytest.raises(ReplayDiverged, match=r"event 1 .*effect 0 was Deliver.*first_index=7.*first_index=8"):
        replay(path, lambda about: Echo(about["start"] + 1))


def test_a_replay_that_says_less_is_a_difference(tmp_path: Path) -> None:
    class Mute:
        def handle(self, event: Any, now: float) -> list[Any]:
            return []

    path = tmp_path / "echo.jsonl"
    write_echo_journal(path)
    with pytest.raises(ReplayDiverged, match="1 effects were recorded, 0 came"):
        replay(path, lambda about: Mute())


def test_a_last_line_cut_short_ends_the_journal_quietly(tmp_path: Path) -> None:
    path = tmp_path / "echo.jsonl"
    count = write_echo_journal(path)
    path.write_bytes(path.read_bytes()[:-5])
    assert len(list(read(path))) == count - 1


def test_a_broken_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "echo.jsonl"
    write_echo_journal(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"{broken}\n" + lines[1])
    with pytest.raises(JournalError, match=r"echo.jsonl:2"):
        list(read(path))


def test_another_file_is_not_a_journal(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("hello\n")
    with pytest.raises(JournalError, match="not a journal"):
        read_about(path)


def test_written_lines_reach_the_file_within_a_second_of_its_clock(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal = Journal(path, {})
    try:
        journal.write(10.0, Tick(), [])
        journal.write(10.5, Tick(), [])
        journal.write(11.1, Abandon(GatewayRef("g", 1), "r", 2), [])
        assert len(list(read(path))) == 3
    finally:
        journal.close()
