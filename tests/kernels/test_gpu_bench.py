"""The measurement prepared for a GPU runs: every line of it, on tiny shapes in Triton's interpreter."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install 'distserve[dev]' has it on Linux")

ROOT = Path(__file__).resolve().parents[2]
PATHS = os.pathsep.join(str(ROOT / p) for p in (".", "kernels", "bench"))
ENVIRON = os.environ | {"PYTHONPATH": PATHS, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}


def test_a_dry_run_goes_through_every_case():
    results = sorted((ROOT / "bench" / "results").iterdir())
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "kernels_gpu.py"), "--dry"],
        env=ENVIRON, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name in ("RMSNorm", "SiLU", "rotary", "decode attention", "prefill attention", "gather + checksum", "sampling"):
        assert name in done.stdout
    for graphs in ("on ", "off"):
        for in_flight in (1, 2):
            assert f"graphs {graphs} in flight {in_flight}" in done.stdout
    assert "the floor" in done.stdout
    assert "KV between two processes, shm + checksum" in done.stdout and "of a device's own copy" in done.stdout
    assert sorted((ROOT / "bench" / "results").iterdir()) == results


def test_the_batch_names_what_is_there():
    """Its command is written once and run rarely: every test file and script in it exists, and is found by pytest."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "gpu.py"), "--list"],
        env=ENVIRON, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    named = [word for word in done.stdout.split() if word.startswith(("tests/", "bench/"))]
    assert len(named) >= 10 and not [word for word in named if not (ROOT / word).exists()]
    parts = [line.split("  ")[0] for line in done.stdout.splitlines()]
    assert parts[:4] == ["kernels", "engine", "transfer", "cluster"]


@pytest.fixture
def engine_gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("engine_gpu")


def test_the_time_a_device_is_busy_counts_what_overlaps_once(engine_gpu):
    assert engine_gpu.covered([]) == 0
    assert engine_gpu.covered([(5, 6), (0, 2), (1, 3), (1, 1.5)]) == 4
