"""Completion scripts for bash, zsh and fish, made from the parser itself."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from distserve.cli.commands import build_parser
from distserve.cli.parser import Parser


@dataclass(frozen=True, slots=True)
class _Flag:
    name: str
    help: str
    choices: tuple[str, ...]


def completion(parsed: argparse.Namespace) -> int:
    print(script(build_parser(), parsed.shell), end="")
    return 0


def script(parser: Parser, shell: str) -> str:
    """The script for one shell."""
    commands = _commands(parser)
    words = {name: (_words(sub), _flags(sub)) for name, sub in commands.items()}
    helps = {a.dest: a.help or "" for action in parser._actions for a in getattr(action, "_choices_actions", ())}
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](words, helps)


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (subs,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return dict(subs.choices)


def _flags(parser: argparse.ArgumentParser) -> list[_Flag]:
    flags = []
    for action in parser._actions:
        if action.help is not argparse.SUPPRESS:
            metavar = action.metavar if isinstance(action.metavar, str) else ""
            choices = tuple(map(str, action.choices or (metavar.split("|") if "|" in metavar else ())))
            flags += [_Flag(name, (action.help or "").split(" [")[0], choices) for name in action.option_strings]
    return flags


def _words(parser: argparse.ArgumentParser) -> tuple[str, ...]:
    """Choices of the positional arguments."""
    return tuple(str(c) for a in parser._actions if not a.option_strings for c in a.choices or ())


_Table = dict[str, tuple[tuple[str, ...], list[_Flag]]]


def _bash(words: _Table, _helps: dict[str, str]) -> str:
    cases, values = [], []
    for name, (positional, flags) in words.items():
        cases.append(f'    {name}) words="{" ".join([*positional, *(f.name for f in flags)])}" ;;')
        values += [f'    {name}:{f.name}) words="{" ".join(f.choices)}" ;;' for f in flags if f.choices]
    return f"""# distserve completion for bash: source <(distserve completion bash)
_distserve() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}"
  local command="${{COMP_WORDS[1]}}" words=""
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{" ".join(words)} --help --version" -- "$current")); return
  fi
  case "$command:$before" in
{chr(10).join(values)}
  esac
  if [ -n "$words" ]; then COMPREPLY=($(compgen -W "$words" -- "$current")); return; fi
  case "$command" in
{chr(10).join(cases)}
  esac
  COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _distserve distserve
"""


def _zsh(words: _Table, helps: dict[str, str]) -> str:
    cases = []
    for name, (positional, flags) in words.items():
        specs = [f"'{f.name}[{_quiet(f.help)}]{_zsh_value(f)}'" for f in flags]
        specs += [f"'1:word:({' '.join(positional)})'"] if positional else ["'*:file:_files'"]
        cases.append(f"    {name}) _arguments {' '.join(specs)} ;;")
    listed = " ".join(f"'{name}:{_quiet(helps.get(name, ''))}'" for name in words)
    return f"""#compdef distserve
# distserve completion for zsh: source <(distserve completion zsh)
_distserve() {{
  local -a commands; commands=({listed})
  if (( CURRENT == 2 )); then _describe command commands; return; fi
  local command="${{words[2]}}"; shift words; (( CURRENT-- ))
  case "$command" in
{chr(10).join(cases)}
  esac
}}
compdef _distserve distserve
"""


def _zsh_value(flag: _Flag) -> str:
    return f":value:({' '.join(flag.choices)})" if flag.choices else ""


def _fish(words: _Table, helps: dict[str, str]) -> str:
    lines = ["# distserve completion for fish: distserve completion fish | source"]
    for name, (positional, flags) in words.items():
        lines.append(f"complete -c distserve -n __fish_use_subcommand -a {name} -d '{_quiet(helps.get(name, ''))}'")
        here = f"complete -c distserve -n '__fish_seen_subcommand_from {name}'"
        if positional:
            lines.append(f"{here} -f -a '{' '.join(positional)}'")
        for flag in flags:
            kind = "l" if flag.name.startswith("--") else "s"
            values = f" -x -a '{' '.join(flag.choices)}'" if flag.choices else ""
            lines.append(f"{here} -{kind} {flag.name.lstrip('-')} -d '{_quiet(flag.help)}'{values}")
    return "\n".join(lines) + "\n"


def _quiet(text: str) -> str:
    """Free of what shells read as more than text."""
    return "".join(c for c in text if c not in "'\"[]:`$\\").replace("%%", "%")
