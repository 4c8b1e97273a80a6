"""The operator model on shapes it has not seen (issue 4, must-show 5), its composition, and its refusals."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from distserve_planner.hardware import gpu_described, gpu_named
from distserve_planner.latency.base import LatencyModel, LinearDecode, OutOfRange
from distserve_planner.latency.kernels import kernels_of
from distserve_planner.latency.operators import ENGINES, OperatorLatency
from distserve_planner.latency.roofline import RooflineKernels
from distserve_planner.latency.tables import packaged
from distserve_planner.latency.validation import operator_errors, own_sites, random_rows, random_sites, step_errors
from distserve_planner.models import load_model
from distserve_planner.refusal import CannotPlan

BATCHES, LENGTHS = (1, 3, 20, 100), (100, 700, 3000)
MODELS = [("llama-3.1-8b", 1), ("llama-3.1-70b", 4), ("qwen3-32b", 2)]


@pytest.mark.parametrize("name", ["gemm_bf16", "prefill", "decode"])
@pytest.mark.parametrize("gpu", ["h200", "h100"])
def test_held_back_rows_and_shapes_are_foretold(gpu, name):
    card = gpu_named(gpu)
    table = packaged(card.tables)[name]
    for held in (random_rows(table, 0.2, seed=11), random_sites(table, name, 0.15, seed=11)):
        errors = operator_errors(card, name, held)
        assert errors.count > 300
        assert errors.median <= 0.06 and errors.p90 <= 0.17, errors  # asked for: 8 % and 20 %


@pytest.mark.parametrize(("name", "tp"), MODELS)
@pytest.mark.parametrize("gpu", ["h200", "h100"])
def test_step_times_without_the_models_own_shapes(gpu, name, tp):
    card, model = gpu_named(gpu), load_model(name)
    for errors in step_errors(model, card, tp, own_sites(card, model, tp), BATCHES, LENGTHS):
        assert errors.median <= 0.04 and errors.p90 <= 0.10, errors


def test_measured_shapes_are_returned_as_measured():
    table = packaged("h200")["gemm_bf16"]
    some = table.where(random_rows(table, 0.02, seed=3))
    assert np.array_equal(kernels_of(gpu_named("h200")).gemm_seconds(some.shape), some.seconds)


@pytest.mark.parametrize(("name", "tp"), MODELS)
def test_the_datasheet_alone_is_within_a_fifth(name, tp):
    model, card = load_model(name), gpu_named("h200")
    measured, sheet = OperatorLatency(model, card, tp), OperatorLatency(model, card, tp, kernels=RooflineKernels(card))
    for batch, length in itertools.product(BATCHES, LENGTHS):
        assert sheet.decode_s(batch, batch * length) == pytest.approx(measured.decode_s(batch, batch * length), rel=0.2)
    for length in LENGTHS:
        assert sheet.step_s([(length, 0)], 0, 0) == pytest.approx(measured.step_s([(length, 0)], 0, 0), rel=0.2)


def test_a_step_is_the_sum_of_its_operators():
    model, card = load_model("llama-3.1-8b"), gpu_named("h200")
    bare = OperatorLatency(model, card, engine=ENGINES["none"])
    kernels = kernels_of(card)
    products = sum(kernels.gemm(m.n, m.k)(64) for m in model.matmuls(1))
    attention = kernels.decode(32, 8)(64, 1024)
    head = kernels.gemm(model.vocab, model.hidden)(64)
    kernels_s = model.layers * (products + attention) + head
    assert kernels_s < bare.decode_s(64, 64 * 1024) < 1.1 * kernels_s  # the rest is element-wise


def test_longer_fuller_and_colder_steps_take_longer():
    latency: LatencyModel = OperatorLatency(load_model("llama-3.1-8b"), gpu_named("h100"))
    assert latency.step_s([(512, 0)], 0, 0) < latency.step_s([(2048, 0)], 0, 0)
    assert latency.step_s([(512, 0)], 0, 0) < latency.step_s([(512, 8192)], 0, 0)
    assert latency.step_s([(512, 0)], 0, 0) < latency.step_s([(512, 0)], 64, 64 * 2000)
    assert latency.decode_s(8, 8 * 1000) < latency.decode_s(8, 8 * 16000)
    whole, parts = latency.step_s([(4096, 0)], 0, 0), sum(latency.step_s([(512, 512 * i)], 0, 0) for i in range(8))
    assert whole < parts < 2.2 * whole


def test_a_decode_step_is_straight_between_measured_contexts():
    latency = OperatorLatency(load_model("llama-3.1-8b"), gpu_named("h100"))
    assert isinstance(latency, LinearDecode)
    for batch, context in ((1, 100), (7, 7 * 900), (33, 33 * 5000)):
        intercept, slope, until = latency.decode_line(batch, context)
        for c in (context, int(until) - 1):
            assert latency.decode_s(batch, c) == pytest.approx(intercept + slope * c)
        assert latency.decode_s(batch, int(until)) == pytest.approx(intercept + slope * until, rel=1e-6)  # no step


def test_equal_prompts_and_unequal_ones_of_equal_work_take_alike():
    latency = OperatorLatency(load_model("llama-3.1-8b"), gpu_named("h200"))
    equal = latency.step_s([(1000, 0)] * 4, 0, 0)
    assert latency.step_s([(400, 0), (1600, 0), (800, 0), (1200, 0)], 0, 0) == pytest.approx(equal, rel=0.05)


def test_tensor_parallelism_shortens_and_pipelines_divide():
    model, card = load_model("llama-3.1-70b"), gpu_named("h200")
    one, two, four = (OperatorLatency(model, card, tp) for tp in (1, 2, 4))
    assert one.decode_s(32, 32 * 1000) > two.decode_s(32, 32 * 1000) > four.decode_s(32, 32 * 1000)
    assert four.decode_s(32, 32 * 1000) > one.decode_s(32, 32 * 1000) / 4
    staged = OperatorLatency(model, card, 1, 4)
    assert staged.stages == 4
    assert one.decode_s(32, 32000) / 4 < staged.decode_s(32, 32000) < one.decode_s(32, 32000) / 3
    assert staged.kv_capacity_tokens > 4 * one.kv_capacity_tokens


def test_a_mixture_of_experts_is_read_from_its_own_table():
    latency = OperatorLatency(load_model("qwen3-30b-a3b"), gpu_named("h200"))
    assert 0.002 < latency.decode_s(1, 1000) < latency.decode_s(64, 64000) < 0.05
    with pytest.raises(OutOfRange, match="hidden"):
        OperatorLatency(load_model("qwen3-30b-a3b"), gpu_named("h200"), 32)


def test_nothing_is_extrapolated_in_silence():
    model, card = load_model("llama-3.1-8b"), gpu_named("h200")
    strict = OperatorLatency(model, card)
    with pytest.raises(OutOfRange, match="the nearest covered: context 131072"):
        strict.decode_s(1, 200_000)
    with pytest.raises(OutOfRange, match="tokens in a step 40000"):
        strict.step_s([(20_000, 0), (20_000, 0)], 0, 0)
    held = OperatorLatency(model, card, hold=True)
    assert held.decode_s(1, 262_144) == pytest.approx(2 * held.decode_s(1, 131_072), rel=0.6)
    assert held.beyond == {"context": 262_144}


def test_what_has_no_data_is_refused_with_a_sentence():
    with pytest.raises(CannotPlan, match="latent attention"):
        OperatorLatency(load_model("deepseek-v3"), gpu_named("h200"), 8)
    with pytest.raises(OutOfRange, match="over 5 GPUs"):
        OperatorLatency(load_model("opt-13b"), gpu_named("h200"), 5)


def test_a_gpu_known_by_its_datasheet_serves():
    mine = gpu_described("mine", {"memory_gib": 48, "hbm_gbs": 864, "tflops": 362, "pcie_gbs": 25})
    latency = OperatorLatency(load_model("llama-3.1-8b"), mine, 2)
    assert "roofline" in latency.name and latency.uncertainty > 0.1
    assert 16e9 / 2 / 864e9 < latency.decode_s(1, 500) < 2 * 16e9 / 2 / 864e9
