"""The command line. Parses words, calls what does the work, prints; decides nothing of its own."""

from distserve.cli.main import main

__all__ = ["main"]
