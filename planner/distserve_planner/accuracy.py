"""The simulator against recorded runs of real systems: what was measured, what is told, the difference.

A recorded run is a workload, a configuration and each request's measured times (``Measured``). Knows no file of its
own: runs are read from a folder the caller names.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distserve.core.types import Role
from distserve_planner.latency.source import default_policy, latency_model
from distserve_planner.refusal import CannotPlan
from distserve_planner.simulation.deployment import NVLINK_A100, Deployment, instance, on_ports, policy
from distserve_planner.simulation.result import Slo
from distserve_planner.simulation.run import simulate
from distserve_planner.workload import Job, Workload

GPU = "a100-80g"


@dataclass(frozen=True, slots=True)
class Measured:
    """One recorded run. ``times``: [n, 2] seconds, TTFT and TPOT, in the order of the workload's jobs."""

    name: str
    engine: str
    model: str
    prefill: tuple[int, int]  # TP, PP
    decode: tuple[int, int]
    workload: Workload
    times: np.ndarray

    @property
    def kind(self) -> str:
        """What runs are grouped by: ``vllm``, or the shapes of the two phases."""
        if self.engine == "vllm":
            return "vllm"
        return "P tp{}pp{} + D tp{}pp{}".format(*self.prefill, *self.decode)

    def attainment(self, slo: Slo) -> float:
        return float(((self.times[:, 0] < slo.ttft_s) & (self.times[:, 1] < slo.tpot_s)).mean())


@dataclass(frozen=True, slots=True)
class Comparison:
    """Attainment in percent, told and measured; ``p90_ratio``: told P90 TTFT over the measured one."""

    run: Measured
    told: float
    measured: float
    p90_ratio: float

    @property
    def error(self) -> float:
        return self.told - self.measured


def read_runs(folder: Path) -> list[Measured]:
    """Runs that have measurements, from the two files of recorded runs. Raises CannotPlan when they are not there."""
    try:
        asked = json.loads((folder / "opt13b_sharegpt_workloads.json").read_text())
        seen = json.loads((folder / "real_runs_calibration.json").read_text())["runs"]
    except OSError as error:
        raise CannotPlan(f"recorded runs are needed: {error.filename}: {error.strerror}") from error
    return [_run(name, asked["model"], asked["runs"][name], seen[name]["measured_ms"]) for name in seen]


def _run(name: str, model: str, run: dict[str, Any], measured: list[list[float]]) -> Measured:
    config = run["config"]
    shapes = [(config[phase]["tp"], config[phase]["pp"]) for phase in ("prefill", "decode")]
    workload = Workload(tuple(Job(p, o, at) for p, o, at in run["requests"]), 0, name)
    return Measured(name, config["engine"], model, shapes[0], shapes[1], workload, np.array(measured) / 1e3)


def deployment(run: Measured) -> Deployment:
    """What the run was made on."""
    profile = f"{run.engine}:{GPU}"
    limits = policy(default_policy(profile))
    shapes = {Role.MIXED: run.prefill} if run.engine == "vllm" else {Role.PREFILL: run.prefill, Role.DECODE: run.decode}
    models = {role: latency_model(profile, run.model, *shape) for role, shape in shapes.items()}
    return on_ports([instance(role, model, limits) for role, model in models.items()], NVLINK_A100)


def compare(run: Measured, slo: Slo) -> Comparison:
    """Simulate a run and set the two side by side."""
    result = simulate(deployment(run), run.workload)
    ratio = np.percentile(result.ttft_s(), 90) / np.percentile(run.times[:, 0], 90)
    return Comparison(run, 100 * result.attainment(slo), 100 * run.attainment(slo), float(ratio))
