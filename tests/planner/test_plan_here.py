"""A plan for this machine, made with its own profile: what `serve` and `verify` then take from it."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest

from distserve.cli.main import main
from distserve.cli.servers import options_of
from distserve.core.types import Role
from distserve.profiling.verify import machine_of, read_for, workload_of
from distserve_planner.latency.profile import write_profile
from distserve_planner.latency.profiled import ProfiledModel, within
from distserve_planner.plan import read_plan
from distserve_planner.simulation.deployment import POLICIES
from distserve_planner.simulation.shared import simulate_shared
from tests.planner.test_profile import profile

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "vocab_size": 256,
    "max_position_embeddings": 4096,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(CONFIG))
    write_profile(profile(), tmp_path / "profile.json")
    (tmp_path / "here.yaml").write_text("nodes: [{name: here, gpu: cpu, gpus: 2}]\n")
    rows = [{"arrival_s": i * 0.7, "input_tokens": 100 + 7 * (i % 30), "output_tokens": 12} for i in range(120)]
    (tmp_path / "trace.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def ask(folder: Path, *more: str, cluster: str = "here.yaml") -> int:
    words = ["plan", "--model", str(folder / "tiny" / "config.json"), "--cluster", str(folder / cluster)]
    words += ["--trace", str(folder / "trace.jsonl"), "--slo", "ttft=0.5,tpot=0.06", "--rate", "7"]
    words += ["--profile", str(folder / "profile.json"), "--requests", "120", "--final-requests", "120"]
    return main([*words, "--out", str(folder / "plan.yaml"), *more])


def test_a_plan_of_the_profiled_machine_is_served_and_verified_as_planned(folder: Path) -> None:
    assert ask(folder) == 0
    plan = read_plan(folder / "plan.yaml")
    assert plan.profile == str(folder / "profile.json") and plan.dtype == "float32" and plan.threads == 1
    assert plan.latency.startswith("profile of tiny")
    options = options_of("serve", argparse.Namespace(plan=folder / "plan.yaml"), {})
    assert options.prefill + options.decode + options.mixed == len(plan.instances) == 2
    assert options.instance.max_sequences == 64 and options.threads_per_rank == 1
    machine = machine_of(plan, read_for(plan, folder / "plan.yaml", ""))
    assert machine.roles == tuple(Role(role) for role in plan.roles)
    told = simulate_shared(machine, workload_of(plan, folder / "plan.yaml", None, None, 60.0, 1))
    assert float(told.ttft_s().mean()) == pytest.approx(plan.prediction.ttft_p50_s, rel=0.5)


def test_colocated_is_compared_with_and_without_chunks_as_the_engine_here_can(folder: Path) -> None:
    assert ask(folder, "--json", str(folder / "out.json")) == 0
    looked_at = json.loads((folder / "out.json").read_text())["candidates"]
    assert {c["policy"] for c in looked_at if "mixed" in c} == {"serve", "prompts-first"}
    assert any("prefill" in c for c in looked_at)


@pytest.mark.parametrize(
    ("cluster", "words"),
    [
        ("nodes: [{gpu: cpu, gpus: 4}]", "give gpus: 2, or profile with --instances 4"),
        ("nodes: [{gpu: a100-80g, gpus: 2}]", "nodes: [{gpu: cpu, gpus: 2}]"),
        ("nodes: [{gpu: cpu, gpus: 1, count: 2}]", "the machine it was made on"),
    ],
)
def test_another_cluster_than_the_profiled_machine_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], cluster: str, words: str
) -> None:
    (folder / "other.yaml").write_text(cluster + "\n")
    assert ask(folder, cluster="other.yaml") != 0
    told = capsys.readouterr().err
    assert words in told and len(told.strip().splitlines()) == 1


def test_what_the_profile_does_not_reach_is_never_asked_for() -> None:
    small = profile()
    small = replace(small, range=replace(small.range, batch=8, step_tokens=300, context=5000))
    held = within(small, POLICIES["serve"])
    assert (held.max_sequences, held.max_batch_tokens, held.max_mixed_tokens, held.prefill_chunk) == (8, 300, 300, 300)
    assert ProfiledModel(small).kv_capacity_tokens == 5000


def test_a_prompt_beyond_the_profile_rules_out_what_does_not_cut_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = profile()
    write_profile(replace(measured, range=replace(measured.range, step_tokens=256)), folder / "profile.json")
    assert ask(folder) == 0
    told = capsys.readouterr().out
    assert "not judged: 1 × mixed (cpu tp=1 pp=1) prompts-first" in told and "does not reach" in told


def test_a_profile_measured_anew_is_another_question(folder: Path) -> None:
    kept = ["--resume", str(folder / "kept.jsonl")]
    assert ask(folder, *kept) == 0
    first = (folder / "kept.jsonl").read_text()
    assert ask(folder, *kept) == 0
    assert (folder / "kept.jsonl").read_text() == first
    write_profile(profile(threads=2), folder / "profile.json")
    assert ask(folder, *kept) == 0
    assert (folder / "kept.jsonl").read_text() != first
