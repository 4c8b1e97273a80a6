"""The command line as a person meets it: help, wrong words, configuration, completion."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
import yaml

from distserve.cli.cert import replace_file
from distserve.cli.commands import COMMANDS, build_parser
from distserve.cli.completion import script
from distserve.cli.main import main
from distserve.cli.paint import Paint, amount, span, table
from distserve.cli.servers import options_of
from distserve.core.types import Role
from distserve.instance.options import InstanceOptions
from distserve.launch.options import BadOptions, ServeOptions, served_name
from distserve.launch.settings import build
from distserve.launch.words import HELPS, SERVERS, all_keys, flags_of, settings
from distserve.sched.config import InstanceConfig
from distserve_kernels.cores import usable_cores


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    try:
        code = main(argv)
    except SystemExit as error:  # argparse's own --help and --version
        code = int(error.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_help_tells_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert all(name in out and command.help in out for name, command in COMMANDS.items())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_without_starting_anything(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, name, "--help")
    assert code == 0
    assert out.startswith(f"usage: distserve {name}")


def test_no_command_is_wrong_use(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys)
    assert code == 2
    assert "commands:" in out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["srve"], "unknown command 'srve'; did you mean 'serve'?"),
        (["serve", "--modle", "x"], "unknown argument '--modle'; did you mean '--model'?"),
        (["serve", "--model", "x", "--dtype", "float31"], "did you mean 'float32'?"),
        (["serve", "--model", "x", "--prefill", "one"], "'one' is not a whole number"),
        (["serve"], "--model is needed"),
        (["serve", "--model", "x", "--prefill", "1"], "no instance could write an answer"),
        (["serve", "--model", "x", "--decode", "1"], "no instance could read a prompt"),
        (["serve", "--model", "x", "--prefill", "-1", "--decode", "1"], "between 0 and 64"),
        (["serve", "--model", "x", "--http-port", "none", "--grpc-port", "none"], "nobody could ask"),
        (["serve", "--model", "x", "--http-port", "80", "--grpc-port", "80"], "are the same"),
        (["serve", "--model", "x", "--http-port", "70000"], "between 0 (any) and 65535"),
        (["serve", "--model", "x", "--kv-tokens", "8"], "not one block of 16 tokens"),
        (["serve", "--model", "x", "--kv-tokens", "many"], "'many' is not a whole number"),
        (["serve", "--model", "x", "--kv-memory-fraction", "1.5"], "a part of 1 is needed"),
        (["serve", "--model", "x", "--kv-cache-dtype", "fp8"], "'fp8' is none of auto, float32"),
        (["serve", "--model", "x", "--threads-per-rank", "0"], "at least 1"),
        (["serve", "--model", "x", "--transfer", "nccl"], "needs --device cuda"),
        (["serve", "--model", "x", "--transfer", "ipc"], "--transfer ipc needs --device cuda"),
        (["serve", "--model", "x", "--config", "/nowhere.yaml"], "cannot read the configuration file"),
        (["bench", "--url", "ftp://x", "--model", "m", "--rate", "1", "--duration", "1"], "no http:// or https://"),
        (["bench", "--url", "x", "--model", "m"], "nothing to run"),
        (["bench", "--url", "x", "--model", "m", "--rate", "0", "--duration", "1"], "--rate 0"),
        (["bench", "--url", "x", "--model", "m", "--rate", "1"], "--rate needs --duration"),
        (["bench", "--url", "x", "--model", "m", "--concurrency", "1"], "needs --num-requests"),
        (["bench", "--url", "x", "--model", "m", "--slo", "ttf=1"], "'ttf' is no latency target"),
        (["bench", "--url", "x", "--model", "m", "--extra", "[1]"], "must be a JSON object"),
        (["model", "pth", "x"], "did you mean 'path'?"),
    ],
)
def test_wrong_use_is_told_in_a_sentence(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *argv)
    assert code == 2
    assert words in err
    assert "Traceback" not in err
    assert not out


def test_an_unknown_model_and_an_absent_gateway_fail_with_advice(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "model", "path", "no-such-model")
    assert code == 1
    assert "no-such-model" in err and "directory" in err
    code, _, err = run(capsys, "ps", "--server", "127.0.0.1:1", "--timeout", "0.2")
    assert code == 1
    assert "distserve serve" in err


def test_model_path_prints_a_directory_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "model", "path", str(tmp_path)) == (0, f"{tmp_path}\n", "")


def test_configuration_is_shown_and_what_is_shown_can_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("model: a-model\nmax-waiting: 7\nserve:\n  mixed: 2\ninstance:\n  id: x\n")
    monkeypatch.setenv("DISTSERVE_CONFIG", str(config))
    monkeypatch.setenv("DISTSERVE_GRACE", "3")
    code, out, _ = run(capsys, "serve", "--check-config", "--http-port", "0", "--no-prefix-cache")
    assert code == 0
    shown = yaml.safe_load(out)
    assert (shown["model"], shown["mixed"], shown["http_port"], shown["grace_s"]) == ("a-model", 2, 0, 3.0)
    assert (shown["instance"]["max_waiting"], shown["instance"]["prefix_cache"]) == (7, False)


@pytest.mark.parametrize("command", SERVERS)
def test_every_option_has_a_key_of_its_own_and_help(command: str) -> None:
    known = settings(command)
    keys = [s.key for s in known]
    assert len(keys) == len(set(keys))
    assert [s.key for s in known if not s.help] == []
    assert set(keys) <= set(all_keys())


def test_no_help_is_left_of_options_that_are_gone() -> None:
    fields = {name for command in SERVERS for s in settings(command) for name in [s.path.rpartition(".")[2]]}
    assert [key for key in HELPS if key.rpartition(".")[2] not in fields] == []


def test_flags_make_the_same_options_again() -> None:
    options = InstanceOptions(
        id="p0", model="m", model_name="n", controller="h:1", role=Role.PREFILL, ops_port=0, max_model_len=None,
        journal=Path("/tmp/j"), machine=InstanceConfig(prefix_cache=False, lease_s=3.0, max_waiting=5),
    )  # fmt: skip
    parsed = build_parser().parse_args(["instance", *flags_of("instance", options)])
    assert options_of("instance", parsed, environ={}) == options


def test_cores_that_are_not_ours_are_refused_with_a_sentence() -> None:
    strange = max(usable_cores()) + 1
    options = InstanceOptions(id="i", model="m", model_name="m", controller="127.0.0.1:1", cores=(strange,))
    with pytest.raises(ValueError, match=f"this process may not run on {strange}"):
        options.check()


def test_defaults_of_serve_are_one_prefill_and_one_decode() -> None:
    options = ServeOptions(model="/models/tiny/")
    options.check()
    assert options.instances == (("prefill-0", Role.PREFILL), ("decode-0", Role.DECODE))
    assert options.name == "tiny"
    assert options.threads >= 1
    with pytest.raises(BadOptions):
        ServeOptions(model="m", prefill=65, decode=1).check()
    four = ServeOptions(model="m", prefill=1, decode=1, mixed=2, threads_per_rank=3)
    assert ServeOptions(model="m", pin=False).cores == {"prefill-0": (), "decode-0": ()}
    crowded = ServeOptions(model="m", prefill=1, decode=1, decode_tp=2, threads_per_rank=len(usable_cores()))
    assert crowded.cores == {"prefill-0": (), "decode-0": ()}
    assert [i for i, _ in four.instances] == ["prefill-0", "decode-0", "mixed-0", "mixed-1"]
    assert four.threads == 3


def test_every_rank_has_cores_of_its_own_where_they_suffice(monkeypatch) -> None:
    monkeypatch.setattr("distserve.launch.options.usable_cores", lambda: (0, 1, 2, 5, 6, 7))
    two = ServeOptions(model="m", prefill=1, decode=1, decode_tp=2)
    assert two.threads == 2
    assert two.cores == {"prefill-0": (0, 1), "decode-0": (2, 5, 6, 7)}
    alone = ServeOptions(model="m", mixed=1, tp=2, threads_per_rank=1)
    assert alone.cores == {"mixed-0": (0, 1)}
    assert ServeOptions(model="m", mixed=1, threads_per_rank=1).cores == {"mixed-0": ()}


@pytest.mark.parametrize(
    ("model", "name"),
    [("smollm2-135m", "smollm2-135m"), ("/a/b/", "b"), ("random:/x/llama/config.json", "llama"), ("m.gguf", "m.gguf")],
)
def test_a_model_is_called_by_its_last_name(model: str, name: str) -> None:
    assert served_name(model) == name


def test_build_of_options_from_nothing_but_what_is_needed() -> None:
    assert build(ServeOptions, {"model": "m"}) == ServeOptions(model="m")


# ── completion ───────────────────────────────────────────────────────────────────────────────────────────────────────


def bash_completes(words: list[str]) -> list[str]:
    source = script(build_parser(), "bash")
    typed = " ".join(f"'{w}'" for w in words)
    asked = f"COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; _distserve"
    program = f"{source}\n{asked}; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.split()


def test_bash_completes_commands_flags_and_choices() -> None:
    assert bash_completes(["distserve", "ge"]) == ["generate"]
    assert "kvcheck" in bash_completes(["distserve", ""])
    assert bash_completes(["distserve", "serve", "--http"]) == ["--http-port"]
    assert bash_completes(["distserve", "serve", "--transfer", "g"]) == ["gloo"]
    assert bash_completes(["distserve", "model", "pa"]) == ["path"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_are_told_every_command_and_flag(shell: str) -> None:
    made = script(build_parser(), shell)
    assert all(name in made for name in COMMANDS)
    assert "print-ready" in made
    assert "parent-fd" not in made, "hidden flags are nobody's to type"


# ── looks ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def test_colour_only_on_a_terminal_that_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert Paint(Terminal())("x", "red") == "\x1b[31mx\x1b[0m"
    assert Paint(Terminal(), plain=True)("x", "red") == "x"
    assert Paint(StringIO())("x", "red") == "x"
    monkeypatch.setenv("NO_COLOR", "1")
    assert Paint(Terminal())("x", "red") == "x"


def test_numbers_are_set_flush_right() -> None:
    made = table(("name", "n"), [("a", "1"), ("bb", "100")], Paint(StringIO()))
    assert made.splitlines() == ["name    n", "a       1", "bb    100"]


def test_amounts_and_spans_read_well() -> None:
    assert [amount(n) for n in (12, 5_600_000)] == ["12 B", "5.6 MB"]
    assert [span(s) for s in (0.00085, 0.0123, 1.25, 250.0)] == ["850 µs", "12.3 ms", "1.25 s", "250 s"]


def test_help_needs_neither_torch_nor_grpc() -> None:
    code = (
        "import sys; from distserve.cli.main import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'grpc', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"


def test_parsers_know_their_own_flags() -> None:
    parser = build_parser()
    assert isinstance(parser, argparse.ArgumentParser)
    assert parser.parse_args(["bench", "--url", "u", "--model", "m"]).command == "bench"


def test_a_record_that_fails_leaves_an_older_trace_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "seen.jsonl"
    trace.write_text("of another day")
    code, _, err = run(capsys, "record", "--out", str(trace), "--server", "127.0.0.1:1", "--timeout", "0.2")
    assert (code, "no gateway answers" in err, trace.read_text()) == (1, True, "of another day")


def test_half_written_keys_of_certificates_are_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "not permitted", "key.pem")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError):
        replace_file(tmp_path / "key.pem", b"secret")
    assert list(tmp_path.iterdir()) == []
