"""The bare machine: step times of the engine alone and beside busy instances, and KV moves, within a budget.

Processes are those an instance would be: same threads, same pools. Every shape is run in rounds, so that a slow moment
of the machine hurts all alike; when the time is over, there are fewer rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from distserve.engine.config import EngineConfig
from distserve.profiling.shapes import MOVED_TOKENS, Shape, design, sample_of
from distserve.profiling.worker import Facts, Worker, move
from distserve_planner.latency.profile import KINDS, Crowd, Extra, LinkCost, Sample
from distserve_planner.latency.regress import fit_extra, fit_link

Say = Callable[[str, float], None]
"""Told what is being measured, and the share of its part that is done."""

_ROUNDS = 8
_LEAST_ROUNDS = 2
_DECODE_REPEATS = 3  # a decode step is short: several a round
_SHORT_ROWS, _LONG_ROWS = 16, 600
_INTERRUPTED = 1.5
_MUCH_CONTEXT = 12_000  # tokens, beyond which a decode step is no longer short
_LEAST_CROWD_ROUNDS = 3
_LOADS = {"prefill": [Shape(((256, 0),))], "decode": [Shape((), 4, 256)]}
assert tuple(_LOADS) == KINDS
LINKS = ("shm", "gloo")


@dataclass(slots=True)
class Bare:
    """What was found."""

    facts: Facts
    samples: list[Sample] = field(default_factory=list)
    links: dict[str, LinkCost] = field(default_factory=dict)
    crowd: Crowd = field(default_factory=lambda: {kind: {other: Extra() for other in KINDS} for kind in KINDS})
    rounds: int = 0


def measure_bare(config: EngineConfig, instances: int, budget_s: float, say: Say) -> Bare:
    """More than half of the budget goes to steps alone, the rest to steps beside busy instances and to links."""
    began = time.monotonic()
    with ExitStack() as stack:
        names = [f"profile-{i}" for i in range(max(2, instances))]
        say("loading the model", 0.0)
        workers = [stack.enter_context(Worker(config, name)) for name in names]
        facts = [worker.answer() for worker in workers]
        bare = Bare(facts[0])
        shapes = design(bare.facts.max_len, config.kv_tokens, config.block_size)
        left = max(1.0, budget_s - (time.monotonic() - began))
        found, bare.rounds = _rounds(workers[0], shapes, 0.6 * left, say, "steps alone")
        bare.samples += [_sample(s, t) for s, t in found.items()]
        if instances > 1:
            bare.crowd = _crowd(workers, sample_of(shapes), 0.25 * left, say)
        for i, kind in enumerate(LINKS):
            say(f"KV over {kind}", i / len(LINKS))
            room = min(config.kv_tokens, bare.facts.max_len)
            sizes = [tokens for tokens in MOVED_TOKENS if tokens <= room]
            bare.links[kind] = fit_link(move(workers[0], workers[1], (names[0], names[1]), kind, sizes))
    return bare


def _rounds(
    worker: Worker, shapes: Sequence[Shape], budget_s: float, say: Say, what: str
) -> tuple[dict[Shape, list[float]], int]:
    """Times of each shape, in rounds of all shapes after a warm-up by the short ones. At least two rounds are made,
    whatever the budget; long steps are run once."""
    found: dict[Shape, list[float]] = {shape: [] for shape in shapes}
    for shape in shapes:
        if shape.rows <= _SHORT_ROWS or not shape.chunks:  # every page of the pool is touched, too
            worker.ask("run", shape, 1)
    began, rounds = time.monotonic(), 0
    while rounds < _ROUNDS:
        for i, shape in enumerate(shapes):
            if not rounds or shape.rows <= _LONG_ROWS:
                found[shape] += worker.ask("run", shape, _repeats(shape))
            share = (rounds + i / len(shapes)) / _LEAST_ROUNDS
            say(what, min(1.0, share, (time.monotonic() - began) / budget_s))
        rounds += 1
        spent = time.monotonic() - began
        if rounds >= _LEAST_ROUNDS and spent + spent / rounds > budget_s:
            break
    return found, rounds


def _crowd(workers: Sequence[Worker], shapes: Sequence[Shape], budget_s: float, say: Say) -> Crowd:
    """Steps alone, while every other instance prefills, and while every other decodes: in turns, so that a slow moment
    of the machine hurts all three; the lower quartile of each, for the rest is such moments."""
    began, rounds = time.monotonic(), 0
    taken: dict[str, dict[Shape, list[float]]] = {name: {s: [] for s in shapes} for name in ("", *_LOADS)}
    while rounds < _LEAST_CROWD_ROUNDS or (rounds < _ROUNDS and time.monotonic() - began < budget_s):
        for name, times in taken.items():
            with _busy(workers[1:], name):
                for shape in shapes:
                    times[shape] += workers[0].ask("run", shape, _repeats(shape))
            say("steps beside busy instances", min(1.0, (time.monotonic() - began) / budget_s))
        rounds += 1
    typical = {name: {s: statistics.quantiles(t, n=4)[0] for s, t in times.items()} for name, times in taken.items()}
    return {
        kind: {
            name: fit_extra(
                [(typical[""][s], typical[name][s]) for s in shapes if bool(s.chunks) == (kind == "prefill")]
            )
            for name in _LOADS
        }
        for kind in KINDS
    }


def _repeats(shape: Shape) -> int:
    return 1 if shape.chunks or shape.kv_tokens > _MUCH_CONTEXT else _DECODE_REPEATS


@contextmanager
def _busy(workers: Sequence[Worker], load: str) -> Iterator[None]:
    """Keep these workers at a load; an empty one leaves them idle."""
    if not load:
        yield
        return
    for worker in workers:
        worker.ask("busy", _LOADS[load])
    try:
        yield
    finally:
        for worker in workers:
            worker.tell("idle")
            worker.answer()  # of ``busy``, which ends with the next command
            worker.answer()


def _typical(times: Sequence[float]) -> float:
    """The median of the runs that nothing interrupted: one that took half as long again as the best was."""
    return statistics.median(t for t in times if t <= _INTERRUPTED * min(times))


def _sample(shape: Shape, times: list[float]) -> Sample:
    return Sample(shape.chunks, shape.decodes, shape.decodes * shape.context, _typical(times), min(times), len(times))
