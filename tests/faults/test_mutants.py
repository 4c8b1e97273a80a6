"""Every deliberate bug is caught, by a property, within its number of seeds: the simulation can fail.

``make mutants`` prints the table.
"""

from __future__ import annotations

import pytest

from tests.faults.breakages import BREAKAGES, BY_NAME, switched_on
from tests.faults.mutants import judge
from tests.faults.world import run_seed


@pytest.mark.parametrize("name", BY_NAME)
def test_is_caught_by_a_property(name: str) -> None:
    verdict = judge(name)
    assert verdict.caught_by, f"{name} survived {verdict.seeds} seeds: {verdict.problem}"


def test_there_are_enough_of_them() -> None:
    assert len(BREAKAGES) >= 15
    assert len(BY_NAME) == len(BREAKAGES)


def test_what_was_switched_on_is_off_again() -> None:
    before = run_seed(7, profile="storm", digest=True).digest
    for breakage in BREAKAGES:
        with switched_on(breakage):
            pass
    assert run_seed(7, profile="storm", digest=True).digest == before
