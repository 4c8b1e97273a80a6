"""plan.yaml: what is written is read back; what is wrong is refused; the command and its report."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import yaml

from distserve.cli import main
from distserve_planner.plan import (
    Load,
    Plan,
    PlannedInstance,
    PlannedLink,
    Prediction,
    Stage,
    Targets,
    as_text,
    plain,
    plan_of,
    read_plan,
    write_plan,
)
from distserve_planner.refusal import CannotPlan

PLAN = Plan(
    version=1,
    model="opt-13b",
    cluster="lab",
    pod="slice",
    algorithm="auto",
    objective="goodput",
    latency="distserve:a100-80g",
    policy="distserve",
    slo=Targets(0.25, 0.1, 0.9),
    load=Load("sharegpt", 4.0, 755.5, 190.25, 2000, 0),
    instances=(
        PlannedInstance("prefill-0", "prefill", "a100-80g", 2, 1, 163008, (Stage("n", (0, 1)),)),
        PlannedInstance("decode-0", "decode", "a100-80g", 1, 2, 163008, (Stage("n", (2,)), Stage("m", (0,)))),
    ),
    prediction=Prediction(0.95, 0.08, 0.2, 0.03, 0.05, 4.5, 4.3, 4.7, 4, 1.125),
    why="Disaggregate: because.",
    links=(PlannedLink("n NVLink", 2e9, 400e9),),
)


def test_a_plan_is_read_as_it_was_written(tmp_path: Path):
    write_plan(PLAN, tmp_path / "deep" / "plan.yaml")
    assert read_plan(tmp_path / "deep" / "plan.yaml") == PLAN
    text = as_text(PLAN)
    assert "n:2; m:0" in text and "n NVLink" in text and "0.5%" in text


def changed(**changes: object) -> dict[str, object]:
    return plain(PLAN) | changes


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (changed(version=2), "version 2 is not known"),
        (changed(instances=[]), "no instances"),
        (changed(instanses=[]), "did you mean 'instances'"),
        (changed(model=3), "plan.model: 3 is not of type str"),
        (changed(slo={"ttft_s": 0.2, "tpot_s": 0.1}), "plan.slo: 'attainment' is missing"),
        (changed(slo={"ttft_s": float("nan"), "tpot_s": 0.1, "attainment": 0.9}), "not of type float"),
        (changed(links={}), "a list is needed"),
        (changed(overflow_prefill_tokens=-1), "must not be negative"),
        (changed(instances=[plain(PLAN)["instances"][0]]), "needs prefill and decode"),
        (changed(instances=[plain(PLAN)["instances"][0]] * 2), "the same id"),
    ],
)
def test_a_bad_plan_is_refused_with_a_sentence(document, words):
    with pytest.raises(CannotPlan, match=words):
        plan_of(document)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"role": "prefil"}, "did you mean 'prefill'"),
        ({"tp": 4}, "needs 4 different GPUs"),
        ({"pp": 2}, "pp=2 but 1 stages"),
        ({"stages": [{"node": "n", "gpus": [1, 2]}]}, "GPU 2 of n is given to both"),
    ],
)
def test_an_instance_that_contradicts_itself_is_refused(change, words):
    document = plain(PLAN)
    document["instances"][0] |= change
    with pytest.raises(CannotPlan, match=words):
        plan_of(document)


def test_a_file_that_is_no_plan_is_refused(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("[1, 2]")
    with pytest.raises(CannotPlan, match="keys and values"):
        read_plan(tmp_path / "a.yaml")
    with pytest.raises(CannotPlan, match="cannot read"):
        read_plan(tmp_path / "none.yaml")
    with pytest.raises(CannotPlan, match="no instances"):
        write_plan(dataclasses.replace(PLAN, instances=()), tmp_path / "b.yaml")


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def asked(tmp_path: Path) -> list[str]:
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(yaml.safe_dump({"nodes": [{"gpu": "a100-80g", "gpus": 3, "name": "n"}]}))
    words = (
        f"plan --model opt-13b --cluster {cluster} --workload sharegpt --rate 2 --slo ttft=0.25,tpot=0.1,attainment=0.9"
    )
    return [
        *words.split(),
        *f"--profile distserve:a100-80g --requests 300 --final-requests 300 --out {tmp_path}/p.yaml".split(),
    ]


def test_the_command_writes_plan_table_and_json(asked, tmp_path, capsys):
    assert main([*asked, "--algorithm", "low", "--json", str(tmp_path / "o.json")]) == 0
    plan = read_plan(tmp_path / "p.yaml")
    assert plan.load.rate == 2.0 and plan.instances
    told = capsys.readouterr().out
    assert "compared (one unit)" in told and plan.why in told
    document = json.loads((tmp_path / "o.json").read_text())
    assert document["plan"] == plain(plan)
    kinds = {"mixed" in c for c in document["candidates"]}
    assert kinds == {True, False}  # colocated ones are in the same comparison


def test_the_report_is_one_file_with_its_plots_inside(asked, tmp_path):
    pytest.importorskip("matplotlib")
    assert main([*asked, "--algorithm", "low", "--report", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text()
    assert page.count("<svg") == 8 and page.count("<figcaption>") == 8
    assert "<h2>Classes of requests</h2>" not in page
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    assert "<script" not in page and "<link" not in page


def test_a_report_without_matplotlib_says_what_to_install(asked, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*asked, "--algorithm", "low", "--report", str(tmp_path / "r.html")]) != 0
    assert "distserve[report]" in capsys.readouterr().err
    assert (tmp_path / "p.yaml").exists()


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--model", "opt-13", "did you mean 'opt-13b'"),
        ("--workload", "sharegtp", "did you mean 'sharegpt'"),
        ("--rate", "-1", "must be above 0"),
        ("--slo", "ttft=0.2", "needs both limits"),
        ("--profile", "distserve:a100", "did you mean 'distserve:a100-80g'"),
        ("--algorithm", "middle", "known: auto, high, low"),
        ("--arrivals", "gama:2", "did you mean 'gamma:2'"),
        ("--arrivals", "varying:5=1", "must start at 0"),
        ("--requests", "0", "--requests: 0 is not a whole number of at least 2"),
        ("--workers", "0", "--workers: 0 is not a whole number of at least 1"),
        ("--unit-gpus", "-1", "--unit-gpus: -1 is not a whole number of at least 1"),
        ("--policy", "chunk", "did you mean 'chunked'"),
    ],
)
def test_bad_words_are_refused_with_a_sentence(asked, capsys, flag, value, words):
    asked[asked.index(flag) + 1 if flag in asked else len(asked) :] = (
        [value, *asked[asked.index(flag) + 2 :]] if flag in asked else [flag, value]
    )
    assert main(asked) != 0
    told = capsys.readouterr().err
    assert words in told and "Traceback" not in told
