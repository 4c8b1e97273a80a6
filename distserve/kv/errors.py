"""The one error of this floor: a block was about to be counted wrong, so the caller has a bug."""

from __future__ import annotations


class LedgerError(AssertionError):
    """Blocks do not add up, or an owner asks for what it may not. Never a reaction to load: full pools answer None."""
