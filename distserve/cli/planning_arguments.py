"""The flags of the commands that measure this machine for the planner, and plans on it."""

from __future__ import annotations

import argparse
from pathlib import Path

from distserve.launch.options import DTYPES


def profile(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="NAME", help="as for serve, such as smollm2-135m")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="profile.json")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="of weights and KV [%(default)s]")
    parser.add_argument("--instances", type=int, default=2, metavar="N", help="that share this machine [%(default)s]")
    parser.add_argument(
        "--threads-per-rank", type=int, default=None, metavar="N", help="of each instance [cores / instances]"
    )
    parser.add_argument("--budget", type=float, default=120.0, metavar="SECONDS", help="about so long [%(default)s]")
    parser.add_argument("--kv-tokens", type=int, default=65_536, metavar="N", help="KV pool [%(default)s]")
    parser.add_argument("--block-size", type=int, default=16, metavar="N", help="[%(default)s]")
    parser.add_argument("--tokenizer", default="", metavar="DIR", help="where the model has none")
    parser.add_argument("--no-live", action="store_true", help="leave out what a running cluster adds to the engine")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of prompts [%(default)s]")
    parser.add_argument("--plain", action="store_true", help="no progress line")


def verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", type=Path, metavar="PLAN", help="a plan made with a profile of this machine")
    parser.add_argument("--json", type=Path, default=None, metavar="OUT", help="write everything here, too")
    what = parser.add_argument_group("what is replayed")
    what.add_argument("--profile", default="", metavar="FILE", help="another profile than the plan's")
    what.add_argument("--model", default="", metavar="NAME", help="where the plan's model is [the plan's name]")
    what.add_argument("--trace", type=Path, default=None, metavar="FILE", help="another trace than the plan's")
    what.add_argument("--rate", type=float, default=None, metavar="R", help="requests a second [the plan's]")
    what.add_argument("--duration", type=float, default=60.0, metavar="S", help="of arrivals, at most [%(default)s]")
    what.add_argument("--seed", type=int, default=1, metavar="N", help="of prompts and arrivals [%(default)s]")
    what.add_argument(
        "--as-profiled", action="store_true", help="do not ask by single requests how fast the machine is just now"
    )
    bounds = parser.add_argument_group("accepted within")
    bounds.add_argument("--points", type=float, default=5.0, metavar="X", help="points of attainment [%(default)s]")
    bounds.add_argument("--median", type=float, default=0.15, metavar="X", help="relative, TTFT and TPOT [%(default)s]")
    bounds.add_argument(
        "--goodput-bound", type=float, default=0.25, metavar="X", help="relative, with --goodput [%(default)s]"
    )
    more = parser.add_argument_group("more")
    more.add_argument("--goodput", action="store_true", help="also search the goodput and compare it (minutes)")
    more.add_argument(
        "--recalibrate", type=Path, default=None, metavar="FILE", help="write a profile that fits what was measured"
    )
    more.add_argument("--tokenizer", default="", metavar="DIR", help="where the model has none")
    more.add_argument("--plain", action="store_true", help="no progress line")


def replan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", type=Path, metavar="PLAN", help="plan.yaml, what runs now")
    parser.add_argument("--trace", required=True, type=Path, metavar="FILE", help="what `distserve record` wrote")
    parser.add_argument("--profile", default="", metavar="NAME", help="latencies, as for simulate [the plan's]")
    parser.add_argument("--gain", type=float, default=0.02, metavar="X", help="least gain of a change [%(default)s]")
    parser.add_argument(
        "--tolerance", type=float, default=0.1, metavar="X", help="a smaller difference is no drift [%(default)s]"
    )
    parser.add_argument("--out", type=Path, default=None, metavar="FILE", help="a plan with the proposed roles")
    parser.add_argument("--json", type=Path, default=None, metavar="OUT", help="write everything here, too")
