"""The README's form: its commands parse; its flags, files, tests and metrics are there; its limits are ours."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

from distserve.cli.commands import build_parser
from distserve.cli.parser import Usage
from distserve.launch.words import settings

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BENCH = (ROOT / "bench/README.md").read_text()
FOREIGN = {"--no-deps", "--nnodes", "--nproc-per-node"}
"""Flags of pip and torchrun."""


def commands() -> list[str]:
    """Every `distserve …` line of the README's shell blocks."""
    blocks = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    found = (re.match(r"(?:DISTSERVE_\w+=\S+ )?(distserve .*)", line) for line in lines)
    return [match[1] for match in found if match]


def subparsers() -> dict[str, argparse.ArgumentParser]:
    (subs,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(subs.choices)


@pytest.mark.parametrize("line", commands())
def test_a_command_parses(line: str) -> None:
    try:
        build_parser().parse_args(shlex.split(line, comments=True)[1:])
    except Usage as error:
        pytest.fail(f"{line}: {error}")


def test_there_are_commands() -> None:
    assert len(commands()) > 10


def test_every_flag_named_is_known() -> None:
    known = {flag for parser in subparsers().values() for action in parser._actions for flag in action.option_strings}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", README)) - known - FOREIGN == set()


def test_what_the_options_of_serve_default_to() -> None:
    """Where the table gives one flag and a plain value."""
    defaults = {setting.flag: setting.default for setting in settings("serve")}
    table = README[README.index("| option of `serve` |") :].split("\n\n")[0]
    told = re.findall(r"^\| `(--[a-z-]+)`[^|]*\|.*\| `?([\w.]+)`? \|$", table, re.MULTILINE)
    compared = {flag: value for flag, value in told if flag in defaults and value not in ("needed", "off", "no")}
    assert {"--dtype", "--transfer", "--grace", "--pin", "--kernels"} <= set(compared)
    for flag, value in compared.items():
        assert value == {"True": "on"}.get(str(defaults[flag]), str(defaults[flag]).removesuffix(".0")), flag


def test_the_table_of_limits_is_that_of_the_code() -> None:
    """Every limit of a client has a row; the numbers beside the flags are the defaults, in their order."""
    table = README[README.index("| limit | default |") :].split("\n\n")[0]
    flags = {s.path.removeprefix("limits."): s.flag for s in settings("gateway") if s.within == "limits"}
    assert set(flags.values()) == set(re.findall(r"`(--max-[a-z-]+|--[a-z]+-timeout|--keep-alive)`", table))
    rows = {*flags.values(), "--unread-limit"}
    defaults = {s.flag: s.default for s in settings("gateway") if s.flag in rows}
    for row in table.splitlines()[2:]:
        named, told, _ = (cell.strip() for cell in row.strip("|").split("|"))
        numbers = [_number(text) for text in re.findall(r"\d[\d,]*(?: [MK]iB)?", told)]
        expected = [defaults[flag] for flag in re.findall(r"--[a-z-]+", named) if defaults.get(flag)]
        assert numbers == expected, row


def _number(text: str) -> int:
    digits, _, unit = text.replace(",", "").partition(" ")
    return int(digits) << {"": 0, "KiB": 10, "MiB": 20}[unit]


def test_every_test_named_is_there() -> None:
    """Files and folders, and for `-k` a test of that name in the file before it."""
    for paths, word in re.findall(r"pytest(?: -m \w+)? ((?:tests/[\w/.]+ ?)+)(?:-k (\w+))?", README):
        for path in paths.split():
            assert (ROOT / path).exists(), path
            if word:
                assert re.search(rf"def test_\w*{word}", (ROOT / path).read_text()), f"{path} -k {word}"


@pytest.mark.parametrize("text", [README, BENCH], ids=["README", "bench"])
def test_files_targets_and_metrics_named_are_there(text: str) -> None:
    for script in set(re.findall(r"bench/\w+\.py", text)):
        assert (ROOT / script).is_file(), script
    for link in set(re.findall(r"\]\((bench/[^)]+)\)", text)):
        assert (ROOT / link).exists(), link
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"^make (\w+)|`make (\w+)`", text, re.MULTILINE)):
        assert re.search(rf"^{''.join(target)}:", makefile, re.MULTILINE), target
    metrics = "".join(p.read_text() for p in (ROOT / "distserve/observe").glob("*.py"))
    for name in set(re.findall(r"`distserve_(\w+?)(?:\{|`)", text)):
        assert name in metrics, name
