"""A plan as options of ``serve``, and the parts of ``verify`` that need no cluster."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distserve.cli.main import main
from distserve.cli.servers import options_of
from distserve.core.types import Role
from distserve.launch.settings import BadSetting
from distserve.profiling.verify import (
    Bounds,
    Figures,
    Pulse,
    Trial,
    at_pulse,
    judge,
    machine_of,
    recalibrated,
    workload_of,
)
from distserve_planner.latency.profile import write_profile
from distserve_planner.plan import Batching, Plan, Stage, read_plan, write_plan
from distserve_planner.refusal import CannotPlan
from distserve_planner.replanning.running import Running
from distserve_planner.simulation.deployment import open_door
from distserve_planner.simulation.shared import simulate_shared
from distserve_planner.slo import classes_of
from tests.planner.test_profile import profile

SLO = ["--slo", "ttft=1.0,tpot=0.1"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a profile, a trace and the plan of one prefill and one decode instance."""
    write_profile(profile(), tmp_path / "profile.json")
    rows = [{"arrival_s": i / 2, "input_tokens": 200 + i, "output_tokens": 20} for i in range(40)]
    (tmp_path / "trace.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = ["simulate", "--model", "tiny", "--profile", str(tmp_path / "profile.json"), *SLO, "--rate", "2"]
    asked += ["--prefill", "n=1", "--decode", "n=1", "--requests", str(tmp_path / "trace.jsonl")]
    assert main([*asked, "--out", str(tmp_path / "plan.yaml")]) == 0
    return tmp_path


def options(path: Path, **given: Any) -> Any:
    return options_of("serve", argparse.Namespace(plan=path, **given), {})


def changed(folder: Path, **changes: Any) -> Path:
    path = folder / "changed.yaml"
    write_plan(replace(read_plan(folder / "plan.yaml"), **changes), path)
    return path


def trial(folder: Path, **changes: Any) -> Trial:
    plan: Plan = read_plan(folder / "plan.yaml")
    made = profile(**changes)
    work = workload_of(plan, folder / "plan.yaml", None, None, 60.0, 1)
    return Trial(plan, machine_of(plan, made), work, classes_of(plan), "tiny", ())


# ── serve --plan ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_serve_takes_counts_roles_threads_and_limits_of_a_plan(folder: Path) -> None:
    limits = Batching(max_batch_tokens=1024, max_mixed_tokens=300, prefill_chunk=256, max_sequences=16)
    found = options(changed(folder, batching=limits))
    assert (found.model, found.prefill, found.decode, found.mixed) == ("tiny", 1, 1, 0)
    assert (found.dtype, found.threads_per_rank, found.kv_tokens) == ("float32", 1, 32_768)
    machine = found.instance
    assert (machine.max_batch_tokens, machine.max_mixed_tokens, machine.prefill_chunk) == (1024, 300, 256)
    assert (machine.max_sequences, machine.prefix_cache) == (16, False)


def test_overflow_is_simulated_planned_served_and_verified_alike(folder: Path) -> None:
    asked = ["simulate", "--model", "tiny", "--profile", str(folder / "profile.json"), *SLO, "--rate", "30"]
    asked += ["--prefill", "n=1", "--decode", "n=1", "--requests", str(folder / "trace.jsonl")]
    how = ["--overflow-prefill-tokens", "300", "--max-mixed-tokens", "96"]
    document = {}
    for name, flags in (("without", []), ("with", how)):
        out = ["--json", str(folder / name), "--out", str(folder / "plan.yaml")]
        assert main([*asked, *flags, *out]) == 0
        document[name] = json.loads((folder / name).read_text())
    assert document["with"]["attainment"] > document["without"]["attainment"] + 0.2
    served = options(folder / "plan.yaml")
    assert (served.cluster.overflow_prefill_tokens, served.instance.max_mixed_tokens) == (300, 96)
    verified = trial(folder).machine
    assert verified.cluster == open_door(300) and verified.config.max_mixed_tokens == 96
    running = Running(read_plan(folder / "plan.yaml"), trial(folder).workload, str(folder / "profile.json"))
    trails = running.result(verified.roles).trails
    assert {(t.prefill, t.decode) for t in trails} == {(0, 1), (1, 1)}, "replanning simulates it, too"


def test_degrees_of_the_phases_go_to_their_options(folder: Path) -> None:
    plan = read_plan(folder / "plan.yaml")
    wide = replace(plan.instances[0], tp=2, stages=(Stage("this-machine", (4, 5)),))
    found = options(changed(folder, instances=(wide, plan.instances[1])))
    assert (found.prefill_tp, found.decode_tp or found.tp) == (2, 1)
    other = replace(plan.instances[0], id="prefill-9", stages=(Stage("this-machine", (6,)),))
    with pytest.raises(BadSetting, match="prefill-0 tp=2, prefill-9 tp=1, decode-0 tp=1"):
        options(changed(folder, instances=(wide, other, plan.instances[1])))


def test_flags_weigh_more_than_the_plan(folder: Path) -> None:
    found = options(folder / "plan.yaml", model="elsewhere", kv_tokens=4096)
    assert (found.model, found.kv_tokens, found.decode) == ("elsewhere", 4096, 1)


def test_a_plan_that_one_machine_cannot_start_is_refused(folder: Path) -> None:
    plan = read_plan(folder / "plan.yaml")
    spread = tuple(replace(p, stages=(Stage(f"node-{i}", (0,)),)) for i, p in enumerate(plan.instances))
    with pytest.raises(BadSetting, match="spans 2 machines"):
        options(changed(folder, instances=spread))
    with pytest.raises(BadSetting, match="cannot read"):
        options(folder / "no.yaml")


# ── verify ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_machine_and_the_requests_are_the_plans(folder: Path) -> None:
    made = trial(folder)
    assert made.machine.roles == (Role.PREFILL, Role.DECODE)
    assert made.machine.config.max_sequences == 64 and not made.machine.config.prefix_cache
    assert made.workload.rate == pytest.approx(2.0)
    assert made.workload.jobs[0].arrival_s == 0.0


def test_a_trace_beside_the_plan_is_found(folder: Path) -> None:
    path = changed(folder, trace="trace.jsonl")
    assert len(workload_of(read_plan(path), path, None, 1.0, 9.5, 1).jobs) == 10


def test_what_cannot_be_verified_is_refused(folder: Path) -> None:
    plan = read_plan(folder / "plan.yaml")
    gpus = replace(plan, instances=tuple(replace(i, gpu="h100") for i in plan.instances))
    with pytest.raises(CannotPlan, match="verify it where it is to run"):
        machine_of(gpus, profile())
    with pytest.raises(CannotPlan, match="names no trace"):
        workload_of(replace(plan, trace=""), folder, None, None, 10.0, 1)


SEEN = Figures(100, 0, 0.90, 0.200, 0.300, 0.030, 0.040, 1.8)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, []),
        ({"attainment": 0.95, "ttft_p50_s": 0.229, "tpot_p50_s": 0.0256}, []),
        ({"attainment": 0.96}, ["attainment is off by +6.0 points"]),
        ({"ttft_p50_s": 0.160}, ["median TTFT is off by -20%"]),
        ({"tpot_p50_s": 0.036, "ttft_p50_s": 0.3}, ["median TTFT is off by +50%", "median TPOT is off by +20%"]),
        ({"ttft_p90_s": 3.0}, []),
    ],
)
def test_the_bounds_decide(changes: dict[str, float], words: list[str]) -> None:
    found = list(judge(replace(SEEN, **changes), SEEN, Bounds()))
    assert len(found) == len(words)
    assert all(word in each for word, each in zip(words, found, strict=True))


