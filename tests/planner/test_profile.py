"""Profiles of a machine: fitted, kept in a file, asked for step times, simulated."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distserve.core.types import Role
from distserve_planner.latency.base import OutOfRange
from distserve_planner.latency.profile import (
    KINDS,
    VERSION,
    Extra,
    LiveCost,
    Profile,
    Sample,
    profile_of,
    read_profile,
    write_profile,
)
from distserve_planner.latency.profiled import ALONE, Beside, ProfiledModel
from distserve_planner.latency.regress import DECODE, PREFILL, fit_curve, fit_extra, fit_link, range_of, told
from distserve_planner.latency.source import latency_model
from distserve_planner.refusal import CannotPlan
from distserve_planner.simulation.deployment import policy
from distserve_planner.simulation.shared import Machine, common_s, simulate_shared
from distserve_planner.workload import Constant, Job, Workload, poisson, synthetic

LENGTHS = (16, 32, 64, 128, 256, 512, 1024)


def prefill_s(chunks: tuple[tuple[int, int], ...], decodes: int = 0, context: int = 0) -> float:
    """The machine that is measured: known, so that a fit can be judged."""
    rows = sum(n for n, _ in chunks) + decodes
    pairs = sum(n * (n + 2 * b) for n, b in chunks)
    return 0.01 + 6e-4 * rows + 2e-7 * pairs + 2e-6 * context


def decode_s(batch: int, context: int) -> float:
    return 0.012 + 1e-3 * batch + 3e-6 * context


def samples(noise: float = 0.0, seed: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)

    def one(chunks: tuple[tuple[int, int], ...], decodes: int, context: int) -> Sample:
        seconds = prefill_s(chunks, decodes, context) if chunks else decode_s(decodes, context)
        return Sample(chunks, decodes, context, seconds * float(1 + noise * rng.standard_normal()), seconds, 3)

    found = [one(((n, before),), 0, 0) for n in LENGTHS for before in (0, 512)]
    found += [one(((n, 0),) * k, 0, 0) for n, k in ((64, 4), (128, 4), (32, 8))]
    found += [one(((n, 0),), d, 256 * d) for n in (64, 256) for d in (1, 8, 32)]
    return found + [one((), d, d * c) for d in (1, 2, 4, 8, 16, 32, 64) for c in (64, 256, 1024)]


def crowd(constant: float = 0.0, relative: float = 0.0) -> dict[str, dict[str, Extra]]:
    return {kind: {other: Extra(constant, relative) for other in KINDS} for kind in KINDS}


def profile(live: LiveCost | None = None, noise: float = 0.0, **changes: Any) -> Profile:
    seen = samples(noise)
    made = Profile(
        version=VERSION,
        model="tiny",
        dtype="float32",
        threads=1,
        instances=2,
        cores=2,
        block_size=16,
        kv_tokens=32_768,
        kv_bytes_per_token=1000.0,
        max_len=4096,
        prefill=fit_curve([s for s in seen if s.chunks], PREFILL),
        decode=fit_curve([s for s in seen if not s.chunks], DECODE),
        range=range_of(seen),
        links={"shm": fit_link([(1e5, 1e-3 + 1e-4), (1e6, 1e-3 + 1e-3), (1e7, 1e-3 + 1e-2)])},
        crowd=crowd(),
        live=live or LiveCost(),
        samples=tuple(seen),
    )
    return replace(made, **changes)


# ── the fit ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_known_machine_is_found_again() -> None:
    model = ProfiledModel(profile(), beside=ALONE)
    assert model.step_s([(384, 0)], 0, 0) == pytest.approx(prefill_s(((384, 0),)), rel=0.02)
    assert model.step_s([(128, 512)], 4, 1024) == pytest.approx(prefill_s(((128, 512),), 4, 1024), rel=0.03)
    assert model.decode_s(12, 3000) == pytest.approx(decode_s(12, 3000), rel=0.02)
    assert profile().link.bytes_s == pytest.approx(1e9, rel=1e-6)
    assert profile().link.latency_s == pytest.approx(1e-3, rel=1e-6)


def test_the_error_on_samples_left_out_is_that_of_the_noise() -> None:
    exact, noisy = profile(), profile(noise=0.05)
    assert exact.prefill.error < 0.01 and exact.decode.error < 0.01
    assert 0.02 < noisy.prefill.error < 0.12
    assert ProfiledModel(noisy).uncertainty == max(noisy.prefill.error, noisy.decode.error)


def test_the_better_form_is_chosen() -> None:
    """A machine whose products are bound by memory for few rows is no line in them."""

    def bent(s: Sample) -> Sample:
        return replace(s, seconds=0.02 + 1e-3 * max(0, s.rows - 100))

    prompts = [
        Sample(((n, 0),), 0, 0, 1.0, 1.0, 1) for n in (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
    ]
    curve = fit_curve([bent(s) for s in prompts], PREFILL)
    assert curve.form == "table"
    assert curve.tried["table"] < curve.tried["line"]
    assert profile().prefill.form == "line"


def test_no_weight_is_negative_and_residuals_are_told() -> None:
    curve = profile(noise=0.1).prefill
    assert min(curve.values) >= 0 and min(curve.weights.values()) >= 0
    worst = max(abs(told(curve, PREFILL, s) / s.seconds - 1) for s in samples(0.1) if s.chunks)
    assert curve.worst_residual == pytest.approx(worst)


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(CannotPlan, match="too few to fit"):
        fit_curve(samples()[:3], PREFILL)
    with pytest.raises(CannotPlan, match="at least two sizes"):
        fit_link([(1e6, 1e-3), (1e6, 2e-3)])


def test_extra_time_beside_others() -> None:
    found = fit_extra([(t, t + 2e-3 + 0.05 * t) for t in (0.01, 0.02, 0.2)])
    assert (found.constant_s, found.relative) == (pytest.approx(2e-3), pytest.approx(0.05))
    assert fit_extra([(0.1, 0.09), (0.2, 0.19)]) == Extra(0.0, 0.0, ((0.1, 0.09), (0.2, 0.19)))


# ── the file ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_profile_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    write_profile(profile(LiveCost("1 prefill + 1 decode", 0.01, crowd_decode=0.1), noise=0.02), path)
    again = read_profile(path)
    write_profile(again, tmp_path / "q.json")
    assert (tmp_path / "q.json").read_text() == path.read_text()
    assert again.samples[0].chunks == ((16, 0),)
    assert latency_model(str(path), "tiny", 1, 1).decode_s(4, 400) == pytest.approx(
        ProfiledModel(again).decode_s(4, 400)
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 9}, "version 9 is not known"),
        ({"smaples": []}, "unknown key 'smaples'"),
        ({"range": None}, "not of the form"),
        ({"threads": 0}, "profile.threads"),
        ({"crowd": {}}, "prefill beside prefill and decode is needed"),
        ({"kv_bytes_per_token": -1}, "kv_bytes_per_token"),
    ],
)
def test_a_broken_file_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = tmp_path / "p.json"
    write_profile(profile(), path)
    document = json.loads(path.read_text()) | change
    with pytest.raises(CannotPlan, match=words):
        profile_of(document)


def test_a_missing_file_and_another_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CannotPlan, match="cannot read the profile"):
        read_profile(tmp_path / "no.json")
    write_profile(profile(), tmp_path / "p.json")
    with pytest.raises(OutOfRange, match="no data for model 'opt-13b'; the nearest covered: tiny"):
        latency_model(str(tmp_path / "p.json"), "opt-13b", 1, 1)


# ── the model ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda m: m.step_s([(1025, 0)], 0, 0), "tokens a step; the nearest covered: 1024"),
        (lambda m: m.step_s([(16, 4096)], 0, 0), "tokens a sequence"),
        (lambda m: m.step_s([(16, 0)], 65, 100), "decodes a step"),
        (lambda m: m.decode_s(65, 100), "decodes a step; the nearest covered: 64"),
        (lambda m: m.decode_s(64, 70_000), "tokens of context"),
    ],
)
def test_it_refuses_to_extrapolate(ask: Any, words: str) -> None:
    with pytest.raises(OutOfRange, match=words):
        ask(ProfiledModel(profile()))


def test_parallelism_that_was_not_measured_is_refused() -> None:
    with pytest.raises(OutOfRange, match="tp=2 pp=1; the nearest covered: tp=1 pp=1"):
        ProfiledModel(profile(), tp=2)


def test_what_others_do_costs_what_was_measured() -> None:
    crowded = crowd()
    crowded["decode"] = {"prefill": Extra(1e-3, 0.0), "decode": Extra(0.0, 0.5)}
    made = profile(LiveCost(crowd_decode=0.1), crowd=crowded)
    alone = ProfiledModel(made, beside=ALONE).decode_s(4, 400)
    beside = ProfiledModel(made, beside=(Beside(), Beside(prefill=0.5, decode=0.25))).decode_s(4, 400)
    assert beside == pytest.approx(alone * (1 + 0.5 * 0.25 + 0.1 * 0.75) + 0.5e-3)


def test_a_turn_and_its_rows_are_added() -> None:
    bare, live = (
        ProfiledModel(profile(), beside=ALONE),
        ProfiledModel(profile(LiveCost(turn_s=1e-3, row_s=1e-4)), beside=ALONE),
    )
    assert live.decode_s(8, 800) - bare.decode_s(8, 800) == pytest.approx(1e-3 + 8e-4)
    assert live.step_s([(64, 0)], 2, 100) - bare.step_s([(64, 0)], 2, 100) == pytest.approx(1e-3 + 3e-4)


# ── several instances on one machine ─────────────────────────────────────────────────────────────────────────────────

SPLIT, MIXED = (Role.PREFILL, Role.DECODE), (Role.MIXED, Role.MIXED)


def on(made: Profile, roles: tuple[Role, ...]) -> Machine:
    return Machine(made, roles, policy("serve"))


def test_one_request_alone_takes_the_sum_of_its_parts() -> None:
    made = profile(LiveCost(around_s=0.02, around_token_s=1e-5, handoff_s=5e-3))
    trail = simulate_shared(on(made, SPLIT), Workload((Job(256, 3, 1.0),))).trails[0]
    model = ProfiledModel(made, beside=ALONE)
    assert trail.ttft_s == pytest.approx(0.02 + 256e-5 + model.step_s([(256, 0)], 0, 0))
    steps = model.decode_s(1, 257) + model.decode_s(1, 258)
    move = made.link.latency_s + 5e-3 + 256 * made.kv_bytes_per_token / made.link.bytes_s
    assert 2 * trail.tpot_s == pytest.approx(steps + move)


def test_busy_neighbours_slow_each_other() -> None:
    work = synthetic(Constant(256, 40), poisson(3.0), 60, 1)
    free, slowed = profile(), profile(crowd=crowd(relative=0.5))
    for roles in (SPLIT, MIXED):
        a, b = simulate_shared(on(free, roles), work), simulate_shared(on(slowed, roles), work)
        assert np.median(b.tpot_s()) > 1.05 * np.median(a.tpot_s())
    alone = (Role.MIXED,)
    assert simulate_shared(on(free, alone), work).digest == simulate_shared(on(slowed, alone), work).digest


def test_the_same_question_has_the_same_answer() -> None:
    work = synthetic(Constant(200, 30), poisson(2.0), 50, 2)
    made = on(profile(crowd=crowd(1e-3, 0.1)), SPLIT)
    assert simulate_shared(made, work).digest == simulate_shared(made, work).digest


def test_more_instances_than_were_measured_are_refused() -> None:
    with pytest.raises(OutOfRange, match="profile with --instances 3"):
        on(profile(), (Role.MIXED,) * 3)


def test_common_seconds() -> None:
    assert common_s([(0, 2), (3, 5)], [(1, 4)]) == pytest.approx(2.0)
    assert common_s([], [(1, 4)]) == 0.0
