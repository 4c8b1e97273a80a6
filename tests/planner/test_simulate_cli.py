"""``distserve simulate``: the document it writes, and what it says of bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distserve.cli.main import main

SPLIT = ["--prefill", "tp=2,pp=1,n=1", "--decode", "tp=1,pp=1,n=1"]
BASE = ["simulate", "--model", "opt-13b", "--profile", "distserve:a100-80g"]
SLO = ["--slo", "ttft=0.2,tpot=0.1"]


@pytest.fixture
def requests(tmp_path: Path) -> str:
    path = tmp_path / "requests.json"
    path.write_text(json.dumps([[700, 100, 0.9], [300, 1, 0.0], [50, 20, 0.5], [2000, 40, 0.905]]))
    return str(path)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


def test_the_document(requests: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    code, words, _ = run(capsys, *BASE, *SPLIT, "--requests", requests, *SLO, "--json", str(out))
    document = json.loads(out.read_text())
    assert code == 0
    assert document["attainment"] == 0.75, "the prompt of 2000 tokens waits for the one of 700"
    assert [set(r) for r in document["requests"]] == [{"ttft_ms", "tpot_ms"}] * 4
    ttft = [r["ttft_ms"] for r in document["requests"]]
    assert ttft[2] < ttft[1] < ttft[0] < ttft[3], "not in input order"
    assert document["requests"][1]["tpot_ms"] == 0.0
    assert "attainment 75.0% within 0.2 s and 0.1 s" in words


def test_mixed_instances_and_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, out = tmp_path / "t.jsonl", tmp_path / "out.json"
    rows = [{"arrival_s": i / 2, "input_tokens": 200, "output_tokens": 10} for i in range(20)]
    trace.write_text("\n".join(map(json.dumps, rows)))
    arguments = ["simulate", "--model", "opt-13b", "--profile", "vllm:a100-80g", "--mixed", "tp=1,n=2"]
    code, _, _ = run(capsys, *arguments, "--requests", str(trace), *SLO, "--json", str(out))
    assert code == 0
    assert json.loads(out.read_text())["attainment"] == 1.0


def test_the_policy_changes_the_batches(requests: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digests = set()
    for policy in ("distserve", "chunked", "vllm-2023"):
        out = tmp_path / f"{policy}.json"
        arguments = ["simulate", "--model", "opt-13b", "--profile", "vllm:a100-80g", "--mixed", "tp=1"]
        run(capsys, *arguments, "--policy", policy, "--requests", requests, *SLO, "--json", str(out))
        digests.add(json.loads(out.read_text())["digest"])
    assert len(digests) == 3


def test_a_request_that_fits_nowhere_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "r.json", tmp_path / "out.json"
    path.write_text("[[70000, 10, 0.0], [10, 10, 0.0]]")
    code, words, _ = run(capsys, *BASE, *SPLIT, "--requests", str(path), *SLO, "--json", str(out))
    refused = json.loads(out.read_text())["requests"][0]
    assert code == 0
    assert refused["ttft_ms"] is None
    assert "the largest instance holds 66144" in refused["refused"]
    assert "1 refused" in words


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (["--prefill", "tp=3"], "facebook/opt-13b at tp=3 (it has tp=1, 2, 4); the nearest covered: tp="),
        (["--profile", "distserve:b200"], "there is no profile 'distserve:b200'"),
        (["--model", "opt-7b"], "no data for model 'opt-7b'"),
        (["--prefill", "tp=2,gpus=4"], "--prefill: unknown key 'gpus'"),
        (["--prefill", "tp=two"], "--prefill tp: 'two' is not a whole number"),
        (["--prefill", ""], "give --prefill and --decode, or --mixed alone"),
        (["--mixed", "tp=1"], "give --prefill and --decode, or --mixed alone"),
        (["--policy", "vllm"], "there is no policy 'vllm'"),
        (["--slo", "ttft=0.2"], "needs both limits"),
        (["--overflow-prefill-tokens", "-1"], "--overflow-prefill-tokens: -1 is not a whole number of at least 0"),
        (["--max-mixed-tokens", "0"], "--max-mixed-tokens: 0 is not a whole number of at least 1"),
        (["--slo", "ttft=fast,tpot=1"], "is not a number"),
        (["--slo", "ttft=0.2,tpot=0.1,attainment=90"], "an attainment at most 1"),
        (["--requests", "/nowhere.json"], "cannot be read"),
        (["--rate", "-1"], "give one above 0"),
        (["--kv-bandwidth", "0"], "give a bandwidth above 0"),
        (["--json", "/nowhere/out.json"], "cannot be written"),
    ],
)
def test_bad_input_is_answered_in_a_sentence(
    requests: str, changed: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, *BASE, *SPLIT, "--requests", requests, *SLO, *changed)
    assert code == 1
    assert words in err
    assert len(err.strip().splitlines()) == 1
