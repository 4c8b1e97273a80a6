"""A thousand seeds of every kind of trouble, the same ones each time, and what a seed and a plan are.

Run ten thousand with ``make faults``; a failing seed names the command that replays it with its log.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.faults.breakages import BY_NAME, switched_on
from tests.faults.coverage import Coverage
from tests.faults.draw import PROFILES, draw
from tests.faults.plan import Case, load, save
from tests.faults.shrink import Shrinker
from tests.faults.world import World, command, run_plan, run_seed

SEEDS = 100
"""Of each profile: the thousand seeds of the normal test run."""


def account(seed: int, profile: str, problem: str) -> str:
    """What a developer needs who sees this seed fail."""
    log = run_seed(seed, profile=profile, trace=True).trace[-40:]
    return "\n".join([*log, problem, f"replay: {command(seed, profile)}"])


@pytest.mark.parametrize("profile", PROFILES)
def test_every_property_holds(profile: str) -> None:
    assert SEEDS * len(PROFILES) >= 1000
    for seed in range(SEEDS):
        outcome = run_seed(seed, profile=profile)
        assert not outcome.problem, account(seed, profile, outcome.problem)


def test_what_is_feared_really_happens() -> None:
    """The seeds would prove nothing if KV never moved, nothing was lost and nobody had to try again."""
    coverage = Coverage()
    seen: Counter[str] = Counter()
    ends: Counter[str] = Counter()
    for profile in PROFILES:
        for seed in range(200, 214):
            outcome = run_seed(seed, profile=profile)
            assert not outcome.problem, account(seed, profile, outcome.problem)
            coverage.add(outcome.coverage)
            seen += outcome.seen
            ends += outcome.ends
    assert not coverage.missing(), coverage.table()
    for rare in ("in: committed", "in: wrong", "in: timed", "out: peer", "in: abandoned", "in: finished"):
        assert seen[rare], f"{rare} never happened: {seen}"
    served = ends["length"] + ends["stop"]
    assert served > 0.7 * ends.total(), f"too few requests come through for this to mean much: {ends}"


def test_a_seed_is_one_history_under_every_hash_seed() -> None:
    digests = {
        subprocess.run(
            [sys.executable, "-m", "tests.faults", "--digest", "3", "--profile", "storm", "--topology", "2P2D"],
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("0", "1", "31337")
    }
    assert len(digests) == 1
    assert digests != {""}


def test_a_journal_replayed_through_fresh_machines_gives_the_same_effects() -> None:
    world = World(draw(5, "storm", "2P2D"), journal=True)
    assert not world.run().problem
    assert world.watcher.journal
    machines: dict[tuple[str, int], Any] = {}
    for entry in world.watcher.journal:
        key = (entry.process.name, entry.life)
        if key not in machines:
            entry.process.incarnation = entry.life
            machines[key] = entry.process.new_machine()
        assert machines[key].handle(entry.event, entry.now) == entry.effects


def test_a_saved_plan_runs_as_its_seed_did(tmp_path: Path) -> None:
    plan = draw(11, "storm")
    save(Case("nothing", "", plan), tmp_path / "case.json")
    again = load(tmp_path / "case.json").plan
    assert again == plan
    assert run_plan(again, digest=True).digest == run_seed(11, profile="storm", digest=True).digest


def test_a_failing_seed_is_shrunk_to_a_small_plan_that_fails_alike(tmp_path: Path) -> None:
    with switched_on(BY_NAME["a lost source is not noticed"]):
        outcome = next(o for o in (run_seed(s, profile="crash") for s in range(60)) if o.problem)
        small = Shrinker(outcome, most=150).shrink()
        save(Case("", "", small.plan), tmp_path / "small.json")
        assert run_plan(load(tmp_path / "small.json").plan).broken is outcome.broken is small.outcome.broken
    assert len(small.plan.clients) <= 2 < len(outcome.plan.clients)
    assert len(small.plan.faults) <= 1
    assert not run_plan(small.plan).problem
