"""``distserve verify``: a plan into a trial, progress while it runs, a table, JSON, and a verdict as the exit code."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from distserve.cli.failure import CommandFailed
from distserve.cli.paint import Paint, span, table
from distserve.cli.parser import Usage
from distserve.cli.progress import ProgressLine
from distserve.launch.cluster import ClusterFailed
from distserve.loadgen.workload import BadWorkload
from distserve.models.errors import ModelError
from distserve.profiling.verify import (
    Bounds,
    Trial,
    Verdict,
    VerifyFailed,
    check_here,
    machine_of,
    read_for,
    recalibrated,
    serve_arguments,
    verify,
    workload_of,
)
from distserve_planner.latency.base import OutOfRange
from distserve_planner.latency.profile import write_profile
from distserve_planner.plan import read_plan
from distserve_planner.refusal import CannotPlan
from distserve_planner.slo import classes_of

ACCEPTED, REJECTED = 0, 1


def run(parsed: argparse.Namespace) -> int:
    """0: within the bounds; 1: not, or the plan could not be run."""
    line = ProgressLine.on_terminal(parsed.plain)
    try:
        trial = trial_of(parsed)
        verdict = verify(trial, line.bar)
        line.clear()
        print(report(trial, verdict, Paint(plain=parsed.plain)))
        if parsed.recalibrate is not None:
            write_profile(recalibrated(trial, verdict.measured), parsed.recalibrate)
            print(f"recalibrated profile written to {parsed.recalibrate}")
    except (CannotPlan, OutOfRange, ClusterFailed, VerifyFailed, ModelError, BadWorkload) as error:
        raise CommandFailed(str(error)) from error
    finally:
        line.clear()
    if parsed.json is not None:
        write(parsed.json, {"command": shlex.join(["distserve", *sys.argv[1:]]), **verdict.document})
        print(f"written to {parsed.json}")
    return ACCEPTED if verdict.accepted else REJECTED


def trial_of(parsed: argparse.Namespace) -> Trial:
    """Raises Usage, CannotPlan or OutOfRange."""
    for name in ("rate", "duration", "points", "median", "goodput_bound"):
        if (value := getattr(parsed, name)) is not None and value <= 0:
            raise Usage(f"--{name.replace('_', '-')} {value:g}: a number above 0 is needed")
    path: Path = parsed.plan
    plan = read_plan(path)
    check_here(plan)
    return Trial(
        plan=plan,
        machine=machine_of(plan, read_for(plan, path, parsed.profile)),
        workload=workload_of(plan, path, parsed.trace, parsed.rate, parsed.duration, parsed.seed),
        classes=classes_of(plan),
        model=parsed.tokenizer or parsed.model or plan.model,
        arguments=serve_arguments(path, parsed.model, parsed.tokenizer),
        bounds=Bounds(parsed.points, parsed.median, parsed.goodput_bound),
        seed=parsed.seed,
        goodput=parsed.goodput,
        pulse=not parsed.as_profiled,
    )


def report(trial: Trial, verdict: Verdict, paint: Paint) -> str:
    """Predicted beside measured, and whether that is accepted."""
    told, seen, slo = verdict.predicted, verdict.measured, trial.slo
    rows = [
        ("attainment", f"{told.attainment:.1%}", f"{seen.attainment:.1%}", _points(told.attainment - seen.attainment))
    ]
    for name, word in (("ttft", "TTFT"), ("tpot", "TPOT")):
        for mark in ("p50", "p90"):
            a, b = getattr(told, f"{name}_{mark}_s"), getattr(seen, f"{name}_{mark}_s")
            rows.append((f"{word} {mark}", span(a), span(b), f"{a / b - 1:+.1%}" if b else ""))
    rows.append(("within limits, req/s", f"{told.within:.2f}", f"{seen.within:.2f}", _ratio(told.within, seen.within)))
    if told.goodput is not None and seen.goodput is not None:
        rows.append(
            ("goodput, req/s", f"{told.goodput:.2f}", f"{seen.goodput:.2f}", _ratio(told.goodput, seen.goodput))
        )
    roles = [str(role) for role in trial.machine.roles]
    layout = " + ".join(f"{roles.count(role)} {role}" for role in dict.fromkeys(roles))
    lines = [
        f"{layout}, {seen.requests} requests at {trial.workload.rate:.2f} req/s, "
        f"TTFT ≤ {slo.ttft_s:g} s and TPOT ≤ {slo.tpot_s:g} s",
        table(("", "predicted", "measured", "off"), rows, paint),
    ]
    pulse = verdict.pulse
    if trial.pulse:
        lines.append(
            f"single requests just before took {pulse.prefill:.2f} (prompt) and {pulse.decode:.2f} (decode) "
            "of the profile's times; that is in the prediction"
        )
    if verdict.accepted:
        return "\n".join([*lines, paint("accepted", "green")])
    return "\n".join([*lines, paint("rejected: ", "red") + "; ".join(verdict.reasons)])


def _points(difference: float) -> str:
    return f"{100 * difference:+.1f} points"


def _ratio(told: float, seen: float) -> str:
    return f"{told / seen - 1:+.1%}" if seen else ""


def write(path: Path, document: dict[str, Any]) -> None:
    """Raises CommandFailed."""
    try:
        path.write_text(json.dumps(document, indent=1) + "\n")
    except OSError as error:
        raise CommandFailed(f"cannot write {path}: {error.strerror or error}") from error
