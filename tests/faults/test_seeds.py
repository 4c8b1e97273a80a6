"""A few hundred seeds of every kind of trouble, and proof that they would notice.

Run more with ``python -m tests.faults --seeds 5000``; a failing seed names the command that replays it with its log.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest

from distserve.kv.ledger import BlockLedger
from distserve.kv.shape import Coverage
from distserve.sched.arrivals import Arrivals
from distserve.sched.closing import Closing
from distserve.sched.residents import Residents
from distserve.sched.stream import Stream
from tests.faults.plan import PROFILES, draw
from tests.faults.world import World, command, run_seed

SEEDS = 30


def account(seed: int, profile: str, problem: str) -> str:
    """What a developer needs who sees this seed fail."""
    log = run_seed(seed, profile=profile, trace=True).trace[-40:]
    return "\n".join([*log, problem, f"replay: {command(seed, profile)}"])


@pytest.mark.parametrize("profile", PROFILES)
def test_every_property_holds(profile: str) -> None:
    for seed in range(SEEDS):
        outcome = run_seed(seed, profile=profile)
        assert not outcome.problem, account(seed, profile, outcome.problem)


def test_what_is_feared_really_happens() -> None:
    """The seeds would prove nothing if KV never moved, nothing was lost and nobody had to try again."""
    seen: Counter[str] = Counter()
    ends: Counter[str] = Counter()
    for profile in ("noise", "breaks", "crash", "forget", "data"):
        for seed in range(200, 212):
            outcome = run_seed(seed, profile=profile)
            seen += outcome.seen
            ends += outcome.ends
    for rare in ("in: committed", "in: wrong", "in: timed", "out: peer", "in: abandoned", "in: finished"):
        assert seen[rare], f"{rare} never happened: {seen}"
    for rare in ("kv tokens moved", "repeated", "dropped", "retries", "preemptions"):
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


# ── the harness notices ──────────────────────────────────────────────────────────────────────────────────────────────


def always(value: Any) -> Any:
    return lambda *_, **__: value


def release_at_once(self: Residents, sequence: Any) -> None:
    self.ledger.release(sequence.owner)


def grow_too_little(self: BlockLedger, owner: str, need_tokens: int) -> bool:
    return self.grow_rightly(owner, need_tokens - 1)  # type: ignore[attr-defined, no-any-return]


BREAKAGES = {
    "commits before the KV has come": (Coverage, "covers", always(True), "data"),
    "takes any epoch": (Stream, "is_current", always(True), "forget"),
    "frees blocks that a step writes": (Residents, "_release", release_at_once, "noise"),
    "tells nobody to let go": (Closing, "open", always([]), "calm"),
    "leases never end": (Arrivals, "next_deadline", always(None), "calm"),
    "writes past its blocks": (BlockLedger, "grow", grow_too_little, "calm"),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_broken_machine_is_noticed(breakage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, name, wrong, profile = BREAKAGES[breakage]
    monkeypatch.setattr(where, f"{name}_rightly", getattr(where, name), raising=False)
    monkeypatch.setattr(where, name, wrong)
    assert any(run_seed(seed, profile=profile).problem for seed in range(150)), "150 seeds noticed nothing"
