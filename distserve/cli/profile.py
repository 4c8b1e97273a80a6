"""``distserve profile``: flags into a wish, a progress line while it is measured, a table of the fit, the file."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import replace

from distserve.cli.failure import CommandFailed
from distserve.cli.paint import Paint, span, table
from distserve.cli.parser import Usage
from distserve.cli.progress import ProgressLine
from distserve.launch.cluster import ClusterFailed
from distserve.models.errors import ModelError
from distserve.profiling.live import LiveFailed
from distserve.profiling.run import Wish, measure
from distserve.profiling.worker import WorkerFailed
from distserve_kernels.cores import usable_cores
from distserve_planner.latency.profile import Profile, Sample, write_profile
from distserve_planner.latency.regress import DECODE, PREFILL, told
from distserve_planner.refusal import CannotPlan

_NOISY = 0.15
_OTHERS = 0.3


def profile(parsed: argparse.Namespace) -> int:
    wish = wish_of(parsed)
    line = ProgressLine.on_terminal(parsed.plain)
    try:
        found = measure(wish, line.bar)
    except (ModelError, WorkerFailed, LiveFailed, ClusterFailed, CannotPlan) as error:
        raise CommandFailed(str(error)) from error
    finally:
        line.clear()
    found = replace(found, about={"command": shlex.join(["distserve", *sys.argv[1:]]), **found.about})
    try:
        write_profile(found, parsed.out)
    except CannotPlan as error:
        raise CommandFailed(str(error)) from error
    print(report(found, Paint(plain=parsed.plain)))
    print(f"written to {parsed.out} after {found.about['took_s']:.0f} s")
    return 0


def wish_of(parsed: argparse.Namespace) -> Wish:
    """Raises ``Usage`` with a sentence."""
    cores = len(usable_cores())
    for name in ("instances", "threads_per_rank", "budget", "kv_tokens", "block_size"):
        if (value := getattr(parsed, name)) is not None and value <= 0:
            raise Usage(f"--{name.replace('_', '-')} {value:g}: a number above 0 is needed")
    if parsed.kv_tokens < 4096:
        raise Usage(f"--kv-tokens {parsed.kv_tokens}: at least 4096 are needed to measure batches")
    threads = parsed.threads_per_rank or max(1, cores // parsed.instances)
    return Wish(
        model=parsed.model,
        dtype=parsed.dtype,
        threads=threads,
        instances=parsed.instances,
        budget_s=parsed.budget,
        kv_tokens=parsed.kv_tokens,
        block_size=parsed.block_size,
        live=not parsed.no_live,
        tokenizer=parsed.tokenizer,
        seed=parsed.seed,
    )


def report(found: Profile, paint: Paint) -> str:
    """What was measured, how well it is fitted, and what to doubt."""
    live = found.live
    lines = [
        f"{found.model} {found.dtype}: {found.instances} instances of {found.threads} threads on {found.cores} cores",
        "",
        table(("step", "measured", "told", "off"), [_row(found, s) for s in _shown(found)], paint),
        "",
        table(("steps", "shapes", "form", "error left out", "residual p50", "worst"), _curves(found), paint),
        "",
    ]
    for name, link in found.links.items():
        lines.append(
            f"KV over {name}: {span(link.latency_s)} + bytes at {link.bytes_s / 1e9:.2f} GB/s ±{link.error:.0%}"
        )
    for mine, beside in found.crowd.items():
        words = (f"{span(e.constant_s)} + {e.relative:.0%} while the others {other}" for other, e in beside.items())
        lines.append(f"a {mine} step takes longer by {', by '.join(words)}")
    if live.layout:
        lines += [
            f"live ({live.layout}): around a request {span(live.around_s)} + {span(live.around_token_s)} a token, "
            f"a hand-off {span(live.handoff_s)},",
            f"  a turn {span(live.turn_s)} + {span(live.row_s)} a row beyond its step; "
            f"beside busy instances a further {live.crowd_prefill:.0%} on prompts, {live.crowd_decode:.0%} on decodes",
        ]
        for layout, run in live.seen.get("under load", {}).items():
            told_over = run["told_over_measured"]
            lines.append(
                f"  {layout} at {run['rate']:.2f} req/s: TTFT p25 {span(run['ttft_p25_s'])} (told "
                f"{told_over['ttft'] - 1:+.0%}), TPOT p50 {span(run['tpot_p50_s'])} (told {told_over['tpot'] - 1:+.0%})"
            )
    else:
        lines.append("live: not measured; times are those of the bare engine")
    return "\n".join([*lines, *(f"note: {note}" for note in notes(found))])


def notes(found: Profile) -> list[str]:
    """Reasons to trust the profile less."""
    words = []
    if (noise := float(found.about.get("noise", 0.0))) > _NOISY:
        words.append(f"a typical step took {noise:.0%} longer than its best run: this machine was not quiet")
    if (others := float(found.about.get("cores_used", {}).get("others", 0.0))) > _OTHERS:
        words.append(f"other processes used {others:.2f} cores meanwhile (its own children included)")
    worst = max(found.prefill.error, found.decode.error)
    if worst > _NOISY:
        words.append(f"steps left out of the fit were missed by {worst:.0%}: measure again, with a larger --budget")
    return words


def _shown(found: Profile) -> list[Sample]:
    wanted = found.samples
    single = [s for s in wanted if s.kind == "prefill" and len(s.chunks) == 1]
    decode = [s for s in wanted if s.kind == "decode" and s.decode_context == 256 * s.decodes]
    mixed = [s for s in wanted if s.kind == "mixed" and s.decodes == 8]
    ordered = (sorted(part, key=lambda s: (s.rows, s.chunks)) for part in (single, decode, mixed))
    return [s for part in ordered for s in part]


def _row(found: Profile, s: Sample) -> tuple[str, ...]:
    curve, terms = (found.prefill, PREFILL) if s.chunks else (found.decode, DECODE)
    seconds = told(curve, terms, s)
    chunks = " + ".join(f"{n} tokens after {b}" if b else f"{n} tokens" for n, b in s.chunks)
    decodes = f"{s.decodes} decodes of {s.decode_context // s.decodes}" if s.decodes else ""
    words = " + ".join(filter(None, (chunks, decodes)))
    return words, span(s.seconds), span(seconds), f"{seconds / s.seconds - 1:+.1%}"


def _curves(found: Profile) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, curve in (("with prompts", found.prefill), ("decode", found.decode)):
        count = sum(1 for s in found.samples if bool(s.chunks) == (name != "decode"))
        rows.append(
            (
                name,
                str(count),
                curve.form,
                f"{curve.error:.1%}",
                f"{curve.median_residual:.1%}",
                f"{curve.worst_residual:.1%}",
            )
        )
    return rows
