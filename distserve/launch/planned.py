"""``distserve serve --plan``: a plan's instances and limits as options of ``serve``.

They weigh less than flags, environment and file, so that a port or a path can be given beside the plan. What this
``serve`` cannot start is refused in a sentence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

from distserve.launch.settings import BadSetting
from distserve_planner.plan import Plan, read_plan
from distserve_planner.refusal import CannotPlan


def options_of_plan(path: Path, known: Collection[str]) -> dict[str, Any]:
    """Keys as in a configuration file. ``known``: the keys that ``serve`` has. Raises BadSetting."""
    try:
        plan = read_plan(path)
    except CannotPlan as error:
        raise BadSetting(str(error)) from error
    values: dict[str, Any] = {"model": plan.model}
    values |= {role: plan.count(role) for role in ("prefill", "decode", "mixed")}
    values |= {name.replace("_", "-"): value for name, value in dataclasses.asdict(plan.batching).items()}
    values |= _of_instances(plan, known)
    values["overflow-prefill-tokens"] = plan.overflow_prefill_tokens
    if plan.dtype:
        values["dtype"] = plan.dtype
    if plan.threads:
        values["threads-per-rank"] = plan.threads
    return values


def _of_instances(plan: Plan, known: Collection[str]) -> dict[str, Any]:
    """What one `serve` gives all its instances alike: KV, device, parallelism."""
    nodes = {stage.node for each in plan.instances for stage in each.stages}
    if len(nodes) > 1:
        raise BadSetting(f"the plan spans {len(nodes)} machines; `serve` starts one: use its Kubernetes manifests")
    values: dict[str, Any] = {"kv-tokens": min(each.kv_tokens for each in plan.instances)}
    if any(each.gpu != "cpu" for each in plan.instances):
        values["device"] = "cuda"
    for field in ("tp", "pp"):
        values |= _degrees(plan, field, known)
    return values


def _degrees(plan: Plan, field: str, known: Collection[str]) -> dict[str, int]:
    """Ranks a layer, or stages: one number for all, or one for each of the phases."""
    found: dict[str, int] = {}
    for role in dict.fromkeys(plan.roles):
        degrees = {getattr(each, field) for each in plan.instances if each.role == role}
        key = field if role == "mixed" else f"{role}-{field}"
        if len(degrees) > 1 or (degrees != {1} and key not in known):
            asked = ", ".join(f"{each.id} {field}={getattr(each, field)}" for each in plan.instances)
            raise BadSetting(f"`serve` cannot start instances of these degrees on one machine: {asked}")
        if degrees != {1}:
            found[key] = degrees.pop()
    return found
