"""Several classes of requests, each with limits of its own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from distserve.cli.main import main
from distserve_planner.refusal import CannotPlan
from distserve_planner.selection.rates import Outcome, Point, goodput
from distserve_planner.slo import SloClasses, parse_slos
from distserve_planner.workload import Job

TWO = ["chat:ttft=0.2,tpot=0.05,attainment=0.9,max_prompt=500", "batch:ttft=5,tpot=1,attainment=0.5"]


def test_a_request_goes_to_the_class_it_names_else_by_its_length() -> None:
    jobs = [Job(100, 10, 0.0), Job(800, 10, 0.0), Job(800, 10, 0.0, slo_class="chat"), Job(9, 9, 0.0, slo_class="?")]
    assert parse_slos(TWO).kinds(jobs).tolist() == [0, 1, 0, 0]


def test_one_target_without_a_name_is_for_all() -> None:
    classes = parse_slos(["ttft=0.2,tpot=0.1"])
    assert not classes.several
    assert classes.loosest.attainment == 0.9
    assert classes.kinds([Job(1, 1, 0.0, slo_class="chat")]).tolist() == [0]


def test_the_loosest_is_looser_than_every_class() -> None:
    slo = parse_slos(TWO).loosest
    assert (slo.ttft_s, slo.tpot_s, slo.attainment) == (5.0, 1.0, 0.5)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["ttft=1,tpot=1", "ttft=2,tpot=1"], "need a name each"),
        (["a:ttft=1,tpot=1", "a:ttft=2,tpot=1"], "'a' is given twice"),
        ([":ttft=1,tpot=1"], "no name before its colon"),
        (["a:ttft=1,tpot=1,prompt=5"], "unknown key 'prompt'"),
        (["a:ttft=1,tpot=1,max_prompt=x"], "not a whole number of tokens"),
        (["a:ttft=1"], "needs both limits"),
        (["ttft=1,tpot=1,max_prompt=4"], "unknown key 'max_prompt'"),
    ],
)
def test_bad_classes_are_refused(texts: list[str], words: str) -> None:
    with pytest.raises(CannotPlan, match=words):
        parse_slos(texts)


def test_a_request_of_no_class_is_refused() -> None:
    with pytest.raises(CannotPlan, match=r"request 2 \(900 prompt .* belongs to no class"):
        parse_slos([TWO[0]]).kinds([Job(5, 5, 0.0), Job(900, 5, 0.0)])


def outcome(classes: SloClasses, shares: list[float], n: int = 400) -> Outcome:
    """Of each class, the share of its requests that met both limits, evenly spread."""
    kinds = np.arange(n) % len(shares)
    place = np.arange(n) // len(shares) / (n // len(shares))
    met = (place * 97 % 1.0) < np.array(shares)[kinds]
    return Outcome(met, np.ones(n, bool), kinds, tuple(c.slo.attainment for c in classes.classes))


@pytest.mark.parametrize(("shares", "meets"), [((0.95, 0.6), True), ((0.85, 1.0), False), ((1.0, 0.4), False)])
def test_a_rate_meets_the_targets_when_every_class_does(shares: tuple[float, float], meets: bool) -> None:
    classes = parse_slos(TWO)
    point = Point.of(1.0, outcome(classes, list(shares)))
    assert (point.attainment >= classes.loosest.attainment) is meets


def test_goodput_is_that_of_the_class_that_falls_first() -> None:
    classes = parse_slos(TWO)

    def trial(rate: float) -> Outcome:
        return outcome(classes, [float(np.clip(1.9 - rate, 0, 1)), float(np.clip(3 - rate, 0, 1))], 2000)

    assert goodput(trial, classes.loosest.attainment, 0.5).rate == pytest.approx(1.0, rel=0.05)


def test_simulate_tells_each_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, out = tmp_path / "t.jsonl", tmp_path / "out.json"
    rows = [{"arrival_s": i / 2, "input_tokens": 200, "output_tokens": 10, "slo_class": "ab"[i % 2]} for i in range(20)]
    trace.write_text("\n".join(map(json.dumps, rows)))
    slo = ["--slo", "a:ttft=0.001,tpot=0.1", "--slo", "b:ttft=9,tpot=1"]
    arguments = ["simulate", "--model", "opt-13b", "--profile", "vllm:a100-80g", "--mixed", "tp=1,n=2", *slo]
    assert main([*arguments, "--requests", str(trace), "--json", str(out)]) == 0
    document = json.loads(out.read_text())
    assert document["attainment"] == 0.5
    assert {k: (v["attainment"], v["met"]) for k, v in document["classes"].items()} == {
        "a": (0.0, False),
        "b": (1.0, True),
    }
    assert [r["class"] for r in document["requests"]] == ["a", "b"] * 10
    assert "b: 100.0% of 10, target 90% met" in capsys.readouterr().out
