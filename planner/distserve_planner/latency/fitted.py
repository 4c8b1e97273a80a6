"""DistServe's fitted latency form, from the coefficient files it published (licence: ``data/NOTICE``).

    prefill step = a + b * (sum of lengths) + c * (sum of squared lengths)      of the whole model, at one TP degree
    decode step  = a + b * (sum of contexts) + c * (batch size)                 separately below and from a batch of 95

The published numbers contain factors set by hand (a prefill factor of 1.10 for DistServe, 1.40 for vLLM, a decode
factor of 1.20 for vLLM): no physics. They are divided out here, and what a real engine adds to its kernels is one set
of constants with reasons, ``ENGINES``. A pipeline divides the model's time by its stages; the constants are per step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from distserve_planner.latency.base import OutOfRange

SPLIT = "decoding_large_small_bs_threshold"


@dataclass(frozen=True, slots=True)
class EngineConstants:
    """What an engine adds to its kernels. One set an engine, for every run and every rate.

    ``hidden_*`` are the authors' hand-set factors inside the published numbers. ``*_factor`` and ``*_overhead_s`` are
    ours. ``pull_stall_s`` is per KV token of a sequence that joins by a hand-off: the step it joins waits that long.
    ``pipeline_overlap`` is the share of a pipeline's ideal overlap that its decode steps reach.
    """

    hidden_prefill: float
    hidden_decode: float
    prefill_factor: float
    prefill_overhead_s: float
    decode_factor: float
    decode_overhead_s: float
    row_overhead_s: float
    pull_stall_s: float
    pipeline_overlap: float
    uncertainty: float


ENGINES = {
    # Prefill: the fastest first tokens of the real runs lie 5 % and 3 ms above the bare fit at every length (scheduling
    # and remote calls; the authors' simulator charges 2 ms). Decode: fitted on batches of equal lengths, real ones are
    # ragged (5 %); 2 ms a step, as the authors' simulator. KV is pulled in the compute stream, one copy a block and
    # layer, and the decode loop waits for it: 16 us a token is 51 GB/s of a link that does 228. Two decode stages: a
    # pull drains the pipeline, and the engine's loop serves one batch at a time: 40 % of the ideal overlap is seen.
    "distserve": EngineConstants(
        hidden_prefill=1.10,
        hidden_decode=1.0,
        prefill_factor=1.05,
        prefill_overhead_s=3e-3,
        decode_factor=1.05,
        decode_overhead_s=2e-3,
        row_overhead_s=0.0,
        pull_stall_s=16e-6,
        pipeline_overlap=0.4,
        uncertainty=0.05,
    ),
    # vLLM of 2023 builds its inputs, samples and detokenizes in Python: 10 ms a prefill step, 0.3 ms a sequence and
    # decode step (real runs: TPOT is on the published curve with a few sequences, above it with many). Prefill 15 %
    # above the bare fit (the published 40 % makes real first tokens of 1 request a second 20 % too slow).
    "vllm": EngineConstants(
        hidden_prefill=1.40,
        hidden_decode=1.20,
        prefill_factor=1.15,
        prefill_overhead_s=10e-3,
        decode_factor=1.20,
        decode_overhead_s=0.0,
        row_overhead_s=0.3e-3,
        pull_stall_s=0.0,
        pipeline_overlap=0.4,
        uncertainty=0.08,
    ),
}


@cache
def _load(name: str) -> Any:
    return json.loads(resources.files("distserve_planner.latency").joinpath("data", name).read_text())


def profiles() -> dict[str, tuple[str, str]]:
    """Profile name → (coefficient file, engine)."""
    return {f"{engine}:a100-80g": (f"profiler-a100-80g.{engine}.json", engine) for engine in ENGINES}


def model_name(model: str, known: Sequence[str]) -> str:
    """The profile's name for a model given as ``opt-13b``, ``facebook/opt-13b`` or ``OPT_13B``."""
    wanted = model.lower().replace("_", "-").rsplit("/", 1)[-1]
    for name in known:
        if name.rsplit("/", 1)[-1] == wanted:
            return name
    raise OutOfRange(f"the profile has no data for model {model!r}", ", ".join(known))


