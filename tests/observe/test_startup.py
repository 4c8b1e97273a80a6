"""How long a start took, phase by phase."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from distserve.observe.startup import Startup, process_age_s


def test_phases_fill_the_time_since_the_process_began() -> None:
    times = iter([100.0, 101.5, 101.5, 104.0, 104.25])
    startup = Startup(2.0, lambda: next(times))
    startup.mark("python")
    startup.mark("weights")
    startup.mark("data_plane")
    startup.mark("weights")
    assert startup.seconds == {"python": 3.5, "weights": 0.25, "data_plane": 2.5}
    assert startup.total_s == 6.25
    assert startup.words() == "6.2 s (python 3.5, weights 0.2, data plane 2.5)"


def test_a_process_knows_its_age(tmp_path: Path) -> None:
    assert 0 < process_age_s() < 3600 * 24
    stat = tmp_path / "proc/self/stat"
    stat.parent.mkdir(parents=True)
    began = time.clock_gettime(time.CLOCK_BOOTTIME) - 5.0
    ticks = int(began * os.sysconf("SC_CLK_TCK"))
    stat.write_text("7 (a name) with) S " + " ".join(["0"] * 18) + f" {ticks} 0 0\n")
    assert process_age_s(tmp_path) == pytest.approx(5.0, abs=0.5)
    assert process_age_s(tmp_path / "elsewhere") == 0.0
