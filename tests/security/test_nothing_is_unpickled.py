"""Nothing that came over a network, or lies in a model's directory, may name code to run."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "jsonpickle"}
NETWORK_PICKLES = {
    "multiprocessing.connection.Client", "multiprocessing.connection.Listener", "multiprocessing.managers",
    "torch.distributed.rpc",
}  # fmt: skip
"""Between a process and its own children, over an inherited pipe, it may be; there is no stranger at the other end."""

CALLS = {"eval", "exec", "__import__", "compile"}
OBJECT_COLLECTIVES = {
    "all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list", "send_object_list",
    "recv_object_list", "monitored_barrier",
}  # fmt: skip
PRODUCT = [path for root in ("distserve", "kernels", "planner") for path in sorted((ROOT / root).rglob("*.py"))]


def forbidden(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, what) of everything that would run what a byte string says."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            names += [alias.name for alias in node.names if alias.name in OBJECT_COLLECTIVES]
        else:
            names = []
        for name in names:
            if name.split(".")[0] in MODULES or name in NETWORK_PICKLES | OBJECT_COLLECTIVES:
                yield node.lineno, f"import {name}"
        if isinstance(node, ast.Attribute) and node.attr in OBJECT_COLLECTIVES:
            yield node.lineno, node.attr
        if isinstance(node, ast.Call):
            yield from ((node.lineno, what) for what in called(node))


def called(node: ast.Call) -> Iterator[str]:
    name = ast.unparse(node.func)
    keywords = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
    if name.endswith(("connection.Client", "connection.Listener")):
        yield name
    if name in CALLS:
        yield name
    if name == "torch.load" and keywords.get("weights_only") is not True:
        yield "torch.load without weights_only=True"
    if name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"):
        yield name
    if keywords.get("allow_pickle") is True:
        yield "allow_pickle=True"
    if keywords.get("trust_remote_code") is True:
        yield "trust_remote_code=True"
    if keywords.get("shell") is True:
        yield "shell=True"


def test_the_product_has_none_of_it() -> None:
    assert len(PRODUCT) > 150
    found = [
        f"{path.relative_to(ROOT)}:{line}: {what}"
        for path in PRODUCT
        for line, what in forbidden(ast.parse(path.read_text()))
    ]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "import dill as d",
        "from multiprocessing.connection import Client",
        "multiprocessing.connection.Listener(address)",
        "from multiprocessing import managers",
        "from torch.distributed import rpc",
        "dist.broadcast_object_list(x)",
        "from torch.distributed import all_gather_object",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=L)",
        "eval(text)",
        "AutoTokenizer.from_pretrained(path, trust_remote_code=True)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_the_check_can_fail(line: str) -> None:
    assert list(forbidden(ast.parse(line)))


@pytest.mark.parametrize(
    "line", ["torch.load(path, weights_only=True)", "yaml.safe_load(text)", "model.eval()", "re.compile(x)"]
)
def test_the_check_lets_pass_what_is_sound(line: str) -> None:
    assert not list(forbidden(ast.parse(line)))
