"""Free words about why something ended, as one of a few labels: a metric's label must not grow with its traffic."""

from __future__ import annotations

CAUSES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("corrupt", ("checksum", "corrupt", "verif", "digest", "forged", "nonce")),
    ("timeout", ("timeout", "timed out", "deadline", "lease", "expired", "too long", "stall")),
    ("abandoned", ("abandon", "cancel", "gateway", "finished", "client")),
    ("peer_lost", ("lost", "died", "dead", "gone", "reset", "refused", "closed", "unreachable", "broken", "connect")),
    ("no_room", ("room", "full", "blocks", "capacity", "preempt")),
    ("mismatch", ("fingerprint", "layout", "incarnation", "stale", "epoch", "unknown", "mismatch", "differ")),
    ("draining", ("drain", "shut", "stopping")),
)
"""Label → parts of the words that mean it; the first row that fits counts."""


def cause_of(words: str) -> str:
    """One of the labels of ``CAUSES``, or ``other``."""
    lower = words.lower()
    return next((cause for cause, parts in CAUSES if any(part in lower for part in parts)), "other")
