"""``distserve simulate``: words into a deployment and a workload, the result into a table and a JSON document."""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

from distserve.core.types import Role
from distserve_planner import workload as workloads
from distserve_planner.latency.source import default_policy, latency_model
from distserve_planner.refusal import CannotPlan, only_known, whole
from distserve_planner.simulation.deployment import InstanceSpec, instance, on_ports, policy
from distserve_planner.simulation.result import SimulationResult, Slo
from distserve_planner.simulation.run import simulate

SHAPE = {"tp": 1, "pp": 1, "n": 1}


def run(parsed: argparse.Namespace) -> int:
    """Simulate what ``parsed`` (the arguments of the command) describes. Raises CannotPlan or OutOfRange."""
    slo = parse_slo(parsed.slo)
    workload = workloads.read(parsed.requests)
    if parsed.rate is not None:
        workload = workload.at_rate(parsed.rate)
    deployment = on_ports(_instances(parsed), parsed.kv_bandwidth * 1e9)
    began = time.process_time()
    result = simulate(deployment, workload, seed=parsed.seed)
    spent = time.process_time() - began
    print(_table(result, slo, spent))
    if parsed.json is not None:
        write(parsed.json, document(result, slo))
        print(f"written to {parsed.json}")
    return 0


def parse_slo(text: str) -> Slo:
    """``ttft=0.2,tpot=0.1[,attainment=0.9]``, seconds. Raises CannotPlan."""
    words = _pairs(text, "--slo")
    only_known(words, ("ttft", "tpot", "attainment"), "--slo")
    values: dict[str, float] = {}
    for key, word in words.items():
        try:
            values[key] = float(word)
        except ValueError:
            raise CannotPlan(f"--slo: {key}={word!r} is not a number") from None
        if not values[key] > 0 or (key == "attainment" and values[key] > 1):
            raise CannotPlan(f"--slo: {key}={word} is out of range; limits are above 0, an attainment at most 1")
    if "ttft" not in values or "tpot" not in values:
        raise CannotPlan("--slo needs both limits in seconds, such as ttft=0.25,tpot=0.1")
    return Slo(values["ttft"], values["tpot"], values.get("attainment", 0.9))


def parse_shape(text: str, flag: str) -> tuple[int, int, int]:
    """``tp=2,pp=1,n=1``, each 1 unless given. Raises CannotPlan."""
    words = _pairs(text, flag)
    only_known(words, SHAPE, flag)
    numbers = {key: whole(int(word) if word.isdigit() else word, f"{flag} {key}") for key, word in words.items()}
    shape = {**SHAPE, **numbers}
    return shape["tp"], shape["pp"], shape["n"]


def _pairs(text: str, flag: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    if not pairs or any(not sep for _, sep, _ in pairs):
        raise CannotPlan(f"{flag}: {text!r} is not of the form key=value,key=value")
    return {key.strip(): word.strip() for key, _, word in pairs}


def _instances(parsed: argparse.Namespace) -> list[InstanceSpec]:
    roles = {Role.PREFILL: parsed.prefill, Role.DECODE: parsed.decode, Role.MIXED: parsed.mixed}
    given = {role: text for role, text in roles.items() if text}
    if set(given) not in ({Role.PREFILL, Role.DECODE}, {Role.MIXED}):
        raise CannotPlan("give --prefill and --decode, or --mixed alone, each such as tp=2,pp=1,n=1")
    limits = policy(parsed.policy or default_policy(parsed.profile))
    specs: list[InstanceSpec] = []
    for role, text in given.items():
        tp, pp, count = parse_shape(text, f"--{role}")
        model = latency_model(parsed.profile, parsed.model, tp, pp)
        spec = instance(role, model, limits, prefix_cache=parsed.prefix_cache, kv_tokens=parsed.kv_tokens)
        specs += [spec] * count
    return specs


def document(result: SimulationResult, slo: Slo) -> dict[str, Any]:
    """What ``--json`` writes. A request that was refused or never answered has null times and the reason."""
    requests: list[dict[str, Any]] = []
    for trail in result.trails:
        entry: dict[str, Any] = {"ttft_ms": _ms(trail.ttft_s), "tpot_ms": _ms(trail.tpot_s)}
        if trail.refused:
            entry["refused"] = trail.refused
        requests.append(entry)
    return {
        "attainment": result.attainment(slo),
        "slo": {"ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s},
        "digest": result.digest,
        "requests": requests,
    }


def write(path: Path, content: dict[str, Any]) -> None:
    """Raises CannotPlan when the file cannot be written."""
    try:
        path.write_text(json.dumps(content))
    except OSError as error:
        raise CannotPlan(f"{path} cannot be written: {error.strerror}") from error


def _ms(seconds: float) -> float | None:
    return round(seconds * 1e3, 4) if math.isfinite(seconds) else None


def _table(result: SimulationResult, slo: Slo, spent: float) -> str:
    n, ttft, tpot = len(result.trails), result.ttft_s(), result.tpot_s()
    lines = [
        f"{n} requests, {n / max(spent, 1e-9):,.0f} simulated a CPU second",
        f"{'':6}{'p50':>9}{'p90':>9}{'p99':>9}  ms",
    ]
    for name, values in (("TTFT", ttft), ("TPOT", tpot)):
        marks = "".join(f"{result.percentile(values, q) * 1e3:9.1f}" for q in (0.5, 0.9, 0.99))
        lines.append(f"{name:6}{marks}")
    within = f"TTFT {(ttft < slo.ttft_s).mean():.1%}, TPOT {(tpot < slo.tpot_s).mean():.1%}"
    limits = f"{slo.ttft_s:g} s and {slo.tpot_s:g} s"
    lines.append(f"attainment {result.attainment(slo):.1%} within {limits} ({within})")
    refused = [t.refused for t in result.trails if t.refused]
    if refused:
        lines.append(f"{len(refused)} refused, the first because {refused[0]}")
    return "\n".join(lines)
