"""The rules of the house: who imports whom, how long a file may be, what words stay out, which options are promised."""

from __future__ import annotations

import argparse
import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from distserve.cli.commands import build_parser
from distserve.launch.words import settings

ROOT = Path(__file__).resolve().parent.parent
GENERATED = ("distserve/v1", "distserve/oip")
LONGEST_FILE = 500
LONGEST_FUNCTION = 70
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|HACK|NotImplementedError)\b")
MACHINES = re.compile(r"(?<![\w.])/(work|root|home|opt)/\w")

PROMISED = {
    "serve": (
        "--model --prefill --decode --mixed --dtype --http-port --grpc-port --transfer --threads-per-rank --kv-tokens "
        "--kv-cache-dtype --kv-memory-fraction --max-model-len "
        "--block-size --print-ready --grace --model-name --tokenizer --device --host --controller-port "
        "--api-keys --default-timeout --unread-limit --canary --canary-timeout --start-timeout --restart --journal "
        "--kernels --cuda-graphs --step-timeout --log-level --config --check-config --open-metrics --public-tls-dir "
        "--tp --pp --prefill-tp --prefill-pp --decode-tp --decode-pp --rank-timeout --pin --steps-in-flight"
    ),
    "bench": (
        "--url --model --requests --rate --duration --slo --json --goodput --concurrency --num-requests --input-tokens "
        "--output-tokens --tokenizer --tolerance --max-rate --min-requests --max-requests --api-key --timeout --warmup "
        "--seed --temperature --no-ignore-eos --count-empty --extra --server-pid --plain"
    ),
    "generate": (
        "--chat --system --ignore-eos --request-id --json --quiet --model --max-tokens --temperature --top-p --top-k "
        "--min-p --seed --stop --server --api-key --timeout --plain"
    ),
    "ps": "--json --server --api-key --timeout --plain",
    "kvcheck": "--idle --json --server --api-key --timeout --plain",
}
"""Options that scripts may rely on. Adding one is free; taking one away, or renaming it, breaks somebody."""


def sources(*roots: str) -> list[Path]:
    found = [path for root in roots for path in (ROOT / root).rglob("*.py")]
    return [p for p in sorted(found) if not any(p.is_relative_to(ROOT / g) for g in GENERATED)]


PRODUCT = sources("distserve", "kernels", "planner")
EVERYTHING = [*PRODUCT, *sources("tests", "bench", "protos")]


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_imports_run_downward_only() -> None:
    """The contracts of setup.cfg."""
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports('setup.cfg', no_cache=True))"
    paths = os.pathsep.join(str(ROOT / p) for p in (".", "kernels", "planner"))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_file_of_the_product_is_too_long() -> None:
    lengths = {named(p): len(p.read_text().splitlines()) for p in PRODUCT}
    assert {name: n for name, n in lengths.items() if n > LONGEST_FILE} == {}


def functions(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{named(path)}:{node.name}", (node.end_lineno or node.lineno) - node.lineno + 1


def test_no_function_of_the_product_is_too_long() -> None:
    assert {name: n for p in PRODUCT for name, n in functions(p) if n > LONGEST_FUNCTION} == {}


def test_nothing_is_left_unfinished_and_no_machine_is_named() -> None:
    here = Path(__file__)
    texts = {named(p): p.read_text() for p in EVERYTHING if p != here}
    assert [name for name, text in texts.items() if UNFINISHED.search(text)] == []
    assert [name for name, text in texts.items() if MACHINES.search(text)] == []


def test_every_module_of_the_product_says_what_it_is() -> None:
    trees = {named(p): ast.parse(p.read_text()) for p in PRODUCT}
    assert [name for name, tree in trees.items() if tree.body and ast.get_docstring(tree) is None] == []


def test_circles_are_not_broken_by_a_trick() -> None:
    assert [named(p) for p in PRODUCT if "TYPE_CHECKING" in p.read_text()] == []


def test_every_module_can_be_imported_and_none_speaks_while_it_is() -> None:
    code = (
        "import importlib, pkgutil, distserve\n"
        "for m in pkgutil.walk_packages(distserve.__path__, 'distserve.'):\n"
        "    if not m.name.endswith('__main__'): importlib.import_module(m.name)\n"
    )
    paths = os.pathsep.join(str(ROOT / p) for p in (".", "kernels", "planner"))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True,
        timeout=170,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("command", PROMISED)
def test_promised_options_are_there(command: str) -> None:
    (subs,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    flags = {flag for action in subs.choices[command]._actions for flag in action.option_strings}
    assert set(PROMISED[command].split()) - flags == set()


def test_new_options_of_serve_are_promised_too() -> None:
    own = {s.flag for s in settings("serve") if not s.within}
    assert own - set(PROMISED["serve"].split()) == set()


def test_setup_cfg_is_the_law_of_imports_and_nothing_else() -> None:
    heads = re.findall(r"^\[([^\]]+)\]", (ROOT / "setup.cfg").read_text(), re.MULTILINE)
    assert heads and all(head.startswith("importlinter") for head in heads)
