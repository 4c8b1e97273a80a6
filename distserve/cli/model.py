"""``distserve model path NAME``."""

from __future__ import annotations

import argparse
import sys

from distserve.cli.failure import CommandFailed
from distserve.models.catalog import resolve_model
from distserve.models.errors import ModelError


def model(parsed: argparse.Namespace) -> int:
    try:
        print(resolve_model(parsed.name, say=lambda words: print(words, file=sys.stderr)))
    except ModelError as error:
        raise CommandFailed(str(error)) from error
    return 0