def kv_capacity_tokens(model: str, tp: int, pp: int) -> int:
    """Tokens of KV that fit an instance on 80-GiB GPUs, by the authors' reckoning. Raises OutOfRange if none fits."""
    table = _load("max_num_tokens.json")[model]
    tokens = table.get(f"{tp}x{pp}")
    if tokens is None:
        fits = ", ".join(f"tp={k.split('x')[0]} pp={k.split('x')[1]}" for k in table)
        raise OutOfRange(f"{model} does not fit at tp={tp} pp={pp}", fits)
    return int(tokens)


class FittedModel:
    """See the module. ``name`` as in ``profiles()``. Raises OutOfRange for a model, TP or PP without data."""

    def __init__(self, profile: str, model: str, tp: int, pp: int = 1) -> None:
        if profile not in profiles():
            raise OutOfRange(f"there is no profile {profile!r}", ", ".join(profiles()))
        file, self.engine = profiles()[profile]
        data = _load(file)
        self.model = model_name(model, list(data))
        degrees = data[self.model]
        if str(tp) not in degrees:
            nearest = min(degrees, key=lambda d: (abs(int(d) - tp), -int(d)))
            have = ", ".join(degrees)
            message = f"profile {profile} has no data for {self.model} at tp={tp} (it has tp={have})"
            raise OutOfRange(message, f"tp={nearest}")
        self._kv_capacity = kv_capacity_tokens(self.model, tp, pp)
        self.constants = ENGINES[self.engine]
        self.tp, self._stages = tp, pp
        self._name = f"{profile} {self.model} tp={tp} pp={pp}"
        self._set_curves(degrees[str(tp)])

    def _set_curves(self, curves: dict[str, Any]) -> None:
        k = self.constants
        prefill = k.prefill_factor / k.hidden_prefill * 1e-3 / self._stages
        decode = k.decode_factor / k.hidden_decode * 1e-3 / self._stages
        self._prefill = tuple(v * prefill for v in curves["prefill"])
        row = (0.0, 0.0, k.row_overhead_s / self._stages)
        small, large = curves["decoding_smallbs"], curves["decoding_largebs"]
        self._small = tuple(v * decode + r for v, r in zip(small, row, strict=True))
        self._large = tuple(v * decode + r for v, r in zip(large, row, strict=True))
        self._split = int(curves[SPLIT])
        self._prefill_overhead = k.prefill_overhead_s / self._stages
        self._decode_overhead = k.decode_overhead_s / self._stages

    @property
    def name(self) -> str:
        return self._name

    @property
    def stages(self) -> int:
        return self._stages

    @property
    def kv_bytes_per_token(self) -> float:
        return float(_load("models.json")[self.model]["kv_bytes_per_token"])

    @property
    def kv_capacity_tokens(self) -> int:
        return self._kv_capacity

    @property
    def uncertainty(self) -> float:
        return self.constants.uncertainty

    def step_s(self, chunks: Sequence[tuple[int, int]], decodes: int, decode_context: int) -> float:
        """A chunk after ``before`` tokens attends to them: its share of the squared term is (before+new)² - before²."""
        a, b, c = self._prefill
        tokens = squares = 0
        for new, before in chunks:
            tokens += new
            squares += new * (new + 2 * before)
        seconds = a + b * tokens + c * squares + self._prefill_overhead
        if decodes:  # weights are read once for both: the decodes add their rows and their contexts
            _, per_context, per_row = self._small if decodes < self._split else self._large
            seconds += per_context * decode_context + max(per_row, b) * decodes
        return seconds

    def decode_s(self, batch: int, context: int) -> float:
        a, b, c = self._small if batch < self._split else self._large
        return a + c * batch + self._decode_overhead + b * context

    def decode_line(self, batch: int, context: int) -> tuple[float, float, float]:
        a, b, c = self._small if batch < self._split else self._large
        return a + c * batch + self._decode_overhead, b, math.inf
