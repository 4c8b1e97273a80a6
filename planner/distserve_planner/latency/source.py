"""From the name of a profile to a latency model."""

from __future__ import annotations

from distserve_planner.hardware import gpu_named
from distserve_planner.latency.base import LatencyModel, OutOfRange
from distserve_planner.latency.fitted import FittedModel, profiles
from distserve_planner.latency.operators import OperatorLatency, engine_named
from distserve_planner.models import load_model

DEFAULT_POLICIES = {"distserve": "distserve", "vllm": "vllm-2023"}
"""Engine a profile was measured on → the batching that engine does."""


def latency_model(profile: str, model: str, tp: int, pp: int) -> LatencyModel:
    """``profile`` names one of ``profiles()``, or ``tables:GPU[:ENGINE]``: operators measured on a GPU (its datasheet
    where nothing was measured) under an engine's overheads. Raises OutOfRange or CannotPlan with the nearest known.
    """
    if profile in profiles():
        return FittedModel(profile, model, tp, pp)
    kind, _, rest = profile.partition(":")
    gpu, _, engine = rest.partition(":")
    if kind == "tables" and gpu:
        return OperatorLatency(load_model(model), gpu_named(gpu), tp, pp, engine=engine_named(engine or "vllm"))
    raise OutOfRange(f"there is no profile {profile!r}", ", ".join(profiles()))


def default_policy(profile: str) -> str:
    """The batching policy of the engine that a profile was measured on; this project's own otherwise."""
    return DEFAULT_POLICIES.get(profile.partition(":")[0], "chunked")
