"""``distserve plan``: words into a search, its result into plan.yaml, a table, JSON and a report."""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path
from typing import Any, Protocol, TextIO

from distserve_planner import workload as workloads
from distserve_planner.cli_simulate import write
from distserve_planner.cluster import Cluster, read_cluster
from distserve_planner.latency.fitted import profiles
from distserve_planner.latency.operators import engine_named
from distserve_planner.latency.profile import Profile
from distserve_planner.latency.source import default_policy, is_file, profile_for
from distserve_planner.models import load_model
from distserve_planner.plan import as_text, plain, write_plan
from distserve_planner.refusal import CannotPlan, nearest, whole
from distserve_planner.report import write_report
from distserve_planner.selection import (
    Effort,
    FromFit,
    FromProfile,
    FromTables,
    LatencySource,
    Problem,
    SearchResult,
    search,
)
from distserve_planner.selection.verdict import plan_from
from distserve_planner.slo import parse_slos
from distserve_planner.workload import Workload

TABLES = "tables"
POISSON = "poisson"


class Line(Protocol):
    """Where progress is shown while a search runs."""

    def counted(self, done: int, total: int, words: str) -> None: ...
    def clear(self) -> None: ...


def run(parsed: argparse.Namespace, line: Line, out: TextIO | None = None) -> int:
    """Plans what ``parsed`` (the arguments of the command) describes. Raises CannotPlan or OutOfRange."""
    problem = problem_of(parsed)
    began = time.process_time()
    try:
        result = search(problem, workers=parsed.workers, progress=line.counted, resume=parsed.resume)
    finally:
        line.clear()
    plan = plan_from(result, str(parsed.trace or ""))
    write_plan(plan, parsed.out)
    print(as_text(plan), file=out)
    print(f"\nwritten to {parsed.out} after {time.process_time() - began:.1f} CPU s", file=out)
    if parsed.json is not None:
        write(parsed.json, {"plan": plain(plan), "candidates": candidates(result)})
        print(f"written to {parsed.json}", file=out)
    if parsed.report is not None:
        write_report(result, plan, parsed.report)
        print(f"report in {parsed.report}", file=out)
    return 0


def problem_of(parsed: argparse.Namespace) -> Problem:
    """The question in the words of the command line. Raises CannotPlan."""
    _check_counts(parsed)
    model = load_model(parsed.model)
    classes, seed = parse_slos(parsed.slo), parsed.seed
    effort = Effort(parsed.requests, max(parsed.requests, parsed.final_requests), parsed.top, parsed.unit_gpus, seed)
    if not parsed.rate > 0:
        raise CannotPlan(f"--rate {parsed.rate:g}: requests a second must be above 0")
    policy, cluster = parsed.policy or default_policy(parsed.profile), read_cluster(parsed.cluster)
    if is_file(parsed.profile):
        _check_here(profile_for(parsed.profile, parsed.model), cluster)
    return Problem(
        model=model,
        cluster=cluster,
        workload=_workload(parsed, effort),
        slo=classes.loosest,
        classes=classes if classes.several else None,
        rate=parsed.rate,
        latency=_latency(parsed, parsed.profile),
        mixed_latency=_latency(parsed, parsed.mixed_profile) if parsed.mixed_profile else None,
        algorithm=parsed.algorithm,
        objective=parsed.objective,
        policy=policy,
        mixed_policies=_colocated(policy, parsed.profile),
        effort=effort,
    )


def _check_counts(parsed: argparse.Namespace) -> None:
    """Raises CannotPlan for a count that is none."""
    for name, least in (
        ("requests", 2),
        ("final_requests", 2),
        ("top", 1),
        ("unit_gpus", 1),
        ("workers", 1),
        ("seed", 0),
    ):
        whole(getattr(parsed, name), f"--{name.replace('_', '-')}", least)


def _colocated(policy: str, profile: str) -> tuple[str, ...]:
    """Batching of the colocated alternatives, with and without chunks; on this machine what its engine can do."""
    if is_file(profile):
        return tuple(dict.fromkeys((policy, "serve", "prompts-first")))
    return tuple(dict.fromkeys((policy if policy != "distserve" else "vllm-2023", "chunked", "vllm-2023")))


def _latency(parsed: argparse.Namespace, profile: str) -> LatencySource:
    known = [*profiles(), TABLES]
    if profile in profiles():
        return FromFit(profile, parsed.model)
    if is_file(profile):
        profile_for(profile, parsed.model)  # refuses another model's
        return FromProfile(profile, hashlib.sha256(Path(profile).read_bytes()).hexdigest())
    if profile == TABLES:
        return FromTables(load_model(parsed.model), engine_named(parsed.engine).name)
    known.append("a file of `distserve profile`")
    raise CannotPlan(f"unknown profile {profile!r}{nearest(profile, known)} (known: {', '.join(known)})")


def _check_here(profile: Profile, cluster: Cluster) -> None:
    """Raises CannotPlan for another cluster than the machine that was profiled."""
    most = profile.instances
    if len(cluster.nodes) > 1 or any(gpu.name != "cpu" for gpu in cluster.gpu_types):
        raise CannotPlan(
            f"a profile of `distserve profile` plans for the machine it was made on; describe that as the cluster: "
            f"nodes: [{{gpu: cpu, gpus: {most}}}]"
        )
    if cluster.gpus > most:
        raise CannotPlan(
            f"the profile was measured with {most} instances on one machine, and {cluster.name} has room for "
            f"{cluster.gpus}; give gpus: {most}, or profile with --instances {cluster.gpus}"
        )


def _workload(parsed: argparse.Namespace, effort: Effort) -> Workload:
    if (parsed.trace is None) == (not parsed.workload):
        raise CannotPlan("give the traffic as --trace FILE or as --workload NAME, one of the two")
    if parsed.trace is not None:
        if parsed.arrivals != POISSON:
            raise CannotPlan("--arrivals is for --workload; a trace has its own")
        return workloads.read(parsed.trace)
    arrivals = workloads.arrivals_named(parsed.arrivals)
    return workloads.named(parsed.workload, effort.final_requests, effort.seed, arrivals)


def candidates(result: SearchResult) -> list[dict[str, Any]]:
    """Everything that was looked at, for ``--json``: goodput, interval, bound and the trials' points."""
    found = []
    for entry in (*result.finalists, *result.colocated, *result.ranking.entries):
        each: dict[str, Any] = entry.unit.facts() | {"what": str(entry.unit), "bound": _finite(entry.bound)}
        if entry.found is not None:
            each |= {"goodput": entry.found.rate, "low": entry.found.low, "high": entry.found.high}
            each |= {"pruned": entry.found.at_most}
            each["points"] = [
                {"rate": p.rate, "attainment": p.attainment, "error": p.error} for p in entry.found.points
            ]
        else:
            each["pruned"] = True
        found.append(each)
    return found


def _finite(value: float) -> float | None:
    return value if json.dumps(value) != "Infinity" else None
