"""``distserve replan``: a plan and recorded traffic into drift, proposed role changes, and a plan with them."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any, TextIO

from distserve_planner import workload as workloads
from distserve_planner.cli_simulate import write
from distserve_planner.given import prediction
from distserve_planner.plan import Load, Plan, read_plan, write_plan
from distserve_planner.refusal import CannotPlan
from distserve_planner.replanning import Proposal, Shift, drift, propose
from distserve_planner.replanning.running import Running
from distserve_planner.slo import classes_of, planned_classes


def run(parsed: argparse.Namespace, out: TextIO | None = None) -> int:
    """Raises CannotPlan or OutOfRange."""
    if not 0 < parsed.gain < 1:
        raise CannotPlan(f"--gain {parsed.gain:g}: a share of requests between 0 and 1 is needed")
    plan = read_plan(parsed.plan)
    seen = workloads.read(parsed.trace)
    running = Running(plan, seen, parsed.profile or _beside(plan.profile, parsed.plan))
    shifts = drift(plan.load, seen, parsed.tolerance)
    found = propose(running.names, running.roles, running.kinds, running.met, plan.slo.attainment, parsed.gain)
    print(as_text(plan, seen, shifts, found), file=out)
    if parsed.json is not None:
        write(parsed.json, document(shifts, found))
        print(f"written to {parsed.json}", file=out)
    if parsed.out is not None:
        write_plan(changed(running, found, shifts, str(parsed.trace)), parsed.out)
        print(f"plan written to {parsed.out}", file=out)
    return 0


def _beside(profile: str, plan: Path) -> str:
    """A profile that a plan names: as named, or else beside the plan."""
    near = plan.parent / profile
    return str(near) if profile and not Path(profile).exists() and near.exists() else profile


def as_text(plan: Plan, seen: workloads.Workload, shifts: tuple[Shift, ...], found: Proposal) -> str:
    """What a person reads."""
    lines = [f"{len(seen.jobs)} requests over {seen.span_s:.0f} s, against the plan for {plan.load.rate:g} req/s:"]
    for each in shifts:
        verdict = "drifted" if each.drifted else "as planned for"
        lines.append(
            f"  {each.what:18} planned {each.planned:10.2f}  seen {each.seen:10.2f} "
            f"({each.low:.2f} to {each.high:.2f})  {each.change:+.0%}  {verdict}"
        )
    target = plan.slo.attainment
    lines.append(f"attainment as it is: {found.attainment:.1%} (target {target:.0%}), simulated")
    for change in found.changes:
        lines.append(
            f"  {change.instance}: {change.before} → {change.after}, {100 * change.gain:+.1f} points "
            f"(± {200 * change.error:.1f})"
        )
    lines.append(verdict_of(found, target, any(each.drifted for each in shifts)))
    return "\n".join(lines)


def verdict_of(found: Proposal, target: float, drifted: bool) -> str:
    """One sentence."""
    if found.changes:
        rest = "" if found.proposed_attainment >= target else "; plan anew for this traffic to reach the target"
        return f"change roles: {found.proposed_attainment:.1%} of the requests within both limits{rest}"
    if found.attainment >= target:
        return "stay: the roles meet the target" + (" although the traffic has drifted" if drifted else "")
    return "stay: no change of roles surely helps; plan anew for this traffic (`distserve plan --trace`)"


def document(shifts: tuple[Shift, ...], found: Proposal) -> dict[str, Any]:
    """What ``--json`` writes."""
    return {
        "drift": [dataclasses.asdict(each) | {"change": each.change, "drifted": each.drifted} for each in shifts],
        "attainment": found.attainment,
        "roles": [role.value for role in found.roles],
        "proposed": [role.value for role in found.proposed],
        "proposed_attainment": found.proposed_attainment,
        "changes": [
            {
                "instance": each.instance,
                "before": each.before.value,
                "after": each.after.value,
                "gain": each.gain,
                "error": each.error,
            }
            for each in found.changes
        ],
        "simulated": found.tried,
    }


def changed(running: Running, found: Proposal, shifts: tuple[Shift, ...], trace: str) -> Plan:
    """The plan with the proposed roles, for the load recorded in the file ``trace``. Instances keep GPUs and names."""
    plan, result, (rate, prompt, output) = running.plan, running.result(found.proposed), shifts
    instances = tuple(
        dataclasses.replace(each, role=role.value) for each, role in zip(plan.instances, found.proposed, strict=True)
    )
    load = Load(running.workload.name, rate.seen, prompt.seen, output.seen, len(running.workload.jobs), plan.load.seed)
    within = rate.seen * found.proposed_attainment
    classes = classes_of(plan)
    kinds = classes.kinds(running.workload.jobs)
    return dataclasses.replace(
        plan,
        slo_classes=planned_classes(classes, classes.met(result, kinds), kinds),
        instances=instances,
        load=load,
        algorithm="replan",
        prediction=prediction(
            result, found.proposed_attainment, within, plan.prediction.gpus, plan.prediction.uncertainty
        ),
        why=verdict_of(found, plan.slo.attainment, any(each.drifted for each in shifts)),
        alternatives=(),
        trace=trace,
    )
