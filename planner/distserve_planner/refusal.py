"""How the planner declines: one sentence with the reason and the nearest thing that would work."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

MOST = 1e100
"""No number of a plan is as large; sums and products of smaller ones are still numbers."""


class CannotPlan(ValueError):
    """What was asked cannot be planned; the text is for the user."""


def nearest(word: str, known: Iterable[str]) -> str:
    """``; did you mean …?`` when some known word is near, else an empty hint."""
    close = difflib.get_close_matches(word.lower(), sorted(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def only_known(document: Mapping[Any, Any], known: Iterable[str], where: str) -> None:
    """Raises CannotPlan for the first key of ``document`` that is not known, naming the nearest one that is."""
    words = list(known)
    for key in document:
        if key not in words:
            raise CannotPlan(f"{where}: unknown key {key!r}{nearest(str(key), words)} (known: {', '.join(words)})")


def mapping(value: Any, where: str) -> Mapping[str, Any]:
    """``value`` as a mapping, or CannotPlan."""
    if not isinstance(value, Mapping):
        raise CannotPlan(f"{where}: keys and values are needed here, not {type(value).__name__}")
    return value


def number(value: Any, where: str, least: float = 0.0) -> float:
    """``value`` as a float above ``least`` and short of the absurd, or CannotPlan."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not least < value < MOST:
        raise CannotPlan(f"{where}: {value!r:.200} is not a number above {least:g}")
    return float(value)


def whole(value: Any, where: str, least: int = 1, most: int = 1 << 53) -> int:
    """``value`` as an int from ``least`` to ``most``, or CannotPlan."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise CannotPlan(f"{where}: {value!r:.200} is not a whole number of at least {least}")
    if value > most:
        raise CannotPlan(f"{where}: {value!r:.200} is more than {most}, the most that can be planned for")
    return value
