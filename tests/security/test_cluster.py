"""A whole cluster with everything on: real processes, TLS to clients, keys, and parts that take in nobody else."""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distserve.cli.main import main
from distserve.controller.options import ControllerOptions
from distserve.core.types import GatewayRef
from distserve.gateway.keys import Key, fresh_key, write_keys
from distserve.gateway.options import GatewayOptions
from distserve.gateway.process import gateway
from distserve.launch.cluster import Cluster
from distserve.v1.control_pb2_grpc import ControllerServiceStub
from distserve.wire.channels import Hello
from distserve.wire.security import SecurityOptions
from distserve.wire.stream import STREAM_ENDS, DialledStream
from tests.shells.cluster import ROOT, answer, request
from tests.tiny_models import make_tiny

SMALL = ["--kv-tokens", "8192", "--threads-per-rank", "1"]
READY_S = 120.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """The file, a user's key and an operator's."""
    path, user, operator = tmp_path_factory.mktemp("keys") / "keys", fresh_key(), fresh_key()
    write_keys(path, [Key.of("user", user), Key.of("operator", operator, admin=True)])
    return path, user, operator


@pytest.fixture(scope="module")
def served(model: Path, keys: tuple[Path, str, str], ours: Path) -> Iterator[Cluster]:
    arguments = ["--model", str(model), *SMALL, "--api-keys", str(keys[0])]
    arguments += ["--tls-cert", str(ours / "cert.pem"), "--tls-key", str(ours / "key.pem")]
    with Cluster(arguments, start_timeout_s=READY_S) as running:
        yield running


def test_clients_come_in_with_a_key_over_tls(served: Cluster, keys: tuple[Path, str, str], ours: Path) -> None:
    assert served.http_url.startswith("https://")
    context = ssl.create_default_context(cafile=ours / "ca.pem")
    body = json.dumps({"prompt": [5, 6, 7], "max_tokens": 3}).encode()
    headers = {"Authorization": f"Bearer {keys[1]}", "Content-Type": "application/json"}
    asked = urllib.request.Request(f"{served.http_url}/v1/completions", body, headers)
    with urllib.request.urlopen(asked, context=context, timeout=60) as got:
        told = json.loads(got.read())
        assert told["usage"]["completion_tokens"] == 3
        assert int(got.headers["X-Distserve-Kv-Bytes-Moved"]) > 0  # through prefill, hand-off and decode


def test_commands_speak_tls_and_send_the_key(
    served: Cluster, keys: tuple[Path, str, str], ours: Path, theirs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ca = ["--server", served.grpc_address, "--tls-ca", str(ours / "ca.pem")]
    assert main(["ps", *ca, "--api-key", keys[2], "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["instances"]) == 2
    assert main(["kvcheck", *ca, "--api-key", keys[2]]) == 0
    assert main(["generate", "Hello", *ca, "--api-key", keys[1], "--max-tokens", "3", "--quiet"]) == 0
    assert main(["ps", *ca, "--api-key", keys[1]]) == 1
    assert "distserve key create --admin" in capsys.readouterr().err
    assert main(["ps", *ca]) == 1
    assert "No API key was sent" in capsys.readouterr().err
    assert main(["ps", "--server", served.grpc_address, "--tls-ca", str(theirs / "ca.pem"), "--timeout", "2"]) == 1
    bench = ["--url", served.http_url, "--tls-ca", str(ours / "ca.pem"), "--api-key", keys[1], "--model"]
    bench += [served.ready["model"], "--num-requests", "2", "--concurrency", "1", "--input-tokens", "8"]
    assert main(["bench", *bench, "--output-tokens", "2", "--warmup", "0", "--plain"]) == 0


async def test_another_user_of_the_machine_cannot_join(served: Cluster) -> None:
    """The secret is drawn by ``serve``, and only its children have it: not on their command lines either."""
    for address in (f"127.0.0.1:{served.ready['controller_port']}", served.ready["instances"][0]["address"]):
        stream = DialledStream(address, ControllerServiceStub, "AttachGateway", Hello(GatewayRef("thief", 1)))
        with pytest.raises(STREAM_ENDS, match="this cluster has a secret"):
            await stream.accepted()
        await stream.close()


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_the_secret_is_on_no_command_line(served: Cluster) -> None:
    for pid in served.ready["pids"]:
        environ = Path(f"/proc/{pid}/environ").read_bytes()
        secrets = [word.partition(b"=")[2] for word in environ.split(b"\0") if word.startswith(b"DISTSERVE_CLUSTER_")]
        assert len(secrets) == (pid != served.process.pid)
        for secret in secrets:
            assert len(secret) > 32 and secret not in Path(f"/proc/{pid}/cmdline").read_bytes()


async def test_parts_alone_with_mutual_tls_and_a_secret(model: Path, ours: Path, tmp_path: Path) -> None:
    """Gateway and controller here, instances as processes of the command line; KV moves between them over gloo."""
    secret = tmp_path / "secret"
    assert main(["key", "secret", str(secret)]) == 0
    security = SecurityOptions(tls_dir=ours, cluster_secret_file=secret)
    options = GatewayOptions(model=str(model), model_name="tiny", http_port=None, grpc_port=None, security=security)
    async with gateway(options, ControllerOptions(security=security)) as running:
        with instances(model, running.controller_address, security, "prefill", "decode"):
            async with asyncio.timeout(READY_S):
                await running.ready.wait()
            tokens, end = await answer(running.shell, request("r", range(5, 45), 8))
            assert len(tokens) == 8 and end.account.timings.kv_bytes_moved > 0
            views = await running.shell.instances()
            assert [view.state for view in views] == ["ready", "ready"]
            assert not [report.problem for report in await running.shell.kv_check() if report.problem]


class instances:
    """Processes of ``distserve instance``, ended with the block."""

    def __init__(self, model: Path, controller: str, security: SecurityOptions, *roles: str) -> None:
        flags = ["--model", str(model), "--model-name", "tiny", "--controller", controller, "--kv-tokens", "8192"]
        flags += ["--transfer", "gloo", "--tls-dir", str(security.tls_dir), "--log-level", "warning"]
        flags += ["--cluster-secret-file", str(security.cluster_secret_file)]
        self._commands = [["instance", "--id", role, "--role", role, *flags] for role in roles]
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> None:
        paths = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "planner"))
        environ = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        for command in self._commands:
            self._processes.append(
                subprocess.Popen([sys.executable, "-m", "distserve.cli", *command], env=environ, cwd=ROOT)
            )

    def __exit__(self, *_: Any) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            try:
                process.wait(20)
            finally:
                process.kill()
