"""Drift is told from chance, and roles change only when that surely helps."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from distserve.cli.main import main
from distserve.core.types import Role
from distserve_planner import workload
from distserve_planner.plan import (
    Load,
    Plan,
    PlannedInstance,
    Prediction,
    Stage,
    Targets,
    TargetsOfClass,
    read_plan,
    write_plan,
)
from distserve_planner.refusal import CannotPlan
from distserve_planner.replanning import drift, propose
from distserve_planner.replanning.roles import Roles, paired
from distserve_planner.replanning.running import Running

P, D, M = Role.PREFILL, Role.DECODE, Role.MIXED
LOAD = Load("chat", 4.0, 512.0, 64.0, 1000, 0)


def traffic(rate: float, prompt: int, output: int, n: int = 600, seed: int = 1) -> workload.Workload:
    return workload.synthetic(workload.Constant(prompt, output), workload.poisson(rate), n, seed)


# ── drift ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("seed", range(5))
def test_the_planned_traffic_is_no_drift(seed: int) -> None:
    assert not any(each.drifted for each in drift(LOAD, traffic(4.0, 512, 64, seed=seed)))


@pytest.mark.parametrize(
    ("seen", "drifted"),
    [
        (traffic(8.0, 512, 64), [True, False, False]),
        (traffic(4.0, 900, 64), [False, True, False]),
        (traffic(4.0, 512, 20), [False, False, True]),
        (traffic(4.0, 540, 64), [False, False, False]),  # surely more, but not by enough to matter
    ],
)
def test_what_drifted_is_named(seen: workload.Workload, drifted: list[bool]) -> None:
    assert [each.drifted for each in drift(LOAD, seen)] == drifted


def test_bursts_widen_the_interval_of_the_rate() -> None:
    steady = traffic(4.0, 512, 64)
    bursty = workload.synthetic(workload.Constant(512, 64), workload.gamma(4.0, 6.0), 600, 1)
    widths = [each.high - each.low for each in (drift(LOAD, steady)[0], drift(LOAD, bursty)[0])]
    assert widths[1] > 2 * widths[0]


def test_too_little_traffic_is_refused() -> None:
    with pytest.raises(CannotPlan, match="too few"):
        drift(LOAD, traffic(4.0, 512, 64, n=10))


# ── roles ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class World:
    """Attainment as a function of the counts of roles; the same requests' luck in every run."""

    def __init__(self, share: dict[tuple[int, int, int], float], n: int = 2000) -> None:
        self.share, self.runs = share, 0
        self.luck = np.random.default_rng(3).random(n)

    def __call__(self, roles: Roles) -> np.ndarray:
        self.runs += 1
        counts = (roles.count(P), roles.count(D), roles.count(M))
        met: np.ndarray = self.luck < self.share.get(counts, 0.0)
        return met


def test_the_steepest_changes_are_proposed_in_order() -> None:
    world = World({(3, 1, 0): 0.5, (2, 2, 0): 0.7, (1, 3, 0): 0.95, (2, 1, 1): 0.6})
    found = propose(("a", "b", "c", "d"), (P, P, P, D), ("x",) * 4, world, 0.9)
    assert [(c.instance, c.before, c.after) for c in found.changes] == [("c", P, D), ("b", P, D)]
    assert found.proposed == (P, D, D, D) and found.attainment == pytest.approx(0.5, abs=0.03)
    assert found.proposed_attainment > 0.9 and found.tried == world.runs


def test_a_target_that_is_met_changes_nothing() -> None:
    world = World({(1, 1, 0): 0.92, (0, 0, 2): 1.0})
    found = propose(("a", "b"), (P, D), ("x", "x"), world, 0.9)
    assert not found.changes and world.runs == 1


def test_a_gain_within_the_noise_changes_nothing() -> None:
    world = World({(1, 1, 0): 0.50, (0, 0, 2): 0.51, (0, 1, 1): 0.505, (1, 0, 1): 0.5})
    assert not propose(("a", "b"), (P, D), ("x", "x"), world, 0.9).changes


def test_a_cluster_that_could_not_serve_is_never_tried() -> None:
    world = World({(1, 1, 0): 0.1})
    propose(("a", "b"), (P, D), ("x", "x"), world, 0.9)
    assert world.runs == 3  # as it is; prefill → mixed; decode → mixed


def test_unlike_instances_are_tried_apart() -> None:
    def run(roles: Roles) -> np.ndarray:
        return np.arange(1000) < {(D, P): 950, (M, P): 600, (M, D): 400}.get(roles, 100)

    found = propose(("small", "large"), (P, D), ("small", "large"), run, 0.9)
    assert found.proposed == (D, P) and len(found.changes) == 3  # through mixed, so that both phases are always served


def test_paired_differences_are_surer_than_unpaired_ones() -> None:
    rng = np.random.default_rng(0)
    before = rng.random(4000) < 0.5
    after = before | (rng.random(4000) < 0.05)
    mean, error = paired(before, after)
    assert mean == pytest.approx(0.025, abs=0.01) and error < 0.005
    assert paired(before, before) == (0.0, 0.0)


