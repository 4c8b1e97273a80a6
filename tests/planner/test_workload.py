"""Workloads: read, drawn, stretched; and what is refused."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest

from distserve_planner.refusal import CannotPlan
from distserve_planner.selection.problem import steady
from distserve_planner.workload import (
    SHAREGPT,
    Arrivals,
    Constant,
    Fitted,
    Job,
    Resampled,
    Workload,
    arrivals_named,
    burstiness,
    gamma,
    named,
    poisson,
    read,
    replayed,
    resampled,
    spread_ticks,
    synthetic,
    varying,
)

ROWS = [
    {"arrival_s": 0.0, "input_tokens": 130, "output_tokens": 7, "prefix_blocks": [0, 1, 2], "session_id": "a"},
    {"arrival_s": 1.5, "input_tokens": 64, "output_tokens": 9, "prefix_blocks": [0], "client": "c"},
]


def gaps(times: np.ndarray) -> np.ndarray:
    return np.diff(times, prepend=0.0)


def test_a_trace_and_a_list_are_read(tmp_path: Path) -> None:
    trace, plain, lines = tmp_path / "t.jsonl.gz", tmp_path / "r.json", tmp_path / "r.jsonl"
    trace.write_bytes(gzip.compress("\n".join(json.dumps(r) for r in ROWS).encode()))
    plain.write_text("[[130, 7, 0.0], [64, 9, 1.5]]")
    lines.write_text("[130, 7, 0.0]\n[64, 9, 1.5]\n")
    read_trace = read(trace)
    assert read_trace.prefix_tokens == 64
    assert read_trace.jobs[0] == Job(130, 7, 0.0, (0, 1, 2), "a")
    assert read_trace.jobs[1].client == "c"
    assert read(plain).jobs == read(lines).jobs == (Job(130, 7, 0.0), Job(64, 9, 1.5))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no requests"),
        ("[]", "holds no requests"),
        ("{nonsense", "is not JSON"),
        ("[[1, 2]]", r"request 1: \[prompt tokens"),
        ("[[0, 2, 0.0]]", "at least 1"),
        ("[[5, 2, -1.0]]", "seconds from 0 on"),
        ("[[5, 2, NaN]]", "seconds from 0 on"),
        ('{"input_tokens": 200, "output_tokens": 1, "prefix_blocks": [1, 2, 3, 4, 5, 6, 7]}\n' * 2, None),
        ('{"input_tokens": 200, "output_tokens": 1, "prefix_blocks": [1, 2, 3]}', "no block size fits"),
    ],
)
def test_bad_files_are_refused_in_a_sentence(tmp_path: Path, text: str, words: str | None) -> None:
    path = tmp_path / "f.json"
    path.write_text(text)
    if words is None:
        assert read(path).prefix_tokens == 32
        return
    with pytest.raises(CannotPlan, match=words):
        read(path)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(CannotPlan, match="cannot be read"):
        read("/nowhere/at/all.json")


def test_stretching_keeps_the_shape() -> None:
    load = synthetic(Constant(10, 10), gamma(3.0, 2.5), 400, 1)
    fast = load.at_rate(30.0)
    assert fast.rate == pytest.approx(30.0)
    slow, quick = (np.array([j.arrival_s for j in w.jobs]) for w in (load, fast))
    assert quick == pytest.approx((slow - slow[0]) * load.rate / 30.0)
    with pytest.raises(CannotPlan, match="spans no time"):
        Workload((Job(1, 1, 0.0),)).at_rate(2.0)
    with pytest.raises(CannotPlan, match="above 0"):
        load.at_rate(0.0)


PROCESSES = [(poisson(4.0), 1.0), (gamma(4.0, 3.0), 3.0), (gamma(4.0, 0.5), 0.5), (gamma(4.0, 0.0), 0.0)]


@pytest.mark.parametrize(("arrivals", "cv"), PROCESSES)
def test_gaps_have_the_rate_and_variation_asked_for(arrivals: Arrivals, cv: float) -> None:
    drawn = gaps(arrivals(40_000, np.random.default_rng(3)))
    assert drawn.mean() == pytest.approx(0.25, rel=0.06)
    assert drawn.std() / drawn.mean() == pytest.approx(cv, rel=0.06, abs=1e-9)


def test_rates_that_change() -> None:
    times = varying([(0.0, 10.0), (100.0, 0.0), (150.0, 40.0)])(4000, np.random.default_rng(5))
    assert np.all(np.diff(times) >= 0)
    assert ((times < 100).sum(), ((times >= 100) & (times < 150)).sum()) == (pytest.approx(1000, rel=0.12), 0)
    assert ((times >= 150) & (times < 200)).sum() == pytest.approx(2000, rel=0.1)
    for bad in ([], [(1.0, 2.0)], [(0.0, 1.0), (5.0, 0.0)], [(0.0, -1.0), (5.0, 1.0)]):
        with pytest.raises(CannotPlan):
            varying(bad)


def test_replayed_arrivals_go_round() -> None:
    times = replayed([5.0, 7.0, 6.0])(7, np.random.default_rng(0))
    assert times.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def test_ticks_are_spread_within_themselves() -> None:
    ticked = Workload(tuple(Job(1, 1, 3.0 * (i // 50)) for i in range(500)))
    spread = spread_ticks(ticked, 3.0, 1)
    times = np.array([j.arrival_s for j in spread.jobs])
    assert np.all(np.diff(times) >= 0)
    assert np.bincount((times // 3).astype(int)).tolist() == [50] * 10
    assert gaps(times).std() / gaps(times).mean() == pytest.approx(1.0, abs=0.15)


def test_fits_keep_marginals_and_correlation() -> None:
    rng = np.random.default_rng(0)
    z = rng.standard_normal((20_000, 2)) @ np.array([[1.0, 0.7], [0.0, 0.714]])
    pairs = np.maximum(1, np.rint(np.exp(z * [0.6, 1.0] + [5.0, 4.0]))).astype(np.int64)
    for model in (Resampled(pairs), Fitted.fit(pairs)):
        drawn = model.draw(20_000, np.random.default_rng(1))
        assert drawn.min() >= 1
        assert np.median(drawn, axis=0) == pytest.approx(np.median(pairs, axis=0), rel=0.05)
        assert drawn.mean(axis=0) == pytest.approx(pairs.mean(axis=0), rel=0.08)
        want, got = np.corrcoef(np.log(pairs).T)[0, 1], np.corrcoef(np.log(drawn).T)[0, 1]
        assert got == pytest.approx(want, abs=0.03)
    with pytest.raises(CannotPlan, match="too few"):
        Fitted.fit(pairs[:1])


def test_sharegpt_is_as_the_authors_prepared_it() -> None:
    drawn = SHAREGPT.draw(50_000, np.random.default_rng(0))
    assert drawn.mean(axis=0) == pytest.approx([764, 183], rel=0.03)


def test_seeds() -> None:
    one, again = (synthetic(SHAREGPT, poisson(2.0), 50, 7) for _ in range(2))
    other, faster = synthetic(SHAREGPT, poisson(2.0), 50, 8), synthetic(SHAREGPT, poisson(9.0), 50, 7)
    assert one == again != other
    assert one.lengths().tolist() == faster.lengths().tolist(), "another rate drew other requests"
    assert resampled(one, 3.0, 200, 1).rate == pytest.approx(3.0, rel=0.25)
    with pytest.raises(CannotPlan, match="is empty"):
        synthetic(SHAREGPT, poisson(2.0), 0, 7)
    with pytest.raises(CannotPlan):
        poisson(math.inf)


@pytest.mark.parametrize(("word", "cv"), [("poisson", 1.0), ("gamma:2", 2.0), ("gamma:0", 0.0)])
def test_arrivals_by_name(word: str, cv: float) -> None:
    made = named("constant:10/10", 20_000, 1, arrivals_named(word))
    assert made.rate == pytest.approx(1.0, rel=0.05)
    assert burstiness(made) == pytest.approx(cv, abs=0.05)


def test_arrivals_that_vary_come_more_often_later() -> None:
    made = named("constant:10/10", 4000, 1, arrivals_named("varying:0=1,1000=3"))
    times = np.array([j.arrival_s for j in made.jobs])
    assert (times < 1000).sum() == pytest.approx(1000, rel=0.1)
    assert ((times >= 1000) & (times < 2000)).sum() == pytest.approx(3000, rel=0.1)


@pytest.mark.parametrize("word", ["gamma", "gamma:-1", "gamma:x", "varying:", "varying:0", "poisson:2", ""])
def test_unknown_arrivals_are_refused_with_those_that_are_known(word: str) -> None:
    with pytest.raises(CannotPlan, match="known: poisson, gamma:2"):
        arrivals_named(word)


def test_a_short_trace_is_drawn_out_as_bursty_as_it_is() -> None:
    bursts = synthetic(Constant(10, 10), gamma(1.0, 3.0), 400, 7)
    longer = steady(bursts, 5000, 1)
    assert len(longer.jobs) == 5000
    assert burstiness(longer) == pytest.approx(burstiness(bursts), rel=0.15)
    calm = synthetic(Constant(10, 10), poisson(1.0), 400, 7)
    assert burstiness(steady(calm, 5000, 1)) == pytest.approx(1.0, abs=0.06)
    assert steady(bursts, 300, 1).jobs == bursts.jobs[:300]  # long enough: itself
