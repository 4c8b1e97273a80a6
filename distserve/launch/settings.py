"""Options from flags, environment and one YAML file, in that order of weight, onto a frozen dataclass.

A field ``http_port`` is the flag ``--http-port``, the variable ``DISTSERVE_HTTP_PORT`` and the key ``http-port`` (or
``http_port``) of the file; a field in seconds drops its ``_s``; the fields of a dataclass within are options beside the
others. An unknown key is an error that names the nearest known one. Knows no command, reads no environment by itself.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from distserve.core.documents import parse_yaml

PREFIX = "DISTSERVE_"
CONFIG_VARIABLE = PREFIX + "CONFIG"
SECRET_VARIABLE = PREFIX + "CLUSTER_SECRET"
_YES, _NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
_NOTHING = ("none", "off", "null", "")


class BadSetting(ValueError):
    """An option that is unknown, missing or cannot be read; the text is for the user."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One option of a command. ``parse`` turns the text of a flag, a variable or a file into the field's value.

    ``path`` leads to the field, through dataclasses within: ``machine.max_waiting``.
    """

    path: str
    key: str  # as in a file: ``http-port``
    parse: Callable[[str], Any]
    default: Any = dataclasses.MISSING
    help: str = ""
    choices: tuple[str, ...] = ()
    is_switch: bool = False

    @property
    def flag(self) -> str:
        return "--" + self.key

    @property
    def variable(self) -> str:
        return _variable(self.key)

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING

    @property
    def within(self) -> str:
        """The field of the dataclass within that it belongs to; empty at the top."""
        return self.path.rpartition(".")[0]


@dataclass(frozen=True, slots=True)
class Words:
    """How options are presented. Keyed by ``Class.field``, or by ``field`` for all classes that have it."""

    helps: Mapping[str, str] = dataclasses.field(default_factory=dict)
    choices: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)  # where the key is not the field's own name
    automatic: tuple[str, ...] = ()  # fields whose None is spelt "auto"
    hidden: Mapping[str, str] = dataclasses.field(default_factory=dict)  # no option; the value says why


def settings_of(cls: Any, words: Words, within: str = "") -> tuple[Setting, ...]:
    """One setting for each field of an options dataclass and of the dataclasses within it."""
    hints = get_type_hints(cls)
    found: list[Setting] = []
    for field in dataclasses.fields(cls):
        path = f"{within}.{field.name}" if within else field.name
        if _about(words.hidden, cls, field.name) is not None:
            continue
        if dataclasses.is_dataclass(hints[field.name]):
            found += settings_of(hints[field.name], words, path)
        else:
            found.append(_setting(cls, field, hints[field.name], path, words))
    return tuple(found)


def _about(table: Mapping[str, Any], cls: Any, name: str) -> Any:
    return table.get(f"{cls.__name__}.{name}", table.get(name))


def _setting(cls: Any, field: dataclasses.Field[Any], hint: Any, path: str, words: Words) -> Setting:
    optional, inner = _unwrapped(hint)
    is_enum = isinstance(inner, type) and issubclass(inner, Enum)
    parse = _parser(inner)
    nothing = (*_NOTHING, "auto") if field.name in words.automatic else _NOTHING
    return Setting(
        path=path,
        key=_about(words.keys, cls, field.name) or field.name.removesuffix("_s").replace("_", "-"),
        parse=(lambda text: None if text.lower() in nothing else parse(text)) if optional else parse,
        default=field.default,
        help=_about(words.helps, cls, field.name) or "",
        choices=tuple(str(m.value) for m in inner) if is_enum else _about(words.choices, cls, field.name) or (),
        is_switch=inner is bool,
    )


def build(cls: Any, values: Mapping[str, Any]) -> Any:
    """The options dataclass out of values by path. Fields that have no value keep their default."""
    hints = get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        below = {k.removeprefix(field.name + "."): v for k, v in values.items() if k.startswith(field.name + ".")}
        if dataclasses.is_dataclass(hints[field.name]) and below:
            arguments[field.name] = build(hints[field.name], below)
        elif field.name in values:
            arguments[field.name] = values[field.name]
    return cls(**arguments)


def _unwrapped(hint: Any) -> tuple[bool, Any]:
    """(whether None is allowed, what else is)."""
    if get_origin(hint) in (Union, types.UnionType):
        (inner,) = (a for a in get_args(hint) if a is not type(None))
        return True, inner
    return False, hint


def _parser(hint: Any) -> Callable[[str], Any]:
    if hint is bool:
        return _switch
    if get_origin(hint) is tuple:
        each = _parser(get_args(hint)[0])
        return lambda text: tuple(each(part.strip()) for part in text.split(",") if part.strip())
    if hint in (int, float):
        return lambda text: _number(hint, text)
    if isinstance(hint, type) and issubclass(hint, (Enum, Path, str)):
        return hint
    raise TypeError(f"no way to read an option of type {hint!r}")


def _switch(text: str) -> bool:
    if text.lower() not in _YES + _NO:
        raise ValueError(f"{text!r} is neither yes nor no")
    return text.lower() in _YES


def _number(kind: type, text: str) -> Any:
    try:
        return kind(text.replace("_", ""))
    except ValueError:
        words = "a whole number" if kind is int else "a number"
        raise ValueError(f"{text!r} is not {words}") from None


def read_file(path: Path) -> dict[str, Any]:
    """The mapping of a YAML file. Raises ``BadSetting``."""
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadSetting(f"cannot read the configuration file {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise BadSetting(f"the configuration file {path} is not UTF-8 text: {error}") from error
    except ValueError as error:
        raise BadSetting(f"the configuration file {path} {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise BadSetting(f"the configuration file {path} must hold a mapping of option to value")
    return {str(key): value for key, value in content.items()}


def resolve(
    settings: Iterable[Setting],
    *,
    flags: Mapping[str, Any],
    environ: Mapping[str, str],
    file: Mapping[str, Any],
    also_known: Collection[str] = (),
    section: str = "",
) -> dict[str, Any]:
    """Values by path: from ``flags`` (already parsed), else ``environ``, else ``file``, else the default.

    ``also_known`` are keys of other commands, which one file and one environment may serve as well; ``section`` is the
    part of the file for this command, whose keys win over those outside it. Raises ``BadSetting``.
    """
    settings = tuple(settings)
    by_key = {s.key: s for s in settings}
    known = {*by_key, *also_known}
    in_file = _file_values(file, by_key, known, section)
    in_environ = _environ_values(environ, by_key, known)
    found = {**in_file, **in_environ, **flags}
    missing = [s for s in settings if s.required and s.path not in found]
    if missing:
        raise BadSetting(f"{missing[0].flag} is needed (or {missing[0].variable}, or {missing[0].key}: in the file)")
    return {s.path: found.get(s.path, s.default) for s in settings}


def _file_values(
    file: Mapping[str, Any], by_key: Mapping[str, Setting], known: Collection[str], section: str
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    parts = [{k: v for k, v in file.items() if not isinstance(v, dict)}]
    sections = {k: {str(key): inner for key, inner in v.items()} for k, v in file.items() if isinstance(v, dict)}
    parts.append(sections.get(section, {}))
    for name, content in (("", parts[0]), *sections.items()):
        for raw in content:
            if (key := raw.replace("_", "-")) not in known:
                where = f" in section {name}" if name else ""
                raise BadSetting(f"unknown key {raw!r} in the configuration file{where}{nearest(key, known)}")
    for content in parts:
        for raw, value in content.items():
            if setting := by_key.get(raw.replace("_", "-")):
                where = f"{raw} in the configuration file"
                values[setting.path] = _parsed(setting, _as_text(value, where), where)
    return values


def _as_text(value: Any, where: str) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (dict, set)) or (isinstance(value, list) and any(isinstance(v, (list, dict)) for v in value)):
        raise BadSetting(f"{where}: one value, or a list of values, is needed here")
    if isinstance(value, list):
        return ",".join(map(str, value))
    return "none" if value is None else str(value)


def _environ_values(
    environ: Mapping[str, str], by_key: Mapping[str, Setting], known: Collection[str]
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, text in environ.items():
        if not name.startswith(PREFIX) or name == CONFIG_VARIABLE:
            continue
        key = name.removeprefix(PREFIX).lower().replace("_", "-")
        if key not in known:
            raise BadSetting(f"unknown environment variable {name}{nearest(name, map(_variable, known))}")
        if setting := by_key.get(key):
            values[setting.path] = _parsed(setting, text, name)
    return values


def _variable(key: str) -> str:
    return PREFIX + key.replace("-", "_").upper()


def _parsed(setting: Setting, text: str, source: str) -> Any:
    if setting.choices and text not in setting.choices:
        raise BadSetting(f"{source}: {text!r} is none of {', '.join(setting.choices)}")
    try:
        return setting.parse(text)
    except ValueError as error:
        raise BadSetting(f"{source}: {error}") from None


def nearest(word: str, known: Iterable[str]) -> str:
    """``; did you mean …?`` when some known word is near, else the hint is empty."""
    close = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