def test_a_failed_request_is_a_reason(folder: Path) -> None:
    assert "3 of 100 requests failed" in list(judge(SEEN, replace(SEEN, failed=3), Bounds()))


def test_recalibration_brings_the_medians_to_what_was_measured(folder: Path) -> None:
    made = trial(folder)
    told = simulate_shared(made.machine, made.workload)
    measured = replace(
        SEEN, ttft_p50_s=1.3 * float(np.median(told.ttft_s())), tpot_p50_s=0.8 * float(np.median(told.tpot_s()))
    )
    better = replace(made.machine, profile=recalibrated(made, measured))
    again = simulate_shared(better, made.workload)
    assert float(np.median(again.ttft_s())) == pytest.approx(measured.ttft_p50_s, rel=0.03)
    assert float(np.median(again.tpot_s())) == pytest.approx(measured.tpot_p50_s, rel=0.03)


def test_commands_answer_bad_input_in_a_sentence(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["verify", str(folder / "no.yaml")], "cannot read"),
        (["verify", str(folder / "plan.yaml"), "--profile", "no.json"], "cannot read the profile"),
        (["verify", str(folder / "plan.yaml"), "--rate", "-1"], "a number above 0"),
        (["profile", "--model", "tiny", "--out", "p.json", "--instances", "0"], "a number above 0"),
        (["profile", "--model", "no-such-model", "--out", str(folder / "x.json")], "no-such-model"),
    ):
        assert main(arguments) in (1, 2)
        said = capsys.readouterr().err
        assert words in said and len(said.strip().splitlines()) == 1


def test_a_slower_machine_is_foretold_slower(folder: Path) -> None:
    made = trial(folder)
    slower = at_pulse(made, Pulse(1.5, 2.0))
    one = replace(made.workload, jobs=made.workload.jobs[:1])
    before, after = (simulate_shared(each.machine, one).trails[0] for each in (made, slower))
    assert after.ttft_s / before.ttft_s == pytest.approx(1.5, rel=0.01)
    assert after.tpot_s / before.tpot_s == pytest.approx(2.0, rel=0.1)
