"""The commands that start processes: options together, then over to who runs them."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from distserve.launch.options import BadOptions
from distserve.launch.planned import options_of_plan
from distserve.launch.settings import CONFIG_VARIABLE, SECRET_VARIABLE, build, read_file, resolve
from distserve.launch.words import SERVERS, all_keys, settings


def serve(parsed: argparse.Namespace) -> int:
    return _run("distserve.launch.serve", _checked(options_of("serve", parsed)), parsed)


def gateway(parsed: argparse.Namespace) -> int:
    return _run("distserve.gateway.process", _checked(options_of("gateway", parsed)), parsed)


def controller(parsed: argparse.Namespace) -> int:
    return _run("distserve.controller.process", _checked(options_of("controller", parsed)), parsed)


def instance(parsed: argparse.Namespace) -> int:
    return _run("distserve.instance.process", _checked(options_of("instance", parsed)), parsed)


def options_of(command: str, parsed: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> Any:
    """The options in force: flags, else environment, else file, else a plan, else default. Raises ``BadSetting``."""
    known = settings(command)
    given = vars(parsed)
    file = given.get("config") or (Path(environ[CONFIG_VARIABLE]) if environ.get(CONFIG_VARIABLE) else None)
    plan = given.get("plan")
    planned = options_of_plan(plan, {s.key for s in known}) if plan is not None else {}
    values = resolve(
        known,
        flags={s.path: given[s.path] for s in known if s.path in given},
        environ=environ,
        file={**planned, **(read_file(file) if file is not None else {})},
        also_known=all_keys(),
        section=command,
    )
    values |= {fd: given[fd] for fd in ("ready_fd", "parent_fd") if given.get(fd) is not None}
    values["security.cluster_secret"] = environ.get(SECRET_VARIABLE, "")  # no flag: others could read it
    return build(SERVERS[command], values)


def _checked(options: Any) -> Any:
    """The options, which fit together. Raises ``BadOptions``."""
    try:
        options.check()
    except ValueError as error:
        raise BadOptions(str(error)) from error
    return options


def _run(module: str, options: Any, parsed: argparse.Namespace) -> int:
    if parsed.check_config:
        print(yaml.safe_dump(_plain(options), sort_keys=False), end="")
        return 0
    return int(importlib.import_module(module).main(options))  # torch and grpc, only for who runs


def _plain(value: Any) -> Any:
    """An options dataclass as YAML knows it."""
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.repr}  # no secrets
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
