"""What the measurements share: layouts of clusters, processes of peers, and what every result says of itself."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import orjson

from distserve.loadgen.client import Client
from distserve.loadgen.http import Target
from distserve.loadgen.machine import hardware, versions
from distserve.loadgen.workload import Ask
from distserve.models.catalog import resolve_model

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PAIR = ("--prefill", "1", "--decode", "1", "--threads-per-rank", "1")
LAYOUTS: dict[str, tuple[str, ...]] = {
    "1p1d": PAIR,
    # prompts also read where they are decoded while prefill is behind; both numbers from simulating this workload
    "1p1d-overflow": (*PAIR, "--overflow-prefill-tokens", "512", "--max-mixed-tokens", "112"),
    "2mixed": ("--mixed", "2", "--threads-per-rank", "1"),
    "1mixed-2t": ("--mixed", "1", "--threads-per-rank", "2"),
}
"""Ways to spend two cores."""

PROMPT_TOKENS, OUTPUT_TOKENS = 256, 64
"""The reference workload's lengths."""


def serve_arguments(layout: str, model: str, dtype: str) -> list[str]:
    """Of ``distserve serve`` for a cluster under test. No prompt repeats, so a prefix cache could only cost."""
    return ["--model", model, "--dtype", dtype, *LAYOUTS[layout], "--kv-tokens", "32768", "--log-level", "warning"]


def client(url: str, model: str, **fields: Any) -> Client:
    return Client(Target.parse(url), model, timeout_s=600.0, **fields)


@contextmanager
def peer_process(command: str, target: Client, start_timeout_s: float = 900.0) -> Iterator[tuple[int, float]]:
    """Run a peer's shell command in a process group of its own, ended with the block: (pid, seconds until it answered).

    Ready is when a completion of 2 tokens works. Exits with the end of the peer's output when it does not get there.
    """
    hello = Ask("Hello, world", 2)
    if not asyncio.run(target.send(hello)).error:
        raise SystemExit(f"port {target.target.port} is taken: a server answers there before {command} was started")
    with tempfile.TemporaryFile() as log:
        began = time.perf_counter()
        process = subprocess.Popen(command, shell=True, stdout=log, stderr=log, start_new_session=True)
        try:
            while (error := asyncio.run(target.send(hello)).error) and process.poll() is None:
                if time.perf_counter() - began > start_timeout_s:
                    break
                time.sleep(1.0)  # somebody else's server: asking is all there is
            if error:
                log.seek(0)
                tail = log.read().decode(errors="replace")[-2000:]
                raise SystemExit(f"{command}: not ready ({error}); its output ended with\n{tail}")
            yield process.pid, time.perf_counter() - began
        finally:
            _end_group(process)


def _end_group(process: subprocess.Popen[bytes], patience_s: float = 20.0) -> None:
    """SIGTERM to the whole group, SIGKILL to what is left of it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(patience_s)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def tokenizer(model: str) -> Path:
    """The model's ``tokenizer.json``."""
    return resolve_model(model) / "tokenizer.json"


def commit() -> str:
    """What is measured: the checked-out commit, and whether the tree differs from it. Empty outside a checkout."""
    asked = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=False)
    return done.stdout.strip()


def command() -> str:
    """As typed from the checkout's root, whatever the machine's folders are called."""
    script = Path(sys.argv[0]).resolve()
    if script.is_relative_to(ROOT):
        script = script.relative_to(ROOT)
    if script.name == "__main__.py":
        return shlex.join(["python", "-m", ".".join(script.parent.parts), *sys.argv[1:]])
    return shlex.join(["python", str(script), *sys.argv[1:]])


def write(name: str, body: dict[str, Any]) -> Path:
    """One result document: what ran, when, on what; then the body."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    document = {
        "kind": "measured",
        "command": command(),
        "commit": commit(),
        "when": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": versions(),
        "hardware": hardware(),
        **body,
    }
    path.write_bytes(orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    print(f"written to {path}", flush=True)
    return path
