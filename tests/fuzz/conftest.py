"""One gateway a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fuzz.front import Front


@pytest.fixture(scope="module")
def front() -> Iterator[Front]:
    gateway = Front()
    yield gateway
    gateway.still_serves()
    gateway.close()
