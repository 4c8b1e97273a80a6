"""DistServe's fitted form: the published numbers back, the traps, and what is refused."""

from __future__ import annotations

import pytest

from distserve_planner.latency.base import LinearDecode, OutOfRange
from distserve_planner.latency.fitted import ENGINES, FittedModel, kv_capacity_tokens, profiles
from distserve_planner.latency.source import default_policy, latency_model


def bare_prefill(engine: str, published: tuple[float, float, float], lengths: list[int]) -> float:
    """The formula with the hidden factor divided out, in seconds."""
    a, b, c = published
    return (a + b * sum(lengths) + c * sum(n * n for n in lengths)) / ENGINES[engine].hidden_prefill / 1e3


OPT13B_TP2 = (14.742973695171262, 0.06857720739764, 2.4495727400243586e-06)


def test_prefill_is_the_published_form_with_its_constants() -> None:
    model, k = FittedModel("distserve:a100-80g", "opt-13b", 2), ENGINES["distserve"]
    lengths = [700, 300]
    want = bare_prefill("distserve", OPT13B_TP2, lengths) * k.prefill_factor + k.prefill_overhead_s
    assert model.step_s([(n, 0) for n in lengths], 0, 0) == pytest.approx(want)


def test_chunks_of_a_prompt_attend_to_what_came_before() -> None:
    model = FittedModel("distserve:a100-80g", "opt-13b", 2)
    whole = model.step_s([(1000, 0)], 0, 0)
    parts = model.step_s([(400, 0)], 0, 0) + model.step_s([(600, 400)], 0, 0)
    fixed = model.step_s([(1, 0)], 0, 0) - (model.step_s([(2, 0)], 0, 0) - model.step_s([(1, 0)], 0, 0))
    assert parts - whole == pytest.approx(fixed, rel=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
def test_decode_changes_curve_at_95_and_its_line_is_exact(engine: str) -> None:
    model = FittedModel(f"{engine}:a100-80g", "facebook/opt-13b", 1)
    assert isinstance(model, LinearDecode)
    for batch in (1, 94, 95, 200):
        intercept, slope, until = model.decode_line(batch, 1000)
        assert until == float("inf")
        assert model.decode_s(batch, 54_321) == intercept + slope * 54_321
    k = ENGINES[engine]
    jump = {"distserve": (19.934702624895458, 0.0006269356524350583, 0.03850697740828398)}
    if engine in jump:
        a, b, c = jump[engine]
        want = (a + b * 9000 + c * 94) * k.decode_factor / k.hidden_decode / 1e3 + k.decode_overhead_s
        assert model.decode_s(94, 9000) == pytest.approx(want)
    assert model.decode_line(95, 0)[1] != model.decode_line(94, 0)[1]


def test_stages_divide_the_time() -> None:
    one, two = (FittedModel("distserve:a100-80g", "opt-13b", 1, pp) for pp in (1, 2))
    assert two.stages == 2
    assert two.decode_s(20, 9000) * 2 == pytest.approx(one.decode_s(20, 9000))
    assert two.step_s([(500, 0)], 0, 0) * 2 == pytest.approx(one.step_s([(500, 0)], 0, 0))


def test_capacity_and_kv_size() -> None:
    assert FittedModel("distserve:a100-80g", "OPT_13B", 1).kv_capacity_tokens == 66144
    assert FittedModel("vllm:a100-80g", "opt-66b", 8).kv_bytes_per_token == 2.25 * 2**20


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (("distserve:h100", "opt-13b", 1, 1), "no profile 'distserve:h100'; the nearest covered: distserve:a100"),
        (("distserve:a100-80g", "opt-175b", 8, 1), "no data for model 'opt-175b'.*facebook/opt-13b"),
        (("distserve:a100-80g", "opt-66b", 6, 1), r"at tp=6 \(it has tp=2, 3, 4, 8\); the nearest covered: tp="),
        (("distserve:a100-80g", "opt-13b", 1, 3), "does not fit at tp=1 pp=3"),
    ],
)
def test_what_has_no_data_is_refused_with_the_nearest(ask: tuple[str, str, int, int], words: str) -> None:
    with pytest.raises(OutOfRange, match=words):
        latency_model(*ask)


def test_a_model_that_does_not_fit_says_what_does() -> None:
    with pytest.raises(OutOfRange, match="does not fit at tp=1 pp=1; the nearest covered: tp=1 pp=2"):
        kv_capacity_tokens("facebook/opt-66b", 1, 1)


def test_every_profile_has_a_policy() -> None:
    assert {name: default_policy(name) for name in profiles()} == {
        "distserve:a100-80g": "distserve",
        "vllm:a100-80g": "vllm-2023",
    }
    assert default_policy("mine.json") == "serve"
