"""``make chaos``: the whole run, its table, and bench/results/chaos.json. Exit code 0 only when every promise was kept.

Smaller or other runs: CHAOS_REQUESTS (1200), CHAOS_FAULTS (225), CHAOS_SEED (1). The same three give the same requests
and the same faults at the same tokens.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.chaos.run import Scenario, Verdict, chaos
from tests.tiny_models import make_tiny


def table(verdict: Verdict) -> str:
    """What happened, for a terminal."""
    bound = verdict.scenario.limits.deadline_s + 1.0
    rows = [f"{'fault':<34}{'times':>6}{'longest stall':>15}", "─" * 55]
    rows += [f"{kind:<34}{n:>6}{verdict.stalls.get(kind, 0.0):>13.2f} s" for kind, n in sorted(verdict.faults.items())]
    rows += [
        "─" * 55,
        f"{verdict.faults.total()} faults of {len(verdict.faults)} kinds, {verdict.outcomes.total()} requests "
        f"in {verdict.wall_s:.0f} s; seed {verdict.scenario.seed}",
        f"outcomes: {dict(verdict.outcomes.most_common())}",
        f"resumed elsewhere: {verdict.resumed}; KV moved: {verdict.moved_bytes / 1e6:.1f} MB; "
        f"bytes flipped in staging: {verdict.flipped}, caught: {verdict.caught}",
        f"longest request: {verdict.longest_s:.1f} s; every stall must stay under {bound:g} s",
        f"lives: {verdict.lives}",
        *(f"said {n} times: {sentence}" for sentence, n in verdict.sentences.most_common()),
    ]
    if verdict.problems:
        again = f"CHAOS_SEED={verdict.scenario.seed} CHAOS_REQUESTS={verdict.scenario.requests}"
        rows += [
            "",
            "BROKEN PROMISES",
            *verdict.problems,
            f"again: {again} CHAOS_FAULTS={verdict.faults.total()} make chaos",
        ]
    else:
        rows.append("every promise was kept: exact or refused with a reason, nothing held, nobody left hanging")
    return "\n".join(rows)


def document(verdict: Verdict) -> dict[str, Any]:
    """The same for bench/results."""
    scenario = dataclasses.asdict(verdict.scenario) | {"roles": [str(role) for role in verdict.scenario.roles]}
    found = {f.name: getattr(verdict, f.name) for f in dataclasses.fields(verdict) if f.name != "scenario"}
    return {
        "scenario": scenario,
        "stall_bound_s": verdict.scenario.limits.deadline_s + 1.0,
        "requests": verdict.outcomes.total(),
        "fault_count": verdict.faults.total(),
        "fault_kinds": len(verdict.faults),
        **{key: dict(value) if isinstance(value, dict) else value for key, value in found.items()},
    }


def main() -> int:
    scenario = Scenario(
        seed=int(os.environ.get("CHAOS_SEED", "1")),
        requests=int(os.environ.get("CHAOS_REQUESTS", "1200")),
        faults=int(os.environ.get("CHAOS_FAULTS", "225")),
    )
    with tempfile.TemporaryDirectory(prefix="chaos-") as directory:
        verdict = asyncio.run(chaos(scenario, make_tiny("llama", Path(directory))))
    print(table(verdict), flush=True)
    if not os.environ.get("CHAOS_NO_RESULT"):
        from bench.common import write  # a folder of scripts, found from the repository's root

        write("chaos", document(verdict))
    return 1 if verdict.problems else 0


if __name__ == "__main__":
    sys.exit(main())
