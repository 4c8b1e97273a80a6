"""Options from flags, environment and file: precedence, types, and what an unknown key is told."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from distserve.core.types import Role
from distserve.launch.settings import BadSetting, Words, build, nearest, read_file, resolve, settings_of


@dataclass(frozen=True, slots=True)
class Fine:
    lease_s: float = 10.0
    cache: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    model: str
    role: Role = Role.MIXED
    http_port: int | None = 8000
    share: float = 0.5
    keys: tuple[str, ...] = ()
    journal: Path | None = None
    verbose: bool = False
    fd: int | None = None
    fine: Fine = field(default_factory=Fine)


SETTINGS = settings_of(Options, Words(hidden={"fd": "not for people"}, keys={"Fine.lease_s": "ticket-lease"}))


def resolved(flags: dict[str, Any] | None = None, **sources: Any) -> Options:
    values = resolve(
        SETTINGS,
        flags={"model": "m"} | (flags or {}),
        environ=sources.get("environ", {}),
        file=sources.get("file", {}),
        also_known=("port",),
        section=sources.get("section", "serve"),
    )
    options = build(Options, values)
    assert isinstance(options, Options)
    return options


def test_every_field_but_the_hidden_is_an_option() -> None:
    assert [s.key for s in SETTINGS] == [
        *("model", "role", "http-port", "share", "keys", "journal", "verbose", "ticket-lease", "cache")
    ]
    by_key = {s.key: s for s in SETTINGS}
    assert by_key["http-port"].flag == "--http-port"
    assert by_key["http-port"].variable == "DISTSERVE_HTTP_PORT"
    assert by_key["ticket-lease"].path == "fine.lease_s"
    assert by_key["role"].choices == ("prefill", "decode", "mixed")
    assert by_key["model"].required


@dataclass(frozen=True, slots=True)
class Sized:
    tokens: int | None = None
    port: int | None = 1


def test_auto_is_a_word_for_nothing_only_where_it_means_something() -> None:
    settings = settings_of(Sized, Words(automatic=("tokens",)))

    def tokens(text: str) -> Any:
        return resolve(settings, flags={}, environ={}, file={"tokens": text})["tokens"]

    assert (tokens("auto"), tokens("none"), tokens("12")) == (None, None, 12)
    with pytest.raises(BadSetting, match="'auto' is not a whole number"):
        resolve(settings, flags={}, environ={}, file={"port": "auto"})


def test_a_flag_beats_the_environment_which_beats_the_file_which_beats_the_default() -> None:
    file = {"http_port": 1, "share": 0.1, "ticket-lease": 1}
    environ = {"DISTSERVE_HTTP_PORT": "2", "DISTSERVE_SHARE": "0.2", "PATH": "x"}
    assert resolved({"http_port": 3}, environ=environ, file=file).http_port == 3
    options = resolved(environ=environ, file=file)
    assert (options.http_port, options.share, options.fine.lease_s) == (2, 0.2, 1.0)
    assert resolved(file=file).share == 0.1
    assert resolved() == Options(model="m")


def test_a_flag_may_be_set_to_nothing() -> None:
    assert resolved({"http_port": None}).http_port is None


def test_values_of_every_type_are_read_alike_from_text_and_yaml() -> None:
    environ = {
        "DISTSERVE_ROLE": "decode",
        "DISTSERVE_HTTP_PORT": "none",
        "DISTSERVE_KEYS": "a, b",
        "DISTSERVE_JOURNAL": "/tmp/j",
        "DISTSERVE_VERBOSE": "yes",
        "DISTSERVE_CACHE": "off",
    }
    file = {"role": "decode", "http_port": None, "keys": ["a", "b"], "journal": "/tmp/j"}
    file |= {"verbose": True, "cache": False}
    expected = Options(
        model="m", role=Role.DECODE, http_port=None, keys=("a", "b"), journal=Path("/tmp/j"), verbose=True,
        fine=Fine(cache=False),
    )  # fmt: skip
    assert resolved(environ=environ) == expected
    assert resolved(file=file) == expected


def test_a_section_of_the_file_wins_for_its_command_alone() -> None:
    file = {"share": 0.1, "serve": {"share": 0.2}, "gateway": {"share": 0.3, "port": 5}}
    assert resolved(file=file).share == 0.2
    assert resolved(file=file, section="instance").share == 0.1


def test_keys_of_other_commands_are_allowed_and_ignored() -> None:
    assert resolved(file={"port": 7}, environ={"DISTSERVE_PORT": "9"}) == Options(model="m")


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        ({"file": {"http_prt": 1}}, r"unknown key 'http_prt' .*did you mean 'http-port'"),
        ({"file": {"gateway": {"shar": 1}}}, r"unknown key 'shar' .*section gateway.*did you mean 'share'"),
        ({"environ": {"DISTSERVE_HTTP_PRT": "1"}}, r"DISTSERVE_HTTP_PRT; did you mean 'DISTSERVE_HTTP_PORT'"),
        ({"environ": {"DISTSERVE_HTTP_PORT": "x"}}, r"DISTSERVE_HTTP_PORT: 'x' is not a whole number"),
        ({"file": {"share": "much"}}, r"share in the configuration file: 'much' is not a number"),
        ({"file": {"verbose": "maybe"}}, r"neither yes nor no"),
        ({"file": {"role": "cook"}}, r"'cook' is none of prefill, decode, mixed"),
    ],
)
def test_what_cannot_be_used_is_said_in_a_sentence(sources: dict[str, Any], words: str) -> None:
    with pytest.raises(BadSetting, match=words):
        resolved(**sources)


def test_a_missing_value_names_all_three_ways_to_give_it() -> None:
    with pytest.raises(BadSetting, match=r"--model is needed \(or DISTSERVE_MODEL, or model: in the file\)"):
        resolve(SETTINGS, flags={}, environ={}, file={})


def test_a_word_far_from_everything_gets_no_guess() -> None:
    assert nearest("zzzz", ["http-port"]) == ""


@pytest.mark.parametrize(
    ("content", "words"), [("- 1", "must hold a mapping"), ("a: [", "not valid YAML"), (None, "cannot read")]
)
def test_a_file_that_is_none(tmp_path: Path, content: str | None, words: str) -> None:
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(BadSetting, match=words):
        read_file(path)


def test_an_empty_file_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("# nothing\n")
    assert read_file(tmp_path / "c.yaml") == {}


def test_build_keeps_defaults_of_what_has_no_value() -> None:
    assert build(Options, {"model": "m", "fine.cache": False}) == Options(model="m", fine=Fine(cache=False))
    assert dataclasses.fields(Options)
