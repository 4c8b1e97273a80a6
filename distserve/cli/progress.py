"""The one line on stderr that is written over and over while a command works; nothing where no person looks.

Knows when to draw, not what: each command says its own words.
"""

from __future__ import annotations

import sys
import time

_REDRAW_S = 0.2
_CELLS = 20
_WIDTH = 118


class ProgressLine:
    """``shown``: whether a person looks. Drawn at most five times a second, except what is the last of its kind."""

    def __init__(self, shown: bool) -> None:
        self._shown, self._at = shown, -_REDRAW_S

    @staticmethod
    def on_terminal(plain: bool = False) -> ProgressLine:
        """Shown when stderr is a terminal and nobody asked for plain output."""
        return ProgressLine(not plain and sys.stderr.isatty())

    def bar(self, words: str, share: float) -> None:
        """Words behind a bar; ``share`` of the work that is done, 0 to 1."""
        filled = round(_CELLS * share)
        self.draw(f"[{'#' * filled}{'.' * (_CELLS - filled)}] {share:4.0%} {words}", last=share >= 1)

    def counted(self, done: int, total: int, words: str) -> None:
        """The same with ``done`` of ``total`` in numbers."""
        self.bar(f"{done}/{total} {words}", done / max(1, total))

    def draw(self, words: str, last: bool = False) -> None:
        now = time.monotonic()
        if self._shown and (last or now - self._at >= _REDRAW_S):
            self._at = now
            print(f"\r\x1b[K{words[:_WIDTH]}", end="", file=sys.stderr, flush=True)

    def say(self, words: str) -> None:
        """A line that stays."""
        self.clear()
        print(words, file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
