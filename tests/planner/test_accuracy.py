"""Recorded runs of real systems: attainment told within the bounds promised, with one set of constants."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from distserve_planner.accuracy import Comparison, compare, read_runs
from distserve_planner.refusal import CannotPlan
from distserve_planner.simulation.result import Slo

FOLDER = Path(os.environ.get("DISTSERVE_SHARED", Path(__file__).parents[3] / "shared")) / "profiles" / "distserve"
# Mean and worst absolute error in points. The bounds promised are 2.0 and 5, 5 and 15, 4 and 8; these leave a margin.
BOUNDS = {"P tp2pp1 + D tp1pp1": (1.6, 4.0), "P tp2pp1 + D tp1pp2": (3.0, 6.0), "vllm": (2.5, 5.0)}


@pytest.fixture(scope="module")
def comparisons() -> list[Comparison]:
    if not FOLDER.is_dir():
        pytest.skip("the recorded runs are not at hand")
    return [compare(run, Slo(limit, 0.1)) for run in read_runs(FOLDER) for limit in (0.2, 0.25)]


@pytest.mark.parametrize("kind", BOUNDS)
def test_attainment(comparisons: list[Comparison], kind: str) -> None:
    errors = [abs(c.error) for c in comparisons if c.run.kind == kind]
    mean, worst = BOUNDS[kind]
    assert len(errors) >= 4
    assert sum(errors) / len(errors) <= mean
    assert max(errors) <= worst


def test_p90_ttft_also_under_overload(comparisons: list[Comparison]) -> None:
    overloaded = [c for c in comparisons if c.measured < 50]
    assert overloaded
    assert all(1 / 1.5 < c.p90_ratio < 1.5 for c in comparisons)


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CannotPlan, match="recorded runs are needed"):
        read_runs(tmp_path)
