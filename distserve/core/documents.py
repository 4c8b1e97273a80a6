"""YAML text as plain values, bounded: what a short text can unfold into, by its aliases, is counted before it is used.

Knows no file and no key. Anything that prints or walks the values later may then do so without fear.
"""

from __future__ import annotations

from typing import Any

import yaml

MOST_CHARS = 4 << 20
MOST_VALUES = 200_000
"""Keys, items and values together, each alias counted where it is used."""

MOST_CHARS_OF_VALUES = 16 << 20


def parse_yaml(text: str) -> Any:
    """The one document in ``text``. Raises ValueError with what is wrong, to go after the name of the file."""
    if len(text) > MOST_CHARS:
        raise ValueError(f"has {len(text)} characters, more than the {MOST_CHARS} that are read")
    try:
        content = yaml.safe_load(text)
    except RecursionError:
        raise ValueError("has too many lists or mappings within each other") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the last two: a date or a number that cannot be
        raise ValueError(f"is not valid YAML: {error}") from error
    _count(content)
    return content


def _count(content: Any) -> None:
    """Raises ValueError when the values are too many, or hold themselves."""
    left, chars = MOST_VALUES, MOST_CHARS_OF_VALUES
    waiting = [(content, 0)]
    while waiting:
        value, depth = waiting.pop()
        left -= 1
        chars -= len(value) if isinstance(value, str) else 0
        if left < 0 or chars < 0 or depth > 100:
            raise ValueError("unfolds into more values, or deeper, than are read; write it without so many aliases")
        if isinstance(value, dict):
            waiting += [(each, depth + 1) for pair in value.items() for each in pair]
        elif isinstance(value, (list, set, tuple)):
            waiting += [(each, depth + 1) for each in value]
