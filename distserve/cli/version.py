"""``distserve version``."""

from __future__ import annotations

import argparse

from distserve import __version__


def version(_: argparse.Namespace) -> int:
    print(f"distserve {__version__}")
    return 0
