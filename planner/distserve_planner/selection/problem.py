"""The question put to a search: model, cluster, workload, targets, and how long to measure. Checked; digested for
resuming.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np

from distserve_planner.cluster import Cluster
from distserve_planner.memory import DEFAULT_RULE, MemoryRule
from distserve_planner.models import ModelFacts
from distserve_planner.refusal import CannotPlan, nearest
from distserve_planner.selection.trials import LatencySource, SimulatedTrials
from distserve_planner.simulation.result import Slo
from distserve_planner.slo import SloClasses
from distserve_planner.workload import Resampled, Workload, burstiness, gamma, poisson, synthetic

ALGORITHMS = ("auto", "high", "low")
OBJECTIVES = ("goodput", "cost", "fewest")
_TELLING, _POISSON = 50, 0.2  # arrivals that tell their burstiness; how near 1 it counts as Poisson's
_TOO_MANY = 0.05  # share of the requests that may be left out for their length


@dataclass(frozen=True, slots=True)
class Effort:
    """How long is measured. ``requests`` a trial while choosing, ``final_requests`` for the finalists (steady state:
    runs of 300 overstate goodput by a third and more). ``unit_gpus``: the largest unit looked at.
    """

    requests: int = 2000
    final_requests: int = 6000
    finalists: int = 4
    unit_gpus: int = 8
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Problem:
    """What is asked. ``rate`` in requests a second; ``mixed_policies`` are compared with each other. ``mixed_latency``
    is for colocated instances that are of another engine than the disaggregated ones.
    """

    model: ModelFacts
    cluster: Cluster
    workload: Workload
    slo: Slo
    rate: float
    latency: LatencySource
    mixed_latency: LatencySource | None = None
    algorithm: str = "auto"
    objective: str = "goodput"
    policy: str = "chunked"
    mixed_policies: tuple[str, ...] = ("chunked",)
    effort: Effort = Effort()
    rule: MemoryRule = DEFAULT_RULE
    classes: SloClasses | None = None  # several; ``slo`` is then their loosest

    def check(self) -> None:
        """Raises CannotPlan for words that are not known."""
        for what, word, known in (("algorithm", self.algorithm, ALGORITHMS), ("objective", self.objective, OBJECTIVES)):
            if word not in known:
                raise CannotPlan(f"unknown {what} {word!r}{nearest(word, known)} (known: {', '.join(known)})")
        if self.objective == "cost" and any(gpu.price_per_hour <= 0 for gpu in self.cluster.gpu_types):
            raise CannotPlan("objective cost needs a price: give every node of the cluster price_per_hour")

    @property
    def digest(self) -> str:
        """Equal questions have equal digests: what a resumed search goes by."""
        jobs = repr([(job.prompt, job.output, job.arrival_s) for job in self.workload.jobs])
        latencies = (self.latency, self.mixed_latency)
        words = repr((self.model, self.cluster, self.slo, latencies, self.policy, self.effort, self.rule, self.classes))
        return hashlib.sha256((words + jobs).encode()).hexdigest()[:16]


def trials_of(problem: Problem, requests: int) -> SimulatedTrials:
    """Trials of ``requests`` requests each."""
    return SimulatedTrials(
        problem.cluster,
        problem.latency,
        steady(problem.workload, requests, problem.effort.seed),
        problem.slo,
        problem.policy,
        problem.mixed_latency,
        problem.classes,
    )


def steady(workload: Workload, requests: int, seed: int) -> Workload:
    """``requests`` jobs like these: the trace itself when it is long enough, else its lengths with arrivals as bursty
    as its own (Gamma gaps of the same coefficient of variation), Poisson when it tells too little.
    """
    if len(workload.jobs) >= requests and workload.span_s > 0:
        return replace(workload, jobs=tuple(sorted(workload.jobs, key=lambda j: j.arrival_s)[:requests]))
    arrivals = gamma(1.0, burstiness(workload)) if drawn_bursty(workload) else poisson(1.0)
    drawn = synthetic(Resampled(workload.lengths()), arrivals, requests, seed, workload.name)
    if not any(job.slo_class for job in workload.jobs):
        return drawn
    source = np.random.default_rng([seed, 1]).integers(0, len(workload.jobs), requests)  # as ``Resampled`` draws
    named = (replace(job, slo_class=workload.jobs[i].slo_class) for job, i in zip(drawn.jobs, source, strict=True))
    return replace(drawn, jobs=tuple(named))


def drawn_bursty(workload: Workload) -> bool:
    """Whether a trace has arrivals enough to tell their burstiness, and they are not Poisson's."""
    sure = len(workload.jobs) >= _TELLING and workload.span_s > 0
    return sure and abs(burstiness(workload) - 1) > _POISSON


def shortened(problem: Problem) -> tuple[Problem, str]:
    """The problem without requests longer than the model takes, and a note that says so.

    Raises CannotPlan when the workload is empty or more than a twentieth of it is too long.
    """
    jobs, limit = problem.workload.jobs, problem.model.max_len
    if not jobs:
        raise CannotPlan("the workload holds no requests; a plan needs at least one")
    kept = tuple(job for job in jobs if job.prompt + job.output <= limit)
    if len(kept) == len(jobs):
        return problem, ""
    out = len(jobs) - len(kept)
    longest = max(job.prompt + job.output for job in jobs)
    if out > _TOO_MANY * len(jobs):
        raise CannotPlan(
            f"{out} of {len(jobs)} requests are longer than the {limit} tokens that {problem.model.name} takes (the "
            f"longest has {longest}); choose a model with a longer context, or cut the trace"
        )
    words = f"{out} of {len(jobs)} requests longer than the model's {limit} tokens are left out"
    return replace(problem, workload=replace(problem.workload, jobs=kept)), words
