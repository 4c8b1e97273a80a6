"""The search: pruning drops no optimum, answers repeat and resume, ratios and fleets add up, refusals are sentences."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest

from distserve_planner.cluster import Cluster, Pod, cluster_of, uniform
from distserve_planner.hardware import gpu_named
from distserve_planner.models import load_model
from distserve_planner.placement import Path as LinkPath
from distserve_planner.plan import as_text, read_plan, write_plan
from distserve_planner.refusal import CannotPlan
from distserve_planner.selection import Effort, FromFit, FromTables, Problem, search
from distserve_planner.selection.candidates import Shape, Unit, low_affinity_pairs, ratios, shapes
from distserve_planner.selection.explore import Explorer, free_ratios, gpus
from distserve_planner.selection.memo import Memo
from distserve_planner.selection.problem import trials_of
from distserve_planner.selection.rates import STEP, Outcome, goodput
from distserve_planner.selection.verdict import plan_from
from distserve_planner.simulation.result import Slo
from distserve_planner.workload import SHAREGPT, Constant, Workload, poisson, synthetic

A100 = gpu_named("a100-80g")
QUICK = Effort(requests=300, final_requests=300)


class Closed:
    """Trials in closed form: each phase of each shape has a capacity; a pool of n serves more than n times it."""

    def __init__(self, seed: int, found: list[Shape]) -> None:
        rng = random.Random(seed)
        self.rate = {s: (rng.uniform(1, 8) * s.gpus**0.8, rng.uniform(1, 8) * s.gpus**0.9) for s in found}
        self.loose = rng.uniform(1.0, 3.0)
        self._order = np.random.default_rng(seed).random(1000)
        self.tried = 0

    def capacity(self, unit: Unit) -> float:
        limits = []
        for shape, count, phases in (
            (unit.prefill, unit.n_prefill, (0,)),
            (unit.decode, unit.n_decode, (1,)),
            (unit.mixed, unit.n_mixed, (0, 1)),
        ):
            if shape is not None and count:
                limits.append(count * (2 - 1 / count) * 1 / sum(1 / self.rate[shape][i] for i in phases))
        return min(limits)

    def trial(self, unit: Unit, rate: float) -> Outcome:
        self.tried += 1
        share = 1 / (1 + (rate / self.capacity(unit)) ** 5 / 9)
        return Outcome(self._order < share, np.ones(1000, bool))

    def bound(self, unit: Unit) -> float:
        return self.capacity(unit) * self.loose * 1.1

    def guess(self, unit: Unit) -> float:
        return 1.0


def some_shapes(seed: int) -> list[Shape]:
    rng = random.Random(seed)
    every = [Shape(A100, tp, pp) for tp in (1, 2, 4) for pp in (1, 2)]
    return sorted(rng.sample(every, rng.randint(2, 4)), key=str)


@pytest.mark.parametrize("seed", range(25))
def test_pruning_never_drops_the_optimum(seed):
    """The whole of Algorithm 1 with free ratios, and colocated units, against measuring every unit."""
    found = some_shapes(seed)
    answers, tried = [], []
    for exhaustive in (False, True):
        trials = Closed(seed, found)
        explorer = Explorer(trials, 0.9, Memo(), exhaustive=exhaustive)
        units = dict.fromkeys((u for p in found for d in found for u in ratios(p, d, {A100: 12}, 12)), float("inf"))
        units |= {Unit(mixed=s, n_mixed=n): float("inf") for s in found for n in (1, 2)}
        best = explorer.rank(units, gpus, units).best
        assert best is not None
        answers.append((best.rate / best.unit.gpus, best.unit))
        tried.append(trials.tried)
    assert answers[0] == answers[1]
    assert tried[0] < tried[1]


@pytest.mark.parametrize("seed", range(10))
def test_bounds_from_phases_hold(seed):
    """A unit never serves more than its phases allow, pools included."""
    found = some_shapes(seed)
    trials = Closed(seed, found)
    phases = Explorer(trials, 0.9, Memo()).phases(found, {A100: 8})
    bounded = free_ratios(phases, {A100: 8}, 8)
    assert bounded
    for unit, bound in bounded.items():
        assert goodput(lambda r, u=unit: trials.trial(u, r), 0.9, 1.0).rate <= bound * STEP  # type: ignore[misc]


def test_the_order_of_the_answer_does_not_depend_on_the_order_of_the_question():
    found = some_shapes(3)
    units = [Unit(prefill=p, decode=d, n_prefill=1, n_decode=1) for p in found for d in found]
    first = Explorer(Closed(3, found), 0.9, Memo()).rank(units, gpus)
    second = Explorer(Closed(3, found), 0.9, Memo()).rank(units[::-1], gpus)
    assert [e.unit for e in first.entries] == [e.unit for e in second.entries]


# ── on the simulator ─────────────────────────────────────────────────────────────────────────────────────────────────


def sharegpt(requests: int = 340) -> Workload:
    return synthetic(SHAREGPT, poisson(1.0), requests, 0, "sharegpt")


def problem(**changes: object) -> Problem:
    asked = Problem(
        model=load_model("opt-13b"),
        cluster=uniform("lab", A100, 1, 4),
        workload=sharegpt(),
        slo=Slo(0.25, 0.1),
        rate=2.0,
        latency=FromFit("distserve:a100-80g", "opt-13b"),
        algorithm="low",
        policy="distserve",
        mixed_policies=("vllm-2023",),
        effort=QUICK,
    )
    return dataclasses.replace(asked, **changes)  # type: ignore[arg-type]


def test_the_nine_pairs_of_one_node_with_four_gpus():
    asked = problem()
    found = [s for s in shapes(asked.model, asked.cluster, 2048) if s.gpus < 4]
    pairs = list(low_affinity_pairs(asked.cluster, found))
    assert len(pairs) == 9
    assert all(pair.gpus <= 4 for pair in pairs)


def test_a_pruned_search_on_the_simulator_answers_as_an_exhaustive_one():
    quick, thorough = search(problem()), search(problem(), exhaustive=True)
    assert quick.best.unit == thorough.best.unit
    assert quick.best.rate == thorough.best.rate
    assert quick.ranking.trials < thorough.ranking.trials
    trials = trials_of(thorough.problem, 300)
    for entry in thorough.ranking.entries:
        assert entry.rate <= trials.bound(entry.unit)


def test_a_search_repeats_itself_and_goes_on_from_its_file(tmp_path: Path):
    file = tmp_path / "memo.jsonl"
    first = search(problem(), resume=file)
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[: len(lines) // 2]) + '\n{"torn": ')
    seen: list[str] = []
    second = search(problem(), resume=file, progress=lambda done, total, words: seen.append(words))
    assert plan_from(first) == plan_from(second)
    assert 0 < len(seen) < len(lines)
    again: list[str] = []
    search(problem(slo=Slo(0.3, 0.1)), resume=file, progress=lambda done, total, words: again.append(words))
    assert len(again) >= len(lines)  # another question takes nothing from the file


def test_two_workers_find_what_one_finds():
    assert plan_from(search(problem(), workers=2)) == plan_from(search(problem()))


def test_looser_limits_never_serve_less():
    unit = Unit(prefill=Shape(A100, 2), decode=Shape(A100), n_prefill=1, n_decode=1)
    rates = []
    for scale in (0.7, 1.0, 1.5):
        trials = trials_of(problem(slo=Slo(0.25 * scale, 0.1 * scale)), 300)
        rates.append(goodput(lambda rate, t=trials: t.trial(unit, rate), 0.9, 2.0).rate)  # type: ignore[misc]
    assert rates == sorted(rates) and rates[0] < rates[-1]


def test_free_ratios_beat_one_to_one():
    """A prompt-heavy load whose decode instance idles beside one prefill instance."""
    load = synthetic(Constant(1500, 20), poisson(1.0), 340, 0, "long")
    asked = problem(cluster=uniform("lab", A100, 1, 5), workload=load, slo=Slo(1.0, 0.1), mixed_policies=())
    pairs, free = search(asked), search(dataclasses.replace(asked, algorithm="high"))
    assert free.best.unit.n_prefill > free.best.unit.n_decode
    assert free.best.rate / free.best.unit.gpus > 1.15 * pairs.best.rate / pairs.best.unit.gpus


def test_stay_colocated_is_an_answer_confirmed_by_simulating_both():
    """ShareGPT at TTFT 0.25 s and TPOT 0.1 s on one node of four A100s, the same engine in both: two tensor-parallel
    ranks that do both phases beat any split, whose decode side idles below its TPOT limit.
    """
    asked = problem(effort=Effort(requests=1000, final_requests=1000), workload=sharegpt(1050))
    result = search(asked)
    assert result.best.unit.colocated
    plan = plan_from(result)
    assert plan.why.startswith("Stay colocated")
    assert plan.count("mixed") == len(plan.instances) > 0
    trials, other = trials_of(result.problem, 1000), result.finalists[0]
    assert other.found is not None and result.best.found is not None
    rate = 0.97 * result.best.rate / result.best.unit.gpus  # a GPU
    met = {}
    for name, unit in (("mixed", result.best.unit), ("split", other.unit)):
        outcome = trials.trial(unit, rate * unit.gpus)
        met[name] = float((outcome.ttft_met & outcome.tpot_met).mean())
    assert met["mixed"] >= 0.9 > met["split"]


def test_a_fleet_is_sized_for_the_rate_and_placed(tmp_path: Path):
    cluster = uniform("two", A100, 2, 4, network_gbs=25)
    effort = Effort(requests=300, final_requests=300, unit_gpus=4)
    asked = problem(cluster=cluster, rate=6.0, algorithm="high", mixed_policies=(), effort=effort)
    result = search(asked)
    fleet, plan = result.fleet, plan_from(result)
    assert fleet.found.rate >= 6.0 and plan.prediction.attainment >= 0.9
    assert len(plan.instances) == fleet.unit.n_prefill + fleet.unit.n_decode
    assert sum(len(stage.gpus) for i in plan.instances for stage in i.stages) == fleet.unit.gpus <= cluster.gpus
    assert 0 < fleet.placement.worst < 1
    write_plan(plan, tmp_path / "plan.yaml")
    again = read_plan(tmp_path / "plan.yaml")
    assert [i.id for i in again.instances] == [i.id for i in plan.instances]
    assert "goodput" in as_text(again)


def test_slices_keep_their_kv_on_one_node():
    result = search(problem(cluster=uniform("two", A100, 2, 4), rate=6.0, mixed_policies=()))
    assert result.fleet.unit.one_node and result.fleet.copies >= 1
    assert set(result.fleet.placement.paths) <= {LinkPath.NVLINK, LinkPath.PCIE}


def test_pods_of_one_instance_pay_for_the_network():
    nodes = {"nodes": [{"gpu": "a100-80g", "gpus": 4}], "network_gbs": 0.5}
    unit = Unit(prefill=Shape(A100, 2), decode=Shape(A100), n_prefill=1, n_decode=1)
    rates = {}
    for pod in Pod:
        cluster: Cluster = cluster_of(nodes | {"pod": pod.value})
        trials = trials_of(problem(cluster=cluster), 300)
        rates[pod] = goodput(lambda rate, t=trials: t.trial(unit, rate), 0.9, 2.0).rate  # type: ignore[misc]
    assert rates[Pod.INSTANCE] < 0.5 * rates[Pod.SLICE]


def test_cost_decides_when_it_is_the_objective():
    cheap = {"like": "a100-80g", "price_per_hour": 0.5}
    cluster = cluster_of(
        {
            "gpu_types": {"cheap": cheap},
            "nodes": [{"gpu": "a100-80g", "gpus": 4, "price_per_hour": 4.0}, {"gpu": "cheap", "gpus": 4}],
        }
    )
    result = search(problem(cluster=cluster, objective="cost"))
    assert {shape.gpu.name for shape in result.fleet.shapes} == {"cheap"}
    assert plan_from(result).prediction.cost_per_million > 0


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": load_model("opt-175b")}, "opt-175b does not fit: .* 8 of them in one instance would do"),
        ({"slo": Slo(0.001, 0.1)}, "no configuration meets TTFT 0.001 s .* the least are TTFT 0.0"),
        ({"slo": Slo(0.25, 0.001)}, "no configuration meets .* TPOT 0.0"),
        ({"rate": 500.0}, "500 req/s need .* but lab holds .* which serve"),
        ({"algorithm": "hihg"}, "did you mean 'high'"),
        ({"objective": "costs"}, "did you mean 'cost'"),
        ({"objective": "cost"}, "needs a price"),
        ({"workload": Workload(())}, "holds no requests"),
        ({"workload": synthetic(Constant(4000, 10), poisson(1.0), 50, 0)}, "longer than the 2048 tokens"),
        (
            {"model": load_model("llama-3.1-8b"), "latency": FromFit("distserve:a100-80g", "llama-3.1-8b")},
            "no data for model 'llama-3.1-8b'",
        ),
        ({"model": load_model("deepseek-v3"), "latency": FromTables(load_model("deepseek-v3"))}, "does not fit"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_a_sentence(changes, words):
    with pytest.raises(CannotPlan, match=words):
        search(problem(**changes))
