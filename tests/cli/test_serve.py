"""``distserve serve`` and the commands that talk to it: real processes, a tiny model, nothing left behind."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from distserve.cli.main import main
from distserve.launch.cluster import Cluster, ClusterFailed
from tests.tiny_models import make_tiny

SMALL = ["--kv-tokens", "8192", "--threads-per-rank", "1"]
BLOCKS = 512


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a length that an answer can be long enough to be asked about."""
    return make_tiny("llama", tmp_path_factory.mktemp("tiny"), max_position_embeddings=8192)


@pytest.fixture(scope="module")
def cluster(model: Path) -> Iterator[Cluster]:
    with Cluster(["--model", str(model), "--prefill", "1", "--decode", "1", *SMALL], start_timeout_s=120) as running:
        yield running


def command(cluster: Cluster, capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main([argv[0], "--server", cluster.grpc_address, *argv[1:]])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_ready_line_has_all_ports_and_processes(cluster: Cluster) -> None:
    ready = cluster.ready
    assert ready["event"] == "ready"
    assert ready["pid"] == cluster.process.pid
    assert [i["id"] for i in ready["instances"]] == ["prefill-0", "decode-0"]
    assert ready["pids"] == [ready["pid"], *(i["pid"] for i in ready["instances"])]
    for pid in ready["pids"]:
        os.kill(pid, 0)
    for port in (ready["http_port"], ready["grpc_port"], ready["controller_port"]):
        socket.create_connection(("127.0.0.1", port), timeout=5).close()


def test_the_ready_line_and_the_metrics_say_how_long_each_phase_of_the_start_took(cluster: Cluster) -> None:
    ready = cluster.ready
    assert set(ready["startup_s"]) == {"instances", "canary"}
    assert sum(ready["startup_s"].values()) <= ready["start_s"] + 0.01
    phases = ["python", "weights", "pool", "kernels", "data_plane", "join"]
    for instance in ready["instances"]:
        assert list(instance["startup_s"]) == phases
        assert all(seconds >= 0 for seconds in instance["startup_s"].values())
        assert instance["startup_s"]["python"] > 0.05  # torch alone takes longer to import
    with urllib.request.urlopen(f"{cluster.http_url}/metrics", timeout=30) as answer:
        page = answer.read().decode()
    shown = [line for line in page.splitlines() if line.startswith("distserve_startup_seconds{")]
    assert len(shown) == len(phases) * len(ready["instances"])


def test_ps_shows_the_instances(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = command(cluster, capsys, "ps", "--json")
    told = json.loads(out)
    assert code == 0 and told["ready"] is True
    assert {(i["id"], i["role"], i["connected"]) for i in told["instances"]} == {
        ("prefill-0", "ROLE_PREFILL", True),
        ("decode-0", "ROLE_DECODE", True),
    }
    assert {i["pid"] for i in told["instances"]} == set(cluster.ready["pids"][1:])
    _, table, _ = command(cluster, capsys, "ps")
    assert "prefill-0" in table and "the cluster is ready" in table


def test_generate_streams_an_answer_and_accounts_for_it(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["generate", "the quick brown fox", "--temperature", "0", "--max-tokens", "12", "--ignore-eos"]
    code, out, err = command(cluster, capsys, *asked)
    assert code == 0 and out
    assert "prefill  prefill-0#" in err and "decode   decode-0#" in err and "TTFT" in err
    _, out, _ = command(cluster, capsys, *asked, "--json", "--request-id", "mine")
    told = json.loads(out)
    assert told["usage"]["completion_tokens"] == 12
    assert told["finish_reason"] == "length"
    assert int(told["served"]["kv_bytes_moved"]) > 0


def test_a_prompt_may_come_from_standard_input(
    cluster: Cluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", StringIO("brown fox"))
    code, out, err = command(cluster, capsys, "generate", "-", "--max-tokens", "3", "--ignore-eos", "--quiet")
    assert (code, err) == (0, "")
    assert out.endswith("\n")


def test_chat_keeps_the_conversation(
    cluster: Cluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", StringIO("hello\n/stats\n/new\nagain\n/quit\n"))
    code, out, _ = command(cluster, capsys, "chat", "--max-tokens", "4", "--temperature", "0", "--plain")
    assert code == 0
    assert "prompt tokens" in out


def test_questions_about_requests_that_are_not_there(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("where", "cancel"):
        code, out, err = command(cluster, capsys, name, "nobody")
        assert (code, out) == (1, "")
        assert "nobody" in err


def test_a_running_request_can_be_asked_about_and_ended(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    body = {"model": cluster.ready["model"], "prompt": "fox", "max_tokens": 8000, "stream": True, "ignore_eos": True}
    headers = {"X-Request-Id": "long-one"}
    url = f"{cluster.http_url}/v1/completions"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers, method="POST")
    with urllib.request.urlopen(request, timeout=60) as answer:
        answer.readline()
        code, out, _ = command(cluster, capsys, "where", "long-one", "--json")
        told = json.loads(out)
        assert (code, told["request_id"]) == (0, "long-one")
        assert told["phase"] and told["owner"] and told["deadline_in_s"] > 0
        code, out, _ = command(cluster, capsys, "cancel", "long-one")
        assert (code, out) == (0, "long-one is cancelled\n")
        answer.read()
    code, _, err = command(cluster, capsys, "where", "long-one")
    assert code == 1 and "long-one" in err


def test_kvcheck_finds_every_block(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = command(cluster, capsys, "kvcheck", "--json")
    assert code == 0
    for instance in json.loads(out)["instances"]:
        assert instance["problem"] == ""
        assert sum(map(int, instance["by_state"].values())) == int(instance["total"]) == BLOCKS


def test_bench_measures_it(cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    argv = ["bench", "--url", cluster.http_url, "--model", cluster.ready["model"], "--rate", "10", "--duration", "1"]
    argv += ["--input-tokens", "8", "--output-tokens", "5", "--slo", "ttft=30,tpot=30", "--json", str(out), "--plain"]
    assert main(argv) == 0
    capsys.readouterr()
    results = json.loads(out.read_text())["results"]
    assert (results["requests"], results["failed"], results["output_tokens"]) == (10, 0, 50)
    assert results["attained"] == 1.0


def test_one_metrics_page_shows_all_processes(cluster: Cluster) -> None:
    with urllib.request.urlopen(f"{cluster.http_url}/metrics", timeout=30) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    names = [f.name for f in families]
    assert len(names) == len(set(names))
    values = {(s.name, s.labels.get("instance")): s.value for f in families for s in f.samples}
    for instance in ("prefill-0", "decode-0"):
        assert values["distserve_step_seconds_count", instance] > 0
        blocks = [s.value for f in families if f.name == "distserve_kv_blocks" for s in f.samples
                  if s.labels["instance"] == instance]  # fmt: skip
        assert sum(blocks) == BLOCKS
    assert values["distserve_kv_transfer_stored_bytes_total", "decode-0"] > 0
    assert values["distserve_time_to_first_token_seconds_count", None] > 0


def test_a_killed_instance_is_started_again_and_serves(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = command(cluster, capsys, "ps", "--json")
    before = {i["id"]: i for i in json.loads(out)["instances"]}
    os.kill(before["decode-0"]["pid"], signal.SIGKILL)
    deadline = time.monotonic() + 90
    after: dict[str, Any] = {}
    while after.get("decode-0", before["decode-0"])["incarnation"] == before["decode-0"]["incarnation"]:
        assert time.monotonic() < deadline, "it did not come back"
        code, _, _ = command(cluster, capsys, "generate", "brown fox", "--max-tokens", "4", "--ignore-eos")
        assert code in (0, 1), "served, or told to try again"
        _, out, _ = command(cluster, capsys, "ps", "--json")
        after = {i["id"]: i for i in json.loads(out)["instances"]}
        time.sleep(0.2)
    code, _, _ = command(cluster, capsys, "generate", "brown fox", "--max-tokens", "4", "--ignore-eos")
    assert code == 0
    assert after["decode-0"]["incarnation"] > before["decode-0"]["incarnation"]
    assert after["prefill-0"]["incarnation"] == before["prefill-0"]["incarnation"]


def test_a_port_in_use_is_a_sentence(cluster: Cluster, model: Path) -> None:
    """After the deaths above, so that the cluster's own state is of no importance."""
    done = serve_to_its_end("--model", str(model), "--http-port", str(cluster.ready["http_port"]), "--grpc-port", "0")
    assert done.returncode == 2
    assert "in use" in done.stderr and "--http-port" in done.stderr
    assert "Traceback" not in done.stderr


def serve_to_its_end(*arguments: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "distserve.cli", "serve", *SMALL, *arguments]
    try:
        return subprocess.run(argv, capture_output=True, text=True, timeout=100)
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"serve did not end: {(error.stderr or b'').decode()}") from error


def test_a_model_that_is_not_there_is_a_sentence() -> None:
    done = serve_to_its_end("--model", "no-such-model")
    assert done.returncode == 2
    assert "no-such-model" in done.stderr and "Traceback" not in done.stderr


def test_a_pool_that_does_not_fit_is_a_sentence(model: Path) -> None:
    done = serve_to_its_end("--model", str(model), "--mixed", "1", "--kv-tokens", "1_000_000_000_000")
    assert done.returncode == 1
    assert "a KV pool of 1000000000000 tokens needs" in done.stderr and "--kv-tokens auto" in done.stderr
    assert "Traceback" not in done.stderr


def test_narrow_kv_moves_to_ranks_in_pools_as_large_as_fit(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The canary is handed off from one rank to two; the pools are as large as a part of free memory, or a batch."""
    arguments = ["--model", str(model), "--prefill", "1", "--decode", "1", "--decode-tp", "2"]
    arguments += ["--kv-tokens", "auto", "--kv-memory-fraction", "0.001", "--kv-cache-dtype", "bfloat16"]
    with Cluster([*arguments, "--threads-per-rank", "1"], start_timeout_s=120) as cluster:
        code, out, _ = command(cluster, capsys, "ps", "--json")
        assert code == 0
        totals = {i["id"]: i["load"]["kv_total"] for i in json.loads(out)["instances"]}
        assert 0 < totals["prefill-0"] <= 64 * 8192 / 16
        assert totals["decode-0"] > 0
        phases = [list(i["startup_s"]) for i in cluster.ready["instances"]]
        assert phases[1] == ["python", "ranks", "weights", "pool", "kernels", "slowest_rank", "data_plane", "join"]


def test_a_corrupt_model_ends_serve_with_the_instances_words(model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in model.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = next(broken.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    done = serve_to_its_end("--model", str(broken), "--mixed", "1", "--http-port", "0", "--grpc-port", "0")
    assert done.returncode == 1
    assert "cannot start" in done.stderr and "Traceback" not in done.stderr


def ended(pidfds: list[int], within_s: float) -> bool:
    """Whether all these processes ended in time."""
    poll = select.poll()
    for fd in pidfds:
        poll.register(fd, select.POLLIN)
    left = len(pidfds)
    while left and (ready := poll.poll(within_s * 1000)):
        for fd, _ in ready:
            poll.unregister(fd)
            left -= 1
    return left == 0


def shared_memory() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if "distserve" in name}


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_behind(how: signal.Signals, model: Path, tmp_path: Path) -> None:
    before = shared_memory()
    journal = tmp_path / "journal"
    arguments = ["--model", str(model), "--mixed", "1", "--prefill", "1", *SMALL, "--journal", str(journal)]
    with Cluster(arguments, start_timeout_s=120) as cluster:
        joined = {instance["id"] for instance in cluster.ready["instances"]}
        assert joined == {"prefill-0", "mixed-0"}  # ready is said when all are there, not when the first can answer
        pidfds = [os.pidfd_open(pid) for pid in cluster.ready["pids"]]
        try:
            os.kill(cluster.ready["pid"], how)
            assert ended(pidfds, within_s=30.0)
        finally:
            for fd in pidfds:
                os.close(fd)
        assert cluster.process.wait(10) == (0 if how is signal.SIGTERM else -signal.SIGKILL)
    assert shared_memory() <= before
    if how is signal.SIGTERM:
        assert {p.name for p in journal.iterdir()} == {
            *("gateway.jsonl", "controller.jsonl", "prefill-0.jsonl", "mixed-0.jsonl")
        }


def test_a_request_under_way_is_finished_within_the_grace(model: Path) -> None:
    with Cluster(["--model", str(model), "--mixed", "1", *SMALL, "--grace", "60"], start_timeout_s=120) as cluster:
        url = f"{cluster.http_url}/v1/completions"
        body: dict[str, Any] = {"model": cluster.ready["model"], "prompt": "fox", "max_tokens": 150, "stream": True}
        request = urllib.request.Request(url, json.dumps(body | {"ignore_eos": True}).encode(), method="POST")
        with urllib.request.urlopen(request, timeout=60) as answer:
            answer.readline()
            cluster.process.send_signal(signal.SIGTERM)
            assert answer.read().rstrip().endswith(b"data: [DONE]")
        assert cluster.process.wait(60) == 0


def test_a_cluster_ends_with_whoever_started_it(model: Path) -> None:
    code = (
        "import sys, time; from distserve.launch.cluster import Cluster\n"
        "with Cluster(sys.argv[1:]) as c: print(*c.ready['pids'], flush=True); time.sleep(100)"
    )
    arguments = ["--model", str(model), "--mixed", "1", *SMALL]
    owner = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None
        pidfds = [os.pidfd_open(int(pid)) for pid in owner.stdout.readline().split()]
        assert len(pidfds) == 2
    finally:
        owner.kill()
        owner.wait(10)
        owner.stdout.close()
    assert ended(pidfds, within_s=30.0)
    for fd in pidfds:
        os.close(fd)


def test_a_cluster_that_does_not_come_up_is_told(tmp_path: Path) -> None:
    with pytest.raises(ClusterFailed, match="ended with code 2"), Cluster(["--model", str(tmp_path / "none")]):
        pass


def test_a_cluster_that_falls_silent_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It closed its output and goes on: told, and ended."""
    monkeypatch.setattr("distserve.launch.cluster.END_S", 0.1)
    silent = Cluster([])
    silent._command = [sys.executable, "-c", "import os, time; os.close(1); time.sleep(600)"]
    with pytest.raises(ClusterFailed, match="closed its output"), silent:
        pass
    assert silent.process.poll() is not None
