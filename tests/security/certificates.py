"""Certificates for tests, made by our own command."""

from __future__ import annotations

import argparse
from pathlib import Path

from distserve.cli.cert import cert


def make(directory: Path, ca_dir: Path | None = None, hosts: str = "") -> Path:
    """A directory for ``--tls-dir``, with a CA of its own or signed by another's. Made again: a renewal."""
    parsed = argparse.Namespace(action="create", directory=directory, hosts=hosts, ca_dir=ca_dir, days=30)
    assert cert(parsed) == 0
    return directory
