"""Which commands there are, and the parser of them all.

A command's module is imported when it runs, so that ``--help`` and completion need neither torch nor grpc.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from distserve import __version__
from distserve.cli import arguments, planning_arguments
from distserve.cli.parser import Parser


@dataclass(frozen=True, slots=True)
class Command:
    """``run`` names ``module:function``; the function takes the parsed arguments and returns an exit code."""

    help: str
    run: str
    add_arguments: Callable[[argparse.ArgumentParser], None]


def _none(_: argparse.ArgumentParser) -> None:
    return None


COMMANDS: dict[str, Command] = {
    "serve": Command("a whole cluster on this machine", "servers:serve", arguments.serve),
    "demo": Command("start a small cluster, ask one question, tell what happened, stop", "demo:demo", arguments.demo),
    "gateway": Command("one gateway: HTTP and gRPC for clients", "servers:gateway", arguments.gateway),
    "controller": Command("the controller: members, dispatch", "servers:controller", arguments.controller),
    "instance": Command("one instance: a copy of the model", "servers:instance", arguments.instance),
    "generate": Command("answer one prompt, streamed through gRPC", "generate:generate", arguments.generate),
    "chat": Command("talk to the model", "chat:chat", arguments.chat),
    "ps": Command("the instances and their load", "admin:ps", arguments.ps),
    "where": Command("where a request is and what it waits for", "admin:where", arguments.where),
    "cancel": Command("end a request everywhere", "admin:cancel", arguments.cancel),
    "kvcheck": Command("check that every KV block is accounted for", "admin:kvcheck", arguments.kvcheck),
    "key": Command("API keys of clients; the cluster's secret", "key:key", arguments.key),
    "cert": Command("a CA and certificates for a cluster", "cert:cert", arguments.cert),
    "model": Command("model aliases: `model path NAME`", "model:model", arguments.model),
    "bench": Command("measure any OpenAI-compatible server", "bench:bench", arguments.bench),
    "record": Command("a running cluster's traffic as a trace, without its words", "record:record", arguments.record),
    "plan": Command("parallelism, instances and GPUs for a rate and targets", "planning:plan", arguments.plan),
    "simulate": Command("what a deployment would do with a workload", "planning:simulate", arguments.simulate),
    "profile": Command("measure this machine for the planner", "profile:profile", planning_arguments.profile),
    "replan": Command("drift of recorded traffic, and better roles", "planning:replan", planning_arguments.replan),
    "verify": Command("start a plan here and compare it with its prediction", "verify:run", planning_arguments.verify),
    "completion": Command("a script that completes this command", "completion:completion", arguments.completion),
    "version": Command("the version", "version:version", _none),
}


def build_parser() -> Parser:
    """The whole command line."""
    parser = Parser(
        prog="distserve",
        description="An LLM serving cluster that reads prompts on some instances and writes answers on others.",
        epilog="`distserve COMMAND --help` tells more. Options also come from DISTSERVE_* variables and a YAML file.",
    )
    parser.add_argument("--version", action="version", version=f"distserve {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands", parser_class=Parser)
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.help, description=command.help[0].upper() + command.help[1:] + ".")
        command.add_arguments(sub)
        sub.set_defaults(parser=sub)
    parser.set_defaults(parser=parser)
    return parser
