"""From the name of a profile to a latency model."""

from __future__ import annotations

from distserve_planner.hardware import gpu_named
from distserve_planner.latency.base import LatencyModel, OutOfRange
from distserve_planner.latency.fitted import FittedModel, profiles
from distserve_planner.latency.operators import OperatorLatency, engine_named
from distserve_planner.latency.profile import Profile, read_profile
from distserve_planner.latency.profiled import ProfiledModel
from distserve_planner.models import load_model

DEFAULT_POLICIES = {"distserve": "distserve", "vllm": "vllm-2023"}
"""Engine a profile was measured on → the batching that engine does."""


def latency_model(profile: str, model: str, tp: int, pp: int) -> LatencyModel:
    """``profile`` names one of ``profiles()``, a file that ``distserve profile`` wrote, or ``tables:GPU[:ENGINE]``:
    operators measured on a GPU (its datasheet where nothing was measured) under an engine's overheads. Raises
    OutOfRange or CannotPlan with the nearest known.
    """
    if is_file(profile):
        return ProfiledModel(profile_for(profile, model), tp, pp)
    if profile in profiles():
        return FittedModel(profile, model, tp, pp)
    kind, _, rest = profile.partition(":")
    gpu, _, engine = rest.partition(":")
    if kind == "tables" and gpu:
        return OperatorLatency(load_model(model), gpu_named(gpu), tp, pp, engine=engine_named(engine or "vllm"))
    known = ", ".join([*profiles(), "tables:GPU", "a file of `distserve profile`"])
    raise OutOfRange(f"there is no profile {profile!r}", known)


def is_file(profile: str) -> bool:
    """Whether a profile is one of a machine, in a file."""
    return profile.endswith(".json")


def profile_for(path: str, model: str) -> Profile:
    """The profile in a file, which must be of ``model``. Raises OutOfRange or CannotPlan."""
    profile = read_profile(path)
    if profile.model != served_name(model):
        raise OutOfRange(f"the profile {path} has no data for model {model!r}", profile.model)
    return profile


def served_name(model: str) -> str:
    """A model's name without its path."""
    return model.removeprefix("random:").rstrip("/").removesuffix("/config.json").rpartition("/")[2] or model


def default_policy(profile: str) -> str:
    """The batching policy of the engine that a profile was measured on; this project's own otherwise."""
    if is_file(profile):
        return "serve"
    return DEFAULT_POLICIES.get(profile.partition(":")[0], "chunked")
