"""Is the planner right about this machine? Profile it, then verify 1 prefill + 1 decode and 2 mixed, three rates each.

Accepted: attainment within 5 points, median TTFT and TPOT within 15 % (`distserve verify`). Rates are shares of the
goodput that the simulation foretells for the layout, so that the question stays the same when the engine gets faster.
Leave the machine alone while it runs (about seven minutes). Parts can be run apart, in one folder:

    python bench/planner_live.py
    python bench/planner_live.py --folder F --part profile && python bench/planner_live.py --folder F --part 2mixed:0.5
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

from common import write

from distserve.cli.main import main as distserve
from distserve.core.types import Role
from distserve_planner import workload as workloads
from distserve_planner.latency.profile import read_profile
from distserve_planner.selection.rates import Outcome, goodput
from distserve_planner.simulation.deployment import policy
from distserve_planner.simulation.shared import Machine, simulate_shared

LAYOUTS = {"1p1d": (Role.PREFILL, Role.DECODE), "2mixed": (Role.MIXED, Role.MIXED)}
SHAPES = {"1p1d": ["--prefill", "n=1", "--decode", "n=1"], "2mixed": ["--mixed", "n=2"]}
SHARES = (0.3, 0.5, 0.7)
TTFT_S, TPOT_S, TARGET = 1.0, 0.1, 0.9
SLO = f"ttft={TTFT_S},tpot={TPOT_S},attainment={TARGET}"
LENGTHS = ((128, 48), (192, 32), (256, 64), (320, 64), (384, 96))  # prompt and answer tokens, equally often
REQUESTS = 400  # of the trace; a run takes as many as its duration holds


def profile(folder: Path, args: argparse.Namespace) -> None:
    given = ["--model", args.model, "--dtype", args.dtype, "--budget", str(args.budget)]
    if distserve(["profile", *given, "--plain", "--out", str(folder / "profile.json")]):
        raise SystemExit("the profile could not be made")


def trace(folder: Path, seed: int) -> Path:
    """Poisson arrivals at 1 a second."""
    rng, at, rows = random.Random(seed), 0.0, []
    for _ in range(REQUESTS):
        at += rng.expovariate(1.0)
        prompt, output = rng.choice(LENGTHS)
        rows.append(json.dumps({"arrival_s": at, "input_tokens": prompt, "output_tokens": output}))
    path = folder / "trace.jsonl"
    path.write_text("\n".join(rows) + "\n")
    return path


def foretold(folder: Path, layout: str, file: Path) -> float:
    """Goodput of the layout by simulation, requests a second."""
    machine = Machine(read_profile(folder / "profile.json"), LAYOUTS[layout], policy("serve"))
    requests = workloads.read(file)

    def trial(rate: float) -> Outcome:
        result = simulate_shared(machine, requests.at_rate(rate))
        return Outcome(result.ttft_s() < TTFT_S, result.tpot_s() < TPOT_S)

    return goodput(trial, TARGET, 2.0).rate


def part(folder: Path, layout: str, share: float, args: argparse.Namespace) -> dict[str, Any]:
    """One layout at one rate: a plan of it, verified."""
    file = trace(folder, args.seed)
    most = foretold(folder, layout, file)
    rate, plan, out = share * most, folder / f"{layout}-{share}.yaml", folder / f"{layout}-{share}.json"
    asked = ["--model", args.model, "--profile", str(folder / "profile.json"), *SHAPES[layout]]
    asked += ["--requests", str(file), "--rate", f"{rate:.4f}", "--slo", SLO]
    if distserve(["simulate", *asked, "--out", str(plan)]):
        raise SystemExit("the plan could not be made")
    distserve(["verify", str(plan), "--duration", str(args.seconds), "--plain", "--json", str(out)])
    if not out.exists():
        raise SystemExit("the plan could not be verified")
    document = json.loads(out.read_text())
    del document["requests"]
    document |= {"share": share, "foretold_goodput": most}
    out.write_text(json.dumps(document))
    return dict(document)


def collect(folder: Path, args: argparse.Namespace) -> None:
    """What is in the folder, as one result."""
    runs = {
        layout: [json.loads(f.read_text()) for share in SHARES if (f := folder / f"{layout}-{share}.json").exists()]
        for layout in LAYOUTS
    }
    found = json.loads((folder / "profile.json").read_text())
    del found["samples"]
    for layout, documents in runs.items():
        for d in documents:
            a, b = d["predicted"], d["measured"]
            off = ", ".join(f"{n} {a[f'{n}_p50_s'] / b[f'{n}_p50_s'] - 1:+.1%}" for n in ("ttft", "tpot"))
            points = 100 * (a["attainment"] - b["attainment"])
            word = "accepted" if d["accepted"] else "rejected"
            print(f"{layout:7} {d['rate']:5.2f} req/s: attainment {points:+.1f} points, medians {off}: {word}")
    workload = {"lengths": LENGTHS, "seconds": args.seconds, "seed": args.seed, "slo": SLO}
    write("planner_live", {"model": args.model, "workload": workload, "profile": found, "runs": runs})


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory() as made:
        folder = args.folder or Path(made)
        folder.mkdir(parents=True, exist_ok=True)
        if args.part in ("", "profile"):
            profile(folder, args)
        for layout in LAYOUTS:
            for share in SHARES:
                if args.part in ("", f"{layout}:{share}"):
                    part(folder, layout, share, args)
        if args.part in ("", "collect"):
            collect(folder, args)


def arguments() -> argparse.Namespace:
    parts = ["profile", *(f"{layout}:{share}" for layout in LAYOUTS for share in SHARES), "collect"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--budget", type=float, default=120.0, help="seconds for the profile [%(default)s]")
    parser.add_argument("--seconds", type=float, default=40.0, help="of arrivals in a run [%(default)s]")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=None, help="keep plans and parts here")
    parser.add_argument("--part", default="", choices=["", *parts], metavar="PART", help=", ".join(parts))
    return parser.parse_args()


if __name__ == "__main__":
    main()
