"""argparse, as friendly as the rest: no abbreviations, and an unknown flag or command names the nearest known one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from distserve.launch.settings import Setting, nearest

WRONG_USE = 2


class Usage(Exception):
    """The command line cannot be understood; the text is for the user."""


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` that raises ``Usage`` in place of exiting."""

    def __init__(self, **arguments: Any) -> None:
        arguments.setdefault("formatter_class", _Help)
        super().__init__(allow_abbrev=False, **arguments)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        parsed, rest = self.parse_known_args(args, namespace)
        if rest:
            self.error(f"unknown argument {rest[0]!r}{nearest(rest[0].split('=')[0], _flags(parsed.parser))}")
        return parsed

    def error(self, message: str) -> NoReturn:
        raise Usage(f"{message}\nsay `{self.prog} --help` for what is known")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(c) for c in action.choices]
            what = "command" if isinstance(action, argparse._SubParsersAction) else "choice"
            words = f"unknown {what} {value!r}{nearest(str(value), known)} (known: {', '.join(known)})"
            raise argparse.ArgumentError(action, words) if what == "choice" else Usage(words)


class _Help(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)


def _flags(parser: argparse.ArgumentParser) -> list[str]:
    return [flag for action in parser._actions for flag in action.option_strings]


def add_settings(parser: argparse.ArgumentParser, settings: Sequence[Setting]) -> None:
    """A flag for every setting, absent unless given. Those of dataclasses within go in groups of their own."""
    main = parser.add_argument_group("options")
    secure = parser.add_argument_group("security (README: Security)")
    fine = parser.add_argument_group("limits and deadlines (the defaults are meant to do)")
    for setting in settings:
        group = secure if setting.within == "security" else fine if setting.within else main
        words = setting.help.replace("%", "%%") + _default(setting)
        if setting.is_switch:
            switch = argparse.BooleanOptionalAction
            group.add_argument(setting.flag, dest=setting.path, action=switch, default=argparse.SUPPRESS, help=words)
        else:
            group.add_argument(
                setting.flag,
                dest=setting.path,
                type=_checked(setting),
                default=argparse.SUPPRESS,
                metavar="|".join(setting.choices) or _metavar(setting),
                help=words,
            )


def _checked(setting: Setting) -> Any:
    def parse(text: str) -> Any:
        if setting.choices and text not in setting.choices:
            raise argparse.ArgumentTypeError(
                f"{text!r} is none of {', '.join(setting.choices)}{nearest(text, setting.choices)}"
            )
        try:
            return setting.parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


def _metavar(setting: Setting) -> str:
    if setting.path.endswith("_s"):
        return "SECONDS"
    return "N" if isinstance(setting.default, int) else setting.key.rpartition("-")[2].upper()


def _default(setting: Setting) -> str:
    if setting.required:
        return " (needed)"
    if setting.default in (None, "", ()):
        return ""
    shown = {True: "yes", False: "no"}.get(setting.default, setting.default) if setting.is_switch else setting.default
    return f" [{shown}]"
