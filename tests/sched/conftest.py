"""Instances that are checked when the test is over."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from distserve.core.types import Member
from distserve.sched.config import InstanceConfig
from distserve.sched.instance import InstanceState
from tests.sched.factory import Make, instance


@pytest.fixture
def make() -> Iterator[Make]:
    """Builds instances; each is checked when the test is over."""
    built: list[InstanceState] = []

    def build(who: Member, **config: float) -> InstanceState:
        built.append(instance(who, InstanceConfig(**config)))  # type: ignore[arg-type]
        return built[-1]

    yield build
    for state in built:
        state.check()
