"""What really happened: how often each fault struck and each phase was reached, and in which phases clients left.

A run without violations proves little unless this table has no empty row. Knows names only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

SEQUENCE = ("waiting", "prefill", "decode", "handoff")
MOVE_OUT = ("reserving", "streaming", "committing")
MOVE_IN = ("pending", "open")
STREAM = ("dispatching", "waiting", "prefill", "decode")

PHASES = (
    *(f"sequence {p}" for p in SEQUENCE),
    *(f"move out {p}" for p in MOVE_OUT),
    *(f"move in {p}" for p in MOVE_IN),
    *(f"stream {p}" for p in STREAM),
)
CANCEL_POINTS = PHASES

FAULTS = (
    "message held up",
    "message overtaken on another link",
    "message repeated",
    "message lost alone",
    "message lost with its stream",
    "stream broken",
    "partition, both ways",
    "partition, one way",
    "partition healed",
    "crash of an instance",
    "crash of a gateway",
    "crash of the controller",
    "crash between two effects",
    "restart as a new incarnation",
    "machine stalled",
    "process frozen",
    "instance told to drain",
    "instance left",
    "instance joined late",
    "stage: bit flipped",
    "stage: truncated",
    "stage: lost",
    "stage: answer lost",
    "stage: came twice",
    "stage: came late",
    "stage: wrote into reused staging",
    "step failed",
)

SITUATIONS = (
    "dispatched in bypass",
    "prompt overflowed",
    "prompt waits for room",
    "move waits for room",
    "sequence preempted",
    "prefix reused",
    "dropped while its step ran",
    "step given up: for nobody",
    "step given up: by mistake",
    "steps in flight together",
    "next token planned ahead",
    "row of a sequence that had ended",
    "step void behind another",
    "refused: too many",
    "attempt retried",
    "owner changed",
)


class Coverage:
    """Counts by kind; every kind above is a row, seen or not."""

    def __init__(self) -> None:
        self.faults: Counter[str] = Counter()
        self.phases: Counter[str] = Counter()
        self.cancels: Counter[str] = Counter()
        self.situations: Counter[str] = Counter()

    def add(self, other: Coverage) -> None:
        for mine, theirs in zip(self._groups(), other._groups(), strict=True):
            mine.update(theirs)

    def _groups(self) -> tuple[Counter[str], ...]:
        return self.faults, self.phases, self.cancels, self.situations

    def missing(self) -> list[str]:
        """Rows that never happened."""
        rows = [("fault", FAULTS, self.faults), ("phase", PHASES, self.phases)]
        rows += [("cancel in", CANCEL_POINTS, self.cancels), ("situation", SITUATIONS, self.situations)]
        return [f"{kind}: {name}" for kind, names, counts in rows for name in names if not counts[name]]

    def table(self) -> str:
        """All of it, for people."""
        lines = ["faults injected"]
        lines += _rows((name, str(self.faults[name])) for name in FAULTS)
        lines.append("phases                                       reached   clients left in it")
        lines += [f"  {name:40} {self.phases[name]:>9}   {self.cancels[name]:>9}" for name in PHASES]
        lines.append("situations")
        lines += _rows((name, str(self.situations[name])) for name in SITUATIONS)
        return "\n".join(lines)


def _rows(rows: Iterable[tuple[str, str]]) -> list[str]:
    return [f"  {name:40} {count:>9}" for name, count in rows]
