"""Fixtures of the data plane's tests."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.transfer.pairs import Pair


@pytest.fixture
def make() -> Iterator[Callable[..., Pair]]:
    """Makes pairs; afterwards they are closed and no thread of theirs may be left."""
    pairs: list[Pair] = []

    def build(*args: Any, **kwargs: Any) -> Pair:
        pairs.append(Pair(*args, **kwargs))
        return pairs[-1]

    yield build
    for pair in pairs:
        pair.close()
    assert [t.name for t in threading.enumerate() if t.name.startswith("kv-")] == []
