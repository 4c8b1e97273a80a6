"""What a search has measured so far, kept in a file so that an interrupted one goes on where it was.

One JSON line a measurement, keyed by the question's digest and the unit; a torn last line is ignored. Knows nothing
of how a goodput is found.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from distserve_planner.refusal import CannotPlan
from distserve_planner.selection.rates import Goodput, Point


class Memo:
    """Measurements by key. ``path`` None: kept in memory alone."""

    def __init__(self, path: Path | None = None, question: str = "") -> None:
        self._path, self._question = path, question
        self._known: dict[str, Goodput] = {}
        if path is not None and path.exists():
            self._read(path)

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: str) -> Goodput | None:
        return self._known.get(key)

    def put(self, key: str, found: Goodput) -> None:
        """Remembers, and appends to the file. Raises CannotPlan when it cannot be written."""
        self._known[key] = found
        if self._path is None:
            return
        line = json.dumps({"question": self._question, "key": key, "goodput": dataclasses.asdict(found)})
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise CannotPlan(f"cannot write {self._path}: {error.strerror or error}") from error

    def _read(self, path: Path) -> None:
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue  # torn by an interruption
            if row.get("question") == self._question:
                found = row["goodput"]
                points = tuple(Point(**point) for point in found.pop("points"))
                self._known[row["key"]] = Goodput(**found, points=points)
