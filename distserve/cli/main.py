"""The command ``distserve``: find the command's function, run it, tell its failure in a sentence."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from distserve.cli.commands import COMMANDS, build_parser
from distserve.cli.failure import CommandFailed
from distserve.cli.paint import Paint
from distserve.cli.parser import WRONG_USE, Usage
from distserve.launch.options import BadOptions
from distserve.launch.settings import BadSetting

FAILED = 1
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 failed, 2 wrong use, 130 interrupted."""
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # grpc's own words are for its developers; read when it loads
    # OpenMP threads spin without end at barriers by default: with two on shared cores a step took ten times as long.
    # Never spinning doubles it on idle ones. Some ten microseconds of it serve both. Read when torch loads.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    try:
        parser = build_parser()
        parsed = parser.parse_args(sys.argv[1:] if argv is None else argv)
        if parsed.command is None:
            parser.print_help()
            return WRONG_USE
        module, _, function = COMMANDS[parsed.command].run.partition(":")
        run = getattr(importlib.import_module(f"distserve.cli.{module}"), function)
        return int(run(parsed))
    except (Usage, BadSetting, BadOptions) as error:
        return _say(str(error), WRONG_USE)
    except CommandFailed as error:
        return _say(str(error), FAILED)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _say(words: str, code: int) -> int:
    print(Paint(sys.stderr)("distserve: ", "bold", "red") + words, file=sys.stderr)
    return code