# ── with the simulator and the command ───────────────────────────────────────────────────────────────────────────────


def planned(roles: tuple[str, ...]) -> Plan:
    instances = tuple(
        PlannedInstance(f"{role}-{i}", role, "a100-80g", 1, 1, 60_000, (Stage("n", (i,)),))
        for i, role in enumerate(roles)
    )
    prediction = Prediction(0.95, 0.1, 0.2, 0.02, 0.03, 6.0, 5.5, 6.5, len(roles), 1.5)
    return Plan(
        1, "opt-13b", "c", "slice", "low", "goodput", "fitted", "distserve", Targets(0.4, 0.1, 0.9), LOAD, instances,
        prediction, "because",
    )  # fmt: skip


def test_long_prompts_call_for_more_prefill(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Planned for answers; what came is prompts: one decode instance turns to prefill."""
    plan, trace, out, told = (tmp_path / name for name in ("p.yaml", "t.json", "q.yaml", "o.json"))
    write_plan(planned(("prefill", "decode", "decode", "decode")), plan)
    seen = traffic(9.0, 900, 20, n=800)
    trace.write_text(json.dumps([[j.prompt, j.output, j.arrival_s] for j in seen.jobs]))
    words = f"replan {plan} --trace {trace} --profile distserve:a100-80g --out {out} --json {told}"
    assert main(words.split()) == 0
    document = json.loads(told.read_text())
    assert [d["drifted"] for d in document["drift"]] == [True, True, True]
    assert document["proposed"].count("prefill") + document["proposed"].count("mixed") >= 2
    assert document["proposed_attainment"] > document["attainment"] + 0.2
    again = read_plan(out)
    assert again.prediction.attainment == pytest.approx(document["proposed_attainment"], abs=1e-6)
    assert again.load.rate == pytest.approx(seen.rate, rel=1e-3) and len(again.instances) == 4
    assert again.trace == str(trace)  # so that it can be verified, and planned for again
    assert "change roles" in capsys.readouterr().out


def test_the_planned_traffic_keeps_its_roles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, trace = tmp_path / "p.yaml", tmp_path / "t.json"
    write_plan(planned(("prefill", "decode")), plan)
    seen = traffic(4.0, 512, 64)
    trace.write_text(json.dumps([[j.prompt, j.output, j.arrival_s] for j in seen.jobs]))
    assert main(["replan", str(plan), "--trace", str(trace), "--profile", "distserve:a100-80g"]) == 0
    assert "stay: the roles meet the target" in capsys.readouterr().out


def test_each_request_is_judged_by_the_limits_of_its_class(tmp_path: Path) -> None:
    """The common targets are the loosest; a class with a TTFT that nobody can keep shows as missed."""
    plan, trace, out, told = (tmp_path / name for name in ("p.yaml", "t.jsonl", "q.yaml", "o.json"))
    classes = (
        TargetsOfClass("patient", 0.4, 0.1, 0.9, "", 10, 1.0),
        TargetsOfClass("hasty", 0.001, 0.1, 0.9, "", 10, 1.0),
    )
    write_plan(replace(planned(("prefill", "decode")), slo_classes=classes), plan)
    names = ("patient", "patient", "patient", "hasty")
    rows = [
        {"arrival_s": j.arrival_s, "input_tokens": j.prompt, "output_tokens": j.output, "slo_class": names[i % 4]}
        for i, j in enumerate(traffic(3.0, 512, 64, n=200).jobs)
    ]
    trace.write_text("\n".join(map(json.dumps, rows)))
    words = f"replan {plan} --trace {trace} --profile distserve:a100-80g --out {out} --json {told}"
    assert main(words.split()) == 0
    assert json.loads(told.read_text())["attainment"] == pytest.approx(0.75, abs=0.05)
    again = {each.name: each for each in read_plan(out).slo_classes}
    assert (again["patient"].requests, again["hasty"].requests) == (150, 50)
    assert again["patient"].predicted > 0.9 and again["hasty"].predicted == 0.0


def test_what_replan_needs_it_asks_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, trace = tmp_path / "p.yaml", tmp_path / "t.json"
    write_plan(planned(("prefill", "decode")), plan)
    trace.write_text(json.dumps([[j.prompt, j.output, j.arrival_s] for j in traffic(4.0, 512, 64).jobs]))
    assert main(["replan", str(plan), "--trace", str(trace)]) != 0
    assert "--profile" in capsys.readouterr().err
    assert main(["replan", str(plan), "--trace", str(trace), "--profile", "x", "--gain", "2"]) != 0
    assert "--gain" in capsys.readouterr().err


def test_requests_are_ordered_by_arrival(tmp_path: Path) -> None:
    seen = traffic(4.0, 512, 64, n=60)
    shuffled = dataclasses.replace(seen, jobs=tuple(reversed(seen.jobs)))
    a = Running(planned(("mixed",)), seen, "vllm:a100-80g").met((M,))
    b = Running(planned(("mixed",)), shuffled, "vllm:a100-80g").met((M,))
    assert (a == b).all()
