"""The capacity planner: the cluster's own state machines on a virtual clock, under the user's traffic and targets.

Imports ``distserve.core``, ``kv`` and ``sched`` only: no torch, no network.
"""

from importlib import import_module
from typing import Any

from distserve_planner.simulation.deployment import Deployment, InstanceSpec, instance, on_ports, policy
from distserve_planner.simulation.result import SimulationResult, Slo, Trail
from distserve_planner.simulation.run import simulate
from distserve_planner.workload import Job, Workload

__all__ = [
    "Deployment",
    "Effort",
    "FromFit",
    "FromProfile",
    "FromTables",
    "InstanceSpec",
    "Job",
    "Problem",
    "SearchResult",
    "SimulationResult",
    "Slo",
    "Trail",
    "Workload",
    "instance",
    "on_ports",
    "policy",
    "search",
    "simulate",
]

_OF_THE_SEARCH = ("Effort", "FromFit", "FromProfile", "FromTables", "Problem", "SearchResult", "search")


def __getattr__(name: str) -> Any:
    """The search's names, imported when first asked for: scipy's optimiser loads longer than a simulation runs."""
    if name in _OF_THE_SEARCH:
        return getattr(import_module("distserve_planner.selection"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
