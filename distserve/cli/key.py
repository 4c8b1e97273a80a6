"""``distserve key``: clients' API keys, made, listed and taken away; and the cluster's own secret."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from distserve.cli.failure import CommandFailed
from distserve.cli.paint import Paint, table
from distserve.gateway.keys import BadKeys, Key, fresh_key, read_keys, write_keys
from distserve.wire.secret import fresh


def key(parsed: argparse.Namespace) -> int:
    try:
        return int({"create": _create, "list": _list, "remove": _remove, "secret": _secret}[parsed.action](parsed))
    except BadKeys as error:
        raise CommandFailed(str(error)) from error
    except OSError as error:
        raise CommandFailed(f"cannot write {error.filename}: {error.strerror}") from error


def _create(parsed: argparse.Namespace) -> int:
    path, name = _file(parsed), _name(parsed)
    known = read_keys(path) if path.exists() else ()
    if any(each.name == name for each in known):
        raise CommandFailed(f"there is a key named {name!r} in {path}; remove it first, or choose another name")
    text = fresh_key()
    write_keys(path, [*known, Key.of(name, text, admin=parsed.admin, max_streams=max(0, parsed.max_streams))])
    print(text)  # once: the file holds only its hash
    return 0


def _list(parsed: argparse.Namespace) -> int:
    rows = [
        [each.name, "yes" if each.admin else "no", str(each.max_streams or "–")] for each in read_keys(_file(parsed))
    ]
    print(table(("name", "admin", "streams"), rows, Paint(plain=parsed.plain)))
    return 0


def _remove(parsed: argparse.Namespace) -> int:
    path, name = _file(parsed), _name(parsed)
    known = read_keys(path)
    left = [each for each in known if each.name != name]
    if len(left) == len(known):
        raise CommandFailed(f"there is no key named {name!r} in {path}")
    write_keys(path, left)
    return 0


def _secret(parsed: argparse.Namespace) -> int:
    path = Path(_name(parsed))
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise CommandFailed(f"{path} exists; a cluster's secret is replaced by hand, see the README") from None
    with os.fdopen(handle, "w") as file:
        file.write(fresh() + "\n")
    return 0


def _file(parsed: argparse.Namespace) -> Path:
    if parsed.api_keys is None:
        raise CommandFailed("say which file: --api-keys FILE, or DISTSERVE_API_KEYS")
    return Path(parsed.api_keys)


def _name(parsed: argparse.Namespace) -> str:
    if not parsed.name:
        what = "a file for the secret" if parsed.action == "secret" else "the key's name"
        raise CommandFailed(f"`distserve key {parsed.action}` needs {what}")
    return str(parsed.name)
