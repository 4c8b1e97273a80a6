"""``distserve record``: a running cluster's traffic as a trace that `distserve plan` and `replan` read.

Arrivals, lengths, shared prefixes, clients as numbers; no text and no token ids.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

from distserve.cli.failure import CommandFailed
from distserve.cli.paint import span
from distserve.cli.progress import ProgressLine
from distserve.cli.remote import remote
from distserve.v1 import admin_pb2 as pb

ANSWERED = ("stop", "length")
"""Outcomes whose lengths are those of the workload; a cancelled or refused request says nothing of its answer."""

AFTERWARDS_S = 3600.0
"""How long the last requests may take after the watch."""


def record(parsed: argparse.Namespace) -> int:
    """Ctrl-C ends the watch early; what was seen by then is written."""
    if not parsed.duration > 0:
        raise CommandFailed(f"--duration {parsed.duration:g}: seconds above 0 are needed")
    out = Path(parsed.out)
    if not out.absolute().parent.is_dir():
        raise CommandFailed(f"cannot write {out}: there is no folder {out.absolute().parent}")
    seen: list[Any] = []
    line = ProgressLine.on_terminal(parsed.plain)
    try:
        with remote(parsed) as gateway:
            asked = pb.WatchTrafficRequest(duration_s=parsed.duration)
            call = gateway.call | {"timeout": parsed.duration + AFTERWARDS_S}
            for each in gateway.admin.WatchTraffic(asked, **call):
                seen.append(each)
                line.draw(f"{len(seen)} requests")
    except KeyboardInterrupt:
        line.say("stopped early")
    except CommandFailed:
        if seen:  # else there is nothing to save, and a trace of another day may stand there
            _write(out, trace(seen))
        raise
    finally:
        line.clear()
    rows = trace(seen)
    _write(out, rows)
    ended = Counter(each.outcome for each in seen)
    rest = "".join(f", {count} {outcome}" for outcome, count in sorted(ended.items()) if outcome not in ANSWERED)
    print(f"{len(rows)} requests over {span(rows[-1]['arrival_s'] if rows else 0.0)} in {out}{rest}")
    return 0


def trace(seen: list[Any]) -> list[dict[str, Any]]:
    """Rows in order of arrival, from 0 s on."""
    answered = sorted((e for e in seen if e.outcome in ANSWERED and e.output_tokens), key=lambda e: e.arrival_s)
    chained = all(e.prefix_blocks for e in answered)
    rows = []
    for each in answered:
        row: dict[str, Any] = {
            "arrival_s": round(each.arrival_s - answered[0].arrival_s, 6),
            "input_tokens": each.prompt_tokens,
            "output_tokens": each.output_tokens,
            "client": str(each.client),
        }
        if chained:
            row["prefix_blocks"] = list(each.prefix_blocks)
        if each.slo_class:
            row["slo_class"] = each.slo_class
        rows.append(row)
    return rows


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows).encode()
    try:
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    except OSError as error:
        raise CommandFailed(f"cannot write {path}: {error.strerror or error}") from error
