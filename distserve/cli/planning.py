"""The planner's commands: its functions, its refusals in a sentence."""

from __future__ import annotations

import argparse

from distserve.cli.failure import CommandFailed
from distserve.cli.progress import ProgressLine
from distserve_planner import cli_plan, cli_replan, cli_simulate


def plan(parsed: argparse.Namespace) -> int:
    line = ProgressLine.on_terminal()
    try:
        return cli_plan.run(parsed, line)
    except ValueError as error:  # CannotPlan, OutOfRange
        raise CommandFailed(str(error)) from error


def simulate(parsed: argparse.Namespace) -> int:
    try:
        return cli_simulate.run(parsed)
    except ValueError as error:  # CannotPlan, OutOfRange
        raise CommandFailed(str(error)) from error


def replan(parsed: argparse.Namespace) -> int:
    try:
        return cli_replan.run(parsed)
    except ValueError as error:  # CannotPlan, OutOfRange
        raise CommandFailed(str(error)) from error
