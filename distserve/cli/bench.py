"""``distserve bench``: flags into a plan, progress while it runs, a table and a JSON document at its end."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import orjson

from distserve.cli.failure import CommandFailed
from distserve.cli.paint import Paint, span, table
from distserve.cli.parser import Usage
from distserve.cli.progress import ProgressLine
from distserve.loadgen.bench import Bench, BenchFailed, Plan
from distserve.loadgen.client import Client
from distserve.loadgen.http import Target
from distserve.loadgen.run import Progress
from distserve.loadgen.stats import Slo
from distserve.loadgen.workload import BadWorkload
from distserve.models.catalog import resolve_model
from distserve.models.errors import ModelError
from distserve.wire.loop import run_loop

_SPREADS = {"TTFT": "ttft_s", "TPOT": "tpot_s", "ITL": "itl_s", "E2E": "e2e_s"}


def bench(parsed: argparse.Namespace) -> int:
    plan = plan_of(parsed)
    line, began = ProgressLine.on_terminal(parsed.plain), time.monotonic()

    def changed(progress: Progress) -> None:
        line.draw(words_of(progress, time.monotonic() - began), last=progress.done >= progress.total)

    try:
        document = run_loop(Bench(plan, changed, line.say).run())
    except (BenchFailed, BadWorkload) as error:
        raise CommandFailed(str(error)) from error
    finally:
        line.clear()
    document = {"command": shlex.join(["distserve", *sys.argv[1:]]), **document}
    print(report(document, plan.slo, Paint(plain=parsed.plain)))
    if parsed.json is not None:
        write(parsed.json, document)
        print(f"written to {parsed.json}")
    failed = document["results"].get("failed", 0)
    return 1 if failed and failed == document["results"]["requests"] else 0


def plan_of(parsed: argparse.Namespace) -> Plan:
    """Raises ``Usage`` or ``CommandFailed`` with a sentence."""
    try:
        target, slo = Target.parse(parsed.url, parsed.tls_ca), Slo.parse(parsed.slo)
    except ValueError as error:
        raise Usage(str(error)) from error
    try:
        extra = json.loads(parsed.extra)
    except json.JSONDecodeError as error:
        raise Usage(f"--extra is not valid JSON: {error}") from error
    if not isinstance(extra, dict):
        raise Usage("--extra must be a JSON object, such as '{\"top_k\": 5}'")
    for name in ("rate", "duration", "num_requests", "concurrency", "input_tokens", "output_tokens"):
        if (value := getattr(parsed, name)) is not None and value <= 0:
            raise Usage(f"--{name.replace('_', '-')} {value:g}: a number above 0 is needed")
    plan = Plan(
        client=Client(
            target,
            parsed.model,
            ignore_eos=not parsed.no_ignore_eos,
            temperature=parsed.temperature,
            api_key=parsed.api_key,
            timeout_s=parsed.timeout,
            count_empty=parsed.count_empty,
            extra=extra,
        ),
        requests=parsed.requests,
        rate=parsed.rate,
        duration_s=parsed.duration,
        num_requests=parsed.num_requests,
        concurrency=parsed.concurrency,
        goodput=parsed.goodput,
        slo=slo,
        prompt_tokens=parsed.input_tokens,
        max_tokens=parsed.output_tokens,
        tokenizer=tokenizer_file(parsed.tokenizer) if parsed.tokenizer else None,
        seed=parsed.seed,
        warmup=parsed.warmup,
        most_rate=parsed.max_rate,
        tolerance=parsed.tolerance,
        least_requests=parsed.min_requests,
        most_requests=parsed.max_requests,
        server_pids=tuple(parsed.server_pid),
    )
    try:
        plan.kind  # noqa: B018 (asks for nothing that can be run: say so before anything is sent)
    except BenchFailed as error:
        raise Usage(str(error)) from error
    return plan


def tokenizer_file(name: str) -> Path:
    """The ``tokenizer.json`` behind a file, a directory or an alias."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    try:
        found = resolve_model(name) / "tokenizer.json"
    except ModelError as error:
        raise CommandFailed(str(error)) from error
    if not found.is_file():
        raise CommandFailed(f"{found.parent} has no tokenizer.json")
    return found


def words_of(progress: Progress, seconds: float) -> str:
    """How far a run is, after so many seconds."""
    failed = f", {progress.failed} failed" if progress.failed else ""
    words = f"{progress.done}/{progress.total} done, {progress.sent - progress.done} in flight{failed}"
    return f"{seconds:6.1f} s  {words}"


def report(document: dict[str, Any], slo: Slo, paint: Paint) -> str:
    """The document as a person reads it."""
    results = document["results"]
    if document["run"] == "goodput":
        return _goodput_report(results, slo, paint)
    rows = [
        [name, *(span(results[key][p]) if results[key]["count"] else "–" for p in ("mean", "p50", "p90", "p99", "max"))]
        for name, key in _SPREADS.items()
    ]
    lines = [table(["", "mean", "p50", "p90", "p99", "max"], rows, paint), ""]
    lines.append(
        f"{results['requests']} requests in {results['wall_s']:.1f} s, {results['failed']} failed: "
        f"{results['request_rate']:.2f} req/s, {results['output_token_rate']:.1f} output tokens/s"
    )
    if document["workload"]["slo"].keys() - {"attainment"}:
        lines.append(
            f"within target: {results['attained']:.1%} (TTFT {results['ttft_attained']:.1%}, "
            f"TPOT {results['tpot_attained']:.1%}); wanted {slo.attainment:.0%}"
        )
    lines += [paint(f"{count} × {words}", "red") for words, count in results["errors"].items()]
    if results["late_s"] > 0.05:
        lines.append(paint(f"this client sent up to {span(results['late_s'])} late: it is short of CPU", "yellow"))
    return "\n".join(lines)


def _goodput_report(results: dict[str, Any], slo: Slo, paint: Paint) -> str:
    rows = []
    for point in sorted(results["curve"], key=lambda p: p["rate"]):
        s = point["summary"]
        rows.append(
            [
                f"{point['rate']:.2f}",
                f"{s['attained']:.1%}" + ("*" if point["decided_early"] else ""),
                span(s["ttft_s"]["p50"]),
                span(s["ttft_s"]["p90"]),
                span(s["tpot_s"]["p50"]),
                span(s["tpot_s"]["p90"]),
                str(s["requests"]),
            ]
        )
    heads = ["req/s", "within", "TTFT p50", "TTFT p90", "TPOT p50", "TPOT p90", "requests"]
    fails = f"fails at {results['fails_at']:.2f}" if results["fails_at"] else "no rate tried failed"
    best = f"goodput {results['rate']:.2f} req/s at {slo.attainment:.0%} within target ({fails})"
    starred = "\n* stopped early: too many had missed" if any(p["decided_early"] for p in results["curve"]) else ""
    return f"{table(heads, rows, paint)}{starred}\n\n{paint(best, 'bold')}"


def write(path: Path, document: dict[str, Any]) -> None:
    """The document as indented JSON; folders are made. Raises ``CommandFailed``."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    except OSError as error:
        raise CommandFailed(f"cannot write {path}: {error.strerror or error}") from error
