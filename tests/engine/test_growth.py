"""The verdict on how a cost grows: of what grows with its work and of what does not, whatever fixed parts they have."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def growth() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "bench" / "growth.py"
    spec = importlib.util.spec_from_file_location("growth", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules["growth"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BATCHES = [2**n for n in range(9)]


def test_waiting_for_memory_first_and_computing_then_is_not_super_linear(growth: ModuleType) -> None:
    """max(a, b·x) + c·x: one exponent over the whole range would call it so."""
    line = growth.curve("decode", "batch", {n: max(6.0, 0.5 * n) + 0.07 * n for n in BATCHES})
    assert line.exponent > 1.05 and not line.super_linear
    assert line.excess == pytest.approx(1.0)


def test_a_square_is_and_the_verdict_says_from_where(growth: ModuleType) -> None:
    line = growth.curve("host", "batch", {n: 5.0 + 0.01 * n**2 for n in BATCHES})
    assert line.super_linear and line.excess_at == 256
    assert "SUPER-LINEAR" in growth.verdict(line) and "batch 256" in growth.verdict(line)


def test_one_jump_within_a_linear_curve_is_found(growth: ModuleType) -> None:
    line = growth.curve("host", "batch", {n: (1.0 if n < 16 else 1.2) * n for n in BATCHES})
    assert line.super_linear and line.excess_at == 16 and line.excess == pytest.approx(1.2)


def test_work_that_is_quadratic_by_nature_is_allowed_for(growth: ModuleType) -> None:
    work = lambda n: 100.0 * n + n**2  # noqa: E731
    assert not growth.curve("prefill", "prompt tokens", {n: 3e-9 * work(n) for n in BATCHES}, work).super_linear
    assert growth.curve("prefill", "prompt tokens", {n: 3e-9 * n**3 for n in BATCHES}, work).super_linear


def test_no_work_is_no_base(growth: ModuleType) -> None:
    line = growth.curve("decode", "context", {0: 1.0, 128: 3.0, 256: 4.0})
    assert line.excess_at == 256 and not line.super_linear and line.exponent is None
    assert growth.curve("decode", "context", {0: 1.0}).excess is None
