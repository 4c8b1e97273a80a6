"""Simulated against real attainment: `python bench/planner_accuracy.py FOLDER`, FOLDER with DistServe's recorded runs.

Prints each run at both limits of TTFT, and the mean and worst absolute error by kind. One set of constants for all
(``latency.fitted.ENGINES``).
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

from distserve_planner.accuracy import compare, read_runs
from distserve_planner.simulation.result import Slo

LIMITS = (Slo(0.2, 0.1), Slo(0.25, 0.1))


def main(folder: Path) -> int:
    errors: dict[str, list[float]] = defaultdict(list)
    print(f"{'run':28} {'TTFT limit':>10} {'told %':>7} {'real %':>7} {'error':>6} {'P90 TTFT, told/real':>20}")
    for run in read_runs(folder):
        for slo in LIMITS:
            c = compare(run, slo)
            errors[run.kind].append(c.error)
            print(
                f"{run.name:28} {slo.ttft_s:10.2f} {c.told:7.1f} {c.measured:7.1f} {c.error:+6.1f} {c.p90_ratio:20.2f}"
            )
    for kind, values in errors.items():
        sizes = [abs(v) for v in values]
        print(f"{kind}: mean absolute error {sum(sizes) / len(sizes):.1f} points, worst {max(sizes):.1f}")
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1])))
