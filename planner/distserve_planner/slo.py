"""Latency targets in words and by class: which request is judged by which limits, and how a class and all of them fare.

A request belongs to the class that its trace row names (``slo_class``), else to the first class whose rule of lengths
it keeps. A run meets its targets when every class does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from distserve_planner.plan import Plan, TargetsOfClass
from distserve_planner.refusal import CannotPlan, only_known
from distserve_planner.simulation.result import SimulationResult, Slo
from distserve_planner.workload import Job

_LIMITS = ("ttft", "tpot", "attainment")
_RULES = ("min_prompt", "max_prompt", "min_output", "max_output")
_NO_MOST = 1 << 62


@dataclass(frozen=True, slots=True)
class SloClass:
    """One class. Lengths in tokens, both ends included: the rule for requests that name no class."""

    name: str
    slo: Slo
    min_prompt: int = 0
    max_prompt: int = _NO_MOST
    min_output: int = 0
    max_output: int = _NO_MOST

    def takes(self, job: Job) -> bool:
        return self.min_prompt <= job.prompt <= self.max_prompt and self.min_output <= job.output <= self.max_output

    @property
    def rule(self) -> str:
        """As on the command line; empty when it takes every length."""
        values = {name: getattr(self, name) for name in _RULES}
        return ",".join(f"{name}={value}" for name, value in values.items() if value not in (0, _NO_MOST))


@dataclass(frozen=True, slots=True)
class Share:
    """How one class fared. ``attainment``: share of its requests within both limits."""

    name: str
    requests: int
    attainment: float
    target: float

    @property
    def met(self) -> bool:
        return self.attainment >= self.target


@dataclass(frozen=True, slots=True)
class SloClasses:
    """At least one. One class without a name is targets for all alike."""

    classes: tuple[SloClass, ...]

    @property
    def several(self) -> bool:
        return len(self.classes) > 1 or bool(self.classes[0].name)

    @property
    def loosest(self) -> Slo:
        """What any run within the targets keeps: the loosest limits, the smallest share. For bounds and headings."""
        slos = [c.slo for c in self.classes]
        return Slo(max(s.ttft_s for s in slos), max(s.tpot_s for s in slos), min(s.attainment for s in slos))

    def scaled(self, factor: float) -> SloClasses:
        """All latency limits times ``factor``."""
        return SloClasses(tuple(replace(c, slo=c.slo.scaled(factor)) for c in self.classes))

    def kinds(self, jobs: Sequence[Job]) -> NDArray[np.int64]:
        """[n] the class of each job, by place. Raises CannotPlan for a job that no class takes."""
        names = {c.name: i for i, c in enumerate(self.classes) if c.name}
        found = np.empty(len(jobs), dtype=np.int64)
        for i, job in enumerate(jobs):
            kind = names.get(job.slo_class)
            if kind is None:
                kind = next((k for k, c in enumerate(self.classes) if c.takes(job)), None)
            if kind is None:
                raise CannotPlan(
                    f"request {i + 1} ({job.prompt} prompt and {job.output} answer tokens"
                    + (f", class {job.slo_class!r}" if job.slo_class else "")
                    + ") belongs to no class of --slo; give one class without a rule of lengths"
                )
            found[i] = kind
        return found

    def limits(self, kinds: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """[n] TTFT and [n] TPOT limits, seconds."""
        ttft = np.array([c.slo.ttft_s for c in self.classes])
        tpot = np.array([c.slo.tpot_s for c in self.classes])
        return ttft[kinds], tpot[kinds]

    def met(self, result: SimulationResult, kinds: NDArray[np.int64]) -> NDArray[np.bool_]:
        """[n] whether each request met both limits of its class."""
        ttft, tpot = self.limits(kinds)
        found: NDArray[np.bool_] = (result.ttft_s() < ttft) & (result.tpot_s() < tpot)
        return found

    def shares(self, met: NDArray[np.bool_], kinds: NDArray[np.int64]) -> tuple[Share, ...]:
        """Each class that has requests."""
        found = []
        for i, each in enumerate(self.classes):
            own = met[kinds == i]
            if len(own):
                found.append(Share(each.name, len(own), float(own.mean()), each.slo.attainment))
        return tuple(found)


def parse_slos(texts: Sequence[str]) -> SloClasses:
    """``ttft=0.2,tpot=0.1[,attainment=0.9]``, or several of ``NAME:ttft=…,tpot=…[,max_prompt=512]``.

    Raises CannotPlan.
    """
    classes = tuple(_class(text) for text in texts)
    names = [c.name for c in classes]
    if not classes:
        raise CannotPlan("--slo is needed: ttft=0.25,tpot=0.1")
    if len(classes) > 1 and "" in names:
        raise CannotPlan("--slo: several classes need a name each, such as --slo chat:ttft=0.25,tpot=0.1")
    if len(set(names)) < len(names):
        raise CannotPlan(f"--slo: class {next(n for n in names if names.count(n) > 1)!r} is given twice")
    return SloClasses(classes)


def parse_slo(text: str) -> Slo:
    """``ttft=0.2,tpot=0.1[,attainment=0.9]``, seconds. Raises CannotPlan."""
    words = pairs(text, "--slo")
    only_known(words, _LIMITS, "--slo")
    return _slo(words)


def _class(text: str) -> SloClass:
    name, colon, rest = text.partition(":")
    if not colon:
        return SloClass("", parse_slo(text))
    if not name.strip():
        raise CannotPlan(f"--slo: {text!r} has no name before its colon")
    words = pairs(rest, f"--slo {name}")
    only_known(words, (*_LIMITS, *_RULES), f"--slo {name}")
    rules = {}
    for key in _RULES:
        if key in words:
            if not words[key].isdigit():
                raise CannotPlan(f"--slo {name}: {key}={words[key]!r} is not a whole number of tokens")
            rules[key] = int(words[key])
    return SloClass(name.strip(), _slo(words), **rules)


def _slo(words: dict[str, str]) -> Slo:
    values: dict[str, float] = {}
    for key, word in words.items():
        if key not in _LIMITS:
            continue
        try:
            values[key] = float(word)
        except ValueError:
            raise CannotPlan(f"--slo: {key}={word!r} is not a number") from None
        if not values[key] > 0 or (key == "attainment" and values[key] > 1):
            raise CannotPlan(f"--slo: {key}={word} is out of range; limits are above 0, an attainment at most 1")
    if "ttft" not in values or "tpot" not in values:
        raise CannotPlan("--slo needs both limits in seconds, such as ttft=0.25,tpot=0.1")
    return Slo(values["ttft"], values["tpot"], values.get("attainment", 0.9))


def pairs(text: str, flag: str) -> dict[str, str]:
    """``key=value,key=value``. Raises CannotPlan."""
    found = [part.partition("=") for part in text.split(",") if part.strip()]
    if not found or any(not sep for _, sep, _ in found):
        raise CannotPlan(f"{flag}: {text!r} is not of the form key=value,key=value")
    return {key.strip(): word.strip() for key, _, word in found}


# ── in a plan ────────────────────────────────────────────────────────────────────────────────────────────────────────


def planned_classes(
    classes: SloClasses, met: NDArray[np.bool_], kinds: NDArray[np.int64]
) -> tuple[TargetsOfClass, ...]:
    """The named classes with what a simulation foretold of each; nothing when there are only common targets."""
    if not classes.several:
        return ()
    shares = {each.name: each for each in classes.shares(met, kinds)}
    return tuple(
        TargetsOfClass(
            c.name,
            c.slo.ttft_s,
            c.slo.tpot_s,
            c.slo.attainment,
            c.rule,
            shares[c.name].requests if c.name in shares else 0,
            shares[c.name].attainment if c.name in shares else 1.0,
        )
        for c in classes.classes
    )


def classes_of(plan: Plan) -> SloClasses:
    """The targets of a plan. Raises CannotPlan."""
    if not plan.slo_classes:
        return SloClasses((SloClass("", Slo(plan.slo.ttft_s, plan.slo.tpot_s, plan.slo.attainment)),))
    words = (
        f"{c.name}:ttft={c.ttft_s},tpot={c.tpot_s},attainment={c.attainment}" + (f",{c.rule}" if c.rule else "")
        for c in plan.slo_classes
    )
    return parse_slos(list(words))
