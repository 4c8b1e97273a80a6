"""The report: classes, the time line of the chosen plan, and everything in one file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from distserve.cli.main import main
from distserve_planner.plan import TargetsOfClass, read_plan
from distserve_planner.report import classes_table

SHOWN = ("prefill queue", "prefill", "waits for room", "transfer", "decode queue", "decode")
"""In the key of the time line."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the plan and the report of two classes on three GPUs, phases apart."""
    pytest.importorskip("matplotlib")
    path = tmp_path_factory.mktemp("report")
    (path / "cluster.yaml").write_text("nodes: [{gpu: a100-80g, gpus: 3, name: n}]\n")
    words = f"plan --model opt-13b --cluster {path}/cluster.yaml --workload sharegpt --rate 3 --algorithm low"
    words += " --slo chat:ttft=0.25,tpot=0.1,max_prompt=1000 --slo long:ttft=1.5,tpot=0.2,attainment=0.8"
    words += " --profile distserve:a100-80g --mixed-profile vllm:a100-80g --requests 300 --final-requests 300"
    assert main([*words.split(), "--out", f"{path}/plan.yaml", "--report", f"{path}/report.html"]) == 0
    return path


def test_every_class_is_in_the_table_with_what_is_foretold(folder: Path) -> None:
    plan, page = read_plan(folder / "plan.yaml"), (folder / "report.html").read_text()
    assert "<h2>Classes of requests</h2>" in page
    for each, limits in zip(plan.slo_classes, (("≤ 0.25 s", "90%"), ("≤ 1.5 s", "80%")), strict=True):
        row = next(row for row in re.findall("<tr>.*?</tr>", page) if f"<td>{each.name}</td>" in row)
        assert all(word in row for word in (*limits, f"{each.predicted:.1%}", str(each.requests)))
    assert "Attainment of each class at the planned rate" in page


def test_the_time_line_has_every_part_of_every_request_shown(folder: Path) -> None:
    plan, page = read_plan(folder / "plan.yaml"), (folder / "report.html").read_text()
    assert {each.role for each in plan.instances} == {"prefill", "decode"}
    bars = re.findall(r'<g id="request-(\d+)-([a-z-]+)"', page)
    requests = {number for number, _ in bars}
    assert len(requests) == 40
    for part in ("prefill", "transfer", "decode"):
        assert {number for number, name in bars if name == part} == requests
    assert {name for _, name in bars} <= {word.replace(" ", "-") for word in SHOWN}
    for word in SHOWN:
        assert page.count(f">{word}</text>") == 2  # in the key of the time line, and of its beginning


def test_the_report_needs_nothing_from_elsewhere(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == page.count("<figcaption>") == 9
    assert "<script" not in page and "<link" not in page and "<img" not in page


def test_words_of_a_user_are_no_markup() -> None:
    table = classes_table([TargetsOfClass("<b>", 1.0, 0.1, 0.9, "", 5, 0.5)])
    assert "&lt;b&gt;" in table and "<b>" not in table and "missed" in table
    assert classes_table([]) == ""
