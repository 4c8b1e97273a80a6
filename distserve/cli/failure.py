"""The one error of commands that failed: a sentence for the user."""

from __future__ import annotations


class CommandFailed(Exception):
    """The command could not do its work; the text says what is wrong and what to do."""
