"""Colour and tables on a terminal; plain text where there is none, or where NO_COLOR or --plain says so."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import IO

_CODES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}


class Paint:
    """Colours text for one stream, or leaves it alone."""

    def __init__(self, stream: IO[str] | None = None, plain: bool = False) -> None:
        stream = stream if stream is not None else sys.stdout
        self.on = not plain and stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"

    def __call__(self, text: str, *styles: str) -> str:
        if not self.on or not styles:
            return text
        return f"\x1b[{';'.join(_CODES[s] for s in styles)}m{text}\x1b[0m"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], paint: Paint) -> str:
    """Columns wide enough for their cells; a column of numbers is set flush right."""
    texts = [list(map(str, row)) for row in rows]
    widths = [max(len(head), *(len(row[i]) for row in texts), 0) for i, head in enumerate(heads)]
    right = [bool(texts) and all(_is_number(row[i]) for row in texts) for i in range(len(heads))]

    def line(cells: Sequence[str]) -> str:
        fitted = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True))
        return "  ".join(fitted).rstrip()

    return "\n".join([paint(line(heads), "bold"), *(line(row) for row in texts)])


def _is_number(cell: str) -> bool:
    return bool(cell) and (cell[0].isdigit() or cell in ("-", "–") or (cell[0] == "-" and cell[1:2].isdigit()))


def amount(count: int) -> str:
    """Bytes as people write them: ``5.6 MB``."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def span(seconds: float) -> str:
    """Seconds as people write them: ``850 µs``, ``12.3 ms``, ``1.25 s``."""
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.1f} ms"
    return f"{seconds:.2f} s" if seconds < 100 else f"{seconds:.0f} s"
