"""What the simulation once found, kept as shrunk plans: each holds today, and fails when its bug is brought back.

So a plan that has come to miss its bug, because something around it changed, is noticed as well.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.breakages import BREAKAGES, BY_NAME, switched_on
from tests.faults.plan import load
from tests.faults.world import run_plan

FOUND = sorted((Path(__file__).parent / "found").glob("*.json"))


def test_every_bug_found_has_its_plan() -> None:
    kept = {load(path).breakage for path in FOUND}
    assert {b.name for b in BREAKAGES if b.found} <= kept


@pytest.mark.parametrize("path", FOUND, ids=lambda p: p.stem)
def test_holds_now_and_would_not_with_the_bug(path: Path) -> None:
    case = load(path)
    outcome = run_plan(case.plan)
    assert not outcome.problem, f"{outcome.problem}\npython -m tests.faults --replay {path}"
    if case.breakage:
        with switched_on(BY_NAME[case.breakage]):
            again = run_plan(case.plan)
        assert again.broken is not None and again.broken.name == case.broken, again.problem or "the bug goes unseen"
