"""The one progress line: drawn where a person looks, seldom, and cleared."""

from __future__ import annotations

import pytest

from distserve.cli.progress import ProgressLine


def test_nothing_is_drawn_where_no_person_looks(capsys: pytest.CaptureFixture[str]) -> None:
    line = ProgressLine.on_terminal()  # under test stderr is no terminal
    line.bar("working", 0.5)
    line.clear()
    assert capsys.readouterr().err == ""


def test_a_bar_tells_share_and_words(capsys: pytest.CaptureFixture[str]) -> None:
    line = ProgressLine(shown=True)
    line.counted(3, 12, "units")
    assert capsys.readouterr().err == "\r\x1b[K[#####...............]  25% 3/12 units"
    line.clear()
    assert capsys.readouterr().err == "\r\x1b[K"


def test_only_the_last_is_drawn_when_many_come_at_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distserve.cli.progress.time.monotonic", lambda: 100.0)
    line = ProgressLine(shown=True)
    for done in range(1, 51):
        line.counted(done, 50, "units")
    told = capsys.readouterr().err
    assert told.count("\r") == 2 and "50/50" in told


def test_long_words_stay_on_one_line_and_what_is_said_stays(capsys: pytest.CaptureFixture[str]) -> None:
    line = ProgressLine(shown=True)
    line.bar("x" * 500, 0.1)
    assert len(capsys.readouterr().err) < 130
    line.say("stopped early")
    assert capsys.readouterr().err.endswith("stopped early\n")


def test_no_work_at_all_is_no_division(capsys: pytest.CaptureFixture[str]) -> None:
    ProgressLine(shown=True).counted(0, 0, "units")
    assert "0/0 units" in capsys.readouterr().err
