"""Small JSON files of a model directory, which may come from anywhere: bounded in size and depth, refused in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MOST_BYTES = 64 << 20
"""No configuration or index of a model is that long."""


class BadJson(ValueError):
    """The file is there and is no JSON object; the text goes after its name."""


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ``BadJson``, or ``OSError`` when the file cannot be read."""
    if (size := path.stat().st_size) > MOST_BYTES:
        raise BadJson(f"has {size} bytes, more than the {MOST_BYTES} that are read")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise BadJson("has too many lists or objects within each other") from error
    except ValueError as error:  # no JSON, no UTF-8, or a number of thousands of digits
        raise BadJson(f"is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise BadJson("does not hold a JSON object")
    return content
