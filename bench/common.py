"""What the measurements share: layouts of clusters under test, where results go, what every result says of itself."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import orjson

from distserve.loadgen.client import Client
from distserve.loadgen.http import Target
from distserve.loadgen.machine import hardware, versions
from distserve.models.catalog import resolve_model

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
LAYOUTS: dict[str, tuple[str, ...]] = {
    "1p1d": ("--prefill", "1", "--decode", "1", "--threads-per-rank", "1"),
    "2mixed": ("--mixed", "2", "--threads-per-rank", "1"),
    "1mixed-2t": ("--mixed", "1", "--threads-per-rank", "2"),
}
"""Three ways to spend two cores."""

PROMPT_TOKENS, OUTPUT_TOKENS = 256, 64
"""The reference workload's lengths."""


def serve_arguments(layout: str, model: str, dtype: str) -> list[str]:
    """Of ``distserve serve`` for a cluster under test. No prompt repeats, so a prefix cache could only cost."""
    return ["--model", model, "--dtype", dtype, *LAYOUTS[layout], "--kv-tokens", "32768", "--log-level", "warning"]


def client(url: str, model: str, **fields: Any) -> Client:
    return Client(Target.parse(url), model, timeout_s=600.0, **fields)


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
