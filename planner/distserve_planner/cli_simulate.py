"""``distserve simulate``: words into a deployment and a workload, the result into a table and a JSON document."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distserve.core.types import Role
from distserve.sched.config import InstanceConfig
from distserve_planner import workload as workloads
from distserve_planner.given import Source, plan_of_machine
from distserve_planner.latency.profiled import ProfiledModel, within
from distserve_planner.latency.source import default_policy, is_file, latency_model, profile_for
from distserve_planner.plan import write_plan
from distserve_planner.refusal import CannotPlan, only_known, whole
from distserve_planner.simulation.deployment import InstanceSpec, instance, on_ports, open_door, policy
from distserve_planner.simulation.result import SimulationResult
from distserve_planner.simulation.run import simulate
from distserve_planner.simulation.shared import Machine, simulate_shared
from distserve_planner.slo import SloClasses, pairs, parse_slos

SHAPE = {"tp": 1, "pp": 1, "n": 1}


def run(parsed: argparse.Namespace) -> int:
    """Simulate what ``parsed`` (the arguments of the command) describes. Raises CannotPlan or OutOfRange."""
    classes = parse_slos(parsed.slo)
    if parsed.out is not None and not is_file(parsed.profile):
        raise CannotPlan("--out needs a profile of this machine (`distserve profile`): a plan of it is written")
    whole(parsed.kv_tokens, "--kv-tokens", 0)
    whole(parsed.seed, "--seed", 0)
    whole(parsed.overflow_prefill_tokens, "--overflow-prefill-tokens", 0)
    workload = workloads.read(parsed.requests)
    if parsed.rate is not None:
        workload = workload.at_rate(parsed.rate)
    kinds = classes.kinds(workload.jobs)
    began = time.process_time()
    if is_file(parsed.profile):
        shared = machine(parsed)
        result = simulate_shared(shared, workload, seed=parsed.seed)
    else:
        cluster = open_door(parsed.overflow_prefill_tokens)
        deployment = on_ports(_instances(parsed), parsed.kv_bandwidth * 1e9, cluster=cluster)
        began = time.process_time()
        result = simulate(deployment, workload, seed=parsed.seed)
    spent = time.process_time() - began
    print(_table(result, classes, kinds, spent))
    if parsed.out is not None:
        source = Source(parsed.model, parsed.profile, str(parsed.requests))
        write_plan(plan_of_machine(shared, workload, classes, result, source), parsed.out)
        print(f"plan written to {parsed.out}")
    if parsed.json is not None:
        write(parsed.json, document(result, classes, kinds))
        print(f"written to {parsed.json}")
    return 0


def parse_shape(text: str, flag: str) -> tuple[int, int, int]:
    """``tp=2,pp=1,n=1``, each 1 unless given. Raises CannotPlan."""
    words = pairs(text, flag)
    only_known(words, SHAPE, flag)
    numbers = {key: whole(int(word) if word.isdigit() else word, f"{flag} {key}") for key, word in words.items()}
    shape = {**SHAPE, **numbers}
    return shape["tp"], shape["pp"], shape["n"]


def _shapes(parsed: argparse.Namespace) -> Iterator[tuple[Role, int, int, int]]:
    """(role, tp, pp, count) as asked for. Raises CannotPlan."""
    roles = {Role.PREFILL: parsed.prefill, Role.DECODE: parsed.decode, Role.MIXED: parsed.mixed}
    given = {role: text for role, text in roles.items() if text}
    if set(given) not in ({Role.PREFILL, Role.DECODE}, {Role.MIXED}):
        raise CannotPlan("give --prefill and --decode, or --mixed alone, each such as tp=2,pp=1,n=1")
    for role, text in given.items():
        yield (role, *parse_shape(text, f"--{role}"))


def machine(parsed: argparse.Namespace) -> Machine:
    """The instances on the machine whose profile is given. Raises CannotPlan or OutOfRange."""
    profile = profile_for(parsed.profile, parsed.model)
    limits = policy(parsed.policy) if parsed.policy else within(profile, policy(default_policy(parsed.profile)))
    limits = replace(_mixed(parsed, limits), prefix_cache=parsed.prefix_cache)
    roles: list[Role] = []
    for role, tp, pp, count in _shapes(parsed):
        ProfiledModel(profile, tp, pp)  # refuses what was not measured
        roles += [role] * count
    cluster = open_door(parsed.overflow_prefill_tokens)
    return Machine(profile, tuple(roles), limits, parsed.kv_tokens, cluster=cluster)


def _mixed(parsed: argparse.Namespace, limits: InstanceConfig) -> InstanceConfig:
    """The limits, with those of them that were given. Raises CannotPlan."""
    if (tokens := parsed.max_mixed_tokens) is None:
        return limits
    return replace(limits, max_mixed_tokens=whole(tokens, "--max-mixed-tokens"))


def _instances(parsed: argparse.Namespace) -> list[InstanceSpec]:
    limits = _mixed(parsed, policy(parsed.policy or default_policy(parsed.profile)))
    specs: list[InstanceSpec] = []
    for role, tp, pp, count in _shapes(parsed):
        model = latency_model(parsed.profile, parsed.model, tp, pp)
        spec = instance(role, model, limits, prefix_cache=parsed.prefix_cache, kv_tokens=parsed.kv_tokens)
        specs += [spec] * count
    return specs


def document(result: SimulationResult, classes: SloClasses, kinds: NDArray[np.int64]) -> dict[str, Any]:
    """What ``--json`` writes. A request that was refused or never answered has null times and the reason."""
    requests: list[dict[str, Any]] = []
    for trail, kind in zip(result.trails, kinds.tolist(), strict=True):
        entry: dict[str, Any] = {"ttft_ms": _ms(trail.ttft_s), "tpot_ms": _ms(trail.tpot_s)}
        if classes.several:
            entry["class"] = classes.classes[kind].name
        if trail.refused:
            entry["refused"] = trail.refused
        requests.append(entry)
    met, slo = classes.met(result, kinds), classes.loosest
    found: dict[str, Any] = {
        "attainment": float(met.mean()),
        "slo": {"ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s},
        "digest": result.digest,
        "requests": requests,
    }
    if classes.several:
        found["classes"] = {each.name: asdict(each) | {"met": each.met} for each in classes.shares(met, kinds)}
    return found


def write(path: Path, content: dict[str, Any]) -> None:
    """Raises CannotPlan when the file cannot be written."""
    try:
        path.write_text(json.dumps(content))
    except OSError as error:
        raise CannotPlan(f"{path} cannot be written: {error.strerror}") from error


def _ms(seconds: float) -> float | None:
    return round(seconds * 1e3, 4) if math.isfinite(seconds) else None


def _table(result: SimulationResult, classes: SloClasses, kinds: NDArray[np.int64], spent: float) -> str:
    n, ttft, tpot = len(result.trails), result.ttft_s(), result.tpot_s()
    lines = [
        f"{n} requests, {n / max(spent, 1e-9):,.0f} simulated a CPU second",
        f"{'':6}{'p50':>9}{'p90':>9}{'p99':>9}  ms",
    ]
    for name, values in (("TTFT", ttft), ("TPOT", tpot)):
        marks = "".join(f"{result.percentile(values, q) * 1e3:9.1f}" for q in (0.5, 0.9, 0.99))
        lines.append(f"{name:6}{marks}")
    met, (most_ttft, most_tpot) = classes.met(result, kinds), classes.limits(kinds)
    within = f"TTFT {(ttft < most_ttft).mean():.1%}, TPOT {(tpot < most_tpot).mean():.1%}"
    if classes.several:
        lines.append(f"attainment {met.mean():.1%} within the limits of their classes ({within})")
        for each in classes.shares(met, kinds):
            word = "met" if each.met else "missed"
            lines.append(f"  {each.name}: {each.attainment:.1%} of {each.requests}, target {each.target:.0%} {word}")
    else:
        slo = classes.loosest
        lines.append(f"attainment {met.mean():.1%} within {slo.ttft_s:g} s and {slo.tpot_s:g} s ({within})")
    refused = [t.refused for t in result.trails if t.refused]
    if refused:
        lines.append(f"{len(refused)} refused, the first because {refused[0]}")
    return "\n".join(lines)
