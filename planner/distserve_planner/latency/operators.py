"""Step times of any dense (or measured mixture) model at any TP and PP, composed from one GPU's operator times.

One layer = fused QKV, attention, output projection, two FFN products (or the experts), two all-reduces under tensor
parallelism, and the element-wise kernels between them; one step = the layers of the slowest stage, the output head, and
the engine's own time per step (``Engine``). Prompts of unequal lengths are counted by equal attention work. Knows no
scheduling; refuses shapes beyond the measured ones unless built with ``hold=True``, and then tells which (``beyond``).
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from distserve_planner.hardware import Gpu
from distserve_planner.latency.base import OutOfRange
from distserve_planner.latency.kernels import Kernels, kernels_of
from distserve_planner.latency.roofline import RooflineKernels
from distserve_planner.latency.tables import Curve
from distserve_planner.memory import DEFAULT_RULE, MemoryRule, room
from distserve_planner.models import ModelFacts
from distserve_planner.refusal import CannotPlan, nearest

_HBM_SHARE = 0.8  # of the datasheet's bandwidth, which element-wise kernels reach (aiconfigurator's own rule)
_HOP_S = 15e-6  # one activation hand-over between pipeline stages, before its bytes


@dataclass(frozen=True, slots=True)
class Engine:
    """What a serving engine adds to the kernels. Constants, with their origin at ``ENGINES``.

    ``step_s`` is CPU and launch time a step that no kernel hides; ``sequence_s`` the same for each sequence of the step
    (input preparation, sampling, detokenizing); ``kernel_s`` the launch gap of one element-wise kernel; ``scale``
    multiplies the measured kernels (fusion and graphs make a kernel shorter in an engine than timed alone).
    """

    name: str
    step_s: float
    sequence_s: float
    kernel_s: float
    scale: float = 1.0


# Fitted once to 231 published closed-loop runs of Llama-3.1-8B/70B and Qwen3-32B on H100 and H200 (mean TPOT; the 240
# runs whose KV fits, less 9 vLLM runs whose TPOT shows no other request's prefill). See bench/planner_operators.py.
ENGINES = {
    "none": Engine("none", 0.0, 0.0, 0.0),
    "vllm": Engine("vllm", 0.2e-3, 40e-6, 3e-6, 0.95),
    "trtllm": Engine("trtllm", 1.2e-3, 16e-6, 1.6e-6, 0.81),
    "sglang": Engine("sglang", 1.5e-3, 21e-6, 0.0, 0.96),
}


class OperatorLatency:
    """``LatencyModel`` of one model at one parallelism on one GPU type. Build once; asking costs microseconds."""

    def __init__(
        self,
        model: ModelFacts,
        gpu: Gpu,
        tp: int = 1,
        pp: int = 1,
        *,
        dtype: str = "bf16",
        engine: Engine = ENGINES["vllm"],
        kernels: Kernels | None = None,
        rule: MemoryRule = DEFAULT_RULE,
        hold: bool = False,
    ) -> None:
        if (why := model.why_not(tp, pp)) is not None:
            raise CannotPlan(why)
        self.model, self.gpu, self.tp, self.pp, self.engine = model, gpu, tp, pp, engine
        self.kernels = kernels or (kernels_of(gpu) if gpu.tables else RooflineKernels(gpu))
        self._hold = hold
        self.beyond: dict[str, float] = {}
        self._room = room(model, gpu, tp, pp, rule)
        self._kv_bytes = model.kv_bytes_per_token(rule.kv_dtype)
        heads, kv_heads = model.heads // tp, model.kv_heads_of(tp)
        self._prefill = self.kernels.prefill(heads, kv_heads, model.head_dim)
        self._decode = self.kernels.decode(heads, kv_heads, model.head_dim)
        self._head = self.kernels.gemm(model.vocab // tp, model.hidden, "bf16")
        self._layer = _layer_curve(self.kernels, model, gpu, tp, dtype, engine)
        self._stage_layers = model.stage_layers(pp)
        self._lines: dict[int, tuple[list[float], list[tuple[float, float, float]]]] = {}

    @property
    def name(self) -> str:
        return f"{self.kernels.name}: {self.model.name} tp={self.tp} pp={self.pp}, {self.engine.name} overheads"

    @property
    def stages(self) -> int:
        return self.pp

    @property
    def kv_bytes_per_token(self) -> float:
        return self._kv_bytes

    @property
    def kv_capacity_tokens(self) -> int:
        return self._room.kv_tokens

    @property
    def uncertainty(self) -> float:
        """Operators err mostly apart from each other: half of one's error is left in a sum. What the engine adds does
        not average out: 5 % of a step, the median of the served benchmarks."""
        return math.hypot(0.5 * self.kernels.residual, 0.05)

    def step_s(self, chunks: Sequence[tuple[int, int]], decodes: int, decode_context: int) -> float:
        """See LatencyModel. Attention of the chunks and of the decodes are two kernels, the rest is one pass."""
        new = sum(tokens for tokens, _ in chunks)
        pairs = sum(tokens * (before + 0.5 * (tokens + 1)) for tokens, before in chunks)
        length = math.sqrt(2 * pairs / len(chunks))
        self._check("tokens in a step", new + decodes, self._layer.greatest)
        self._check("prompt length", length, self._prefill.greatest[1])
        attention = self._prefill(len(chunks), length)
        if decodes:
            self._check_decode(decodes, decode_context)
            attention += self._decode(decodes, decode_context / decodes)
        return self._stage_s(self._layer(new + decodes) + attention, new + decodes, len(chunks) + decodes)

    def decode_s(self, batch: int, context: int) -> float:
        """See LatencyModel."""
        intercept, slope, _ = self.decode_line(batch, context)
        return intercept + slope * context

    def decode_line(self, batch: int, context: int) -> tuple[float, float, float]:
        """(intercept, slope, until): the step is straight in the context between the measured context lengths."""
        self._check_decode(batch, context)
        if batch not in self._lines:
            self._lines[batch] = self._line_of(batch)
        ends, lines = self._lines[batch]
        return lines[min(bisect_right(ends, context), len(lines) - 1)]

    def _line_of(self, batch: int) -> tuple[list[float], list[tuple[float, float, float]]]:
        """For one batch: where each straight piece ends, and the pieces."""
        dense = self._layer(batch)
        knots = [float(batch * length) for length in self._decode.lengths]
        measured = (self._stage_s(dense + self._decode(batch, length), batch, batch) for length in self._decode.lengths)
        seconds = list(itertools.accumulate(measured, max))  # noise at short contexts must not make longer ones cheaper
        lines: list[tuple[float, float, float]] = []
        for (c0, t0), (c1, t1) in itertools.pairwise(zip(knots, seconds, strict=True)):
            slope = (t1 - t0) / (c1 - c0)
            lines.append((t0 - slope * c0, slope, c1))
        lines[-1] = (*lines[-1][:2], math.inf)
        return knots[1:], lines

    def _stage_s(self, layer_s: float, tokens: int, sequences: int) -> float:
        scale = self.engine.scale
        last = self._stage_layers[-1] * layer_s + self._head(sequences)
        slowest = max(last, self._stage_layers[0] * layer_s)
        hop = 0.0
        if self.pp > 1:
            hop = _HOP_S + 2 * tokens * self.model.hidden / (self.gpu.nvlink_bytes_s or self.gpu.pcie_bytes_s)
        return slowest * scale + hop + self.engine.step_s + self.engine.sequence_s * sequences

    def _check_decode(self, batch: int, context: int) -> None:
        batches, lengths = self._decode.greatest
        self._check("decode batch", batch, batches)
        self._check("context", context / batch, lengths)

    def _check(self, what: str, asked: float, greatest: float) -> None:
        if asked <= greatest:
            return
        if not self._hold:
            raise OutOfRange(f"{self.name}: {what} {asked:.0f} is beyond the measurements", f"{what} {greatest:g}")
        self.beyond[what] = max(asked, self.beyond.get(what, 0.0))


def engine_named(name: str) -> Engine:
    """Raises CannotPlan with the nearest known name."""
    if name not in ENGINES:
        raise CannotPlan(f"unknown engine {name!r}{nearest(name, ENGINES)} (known: {', '.join(ENGINES)})")
    return ENGINES[name]


def _layer_curve(kernels: Kernels, model: ModelFacts, gpu: Gpu, tp: int, dtype: str, engine: Engine) -> Curve:
    """Seconds of one layer without attention over the tokens of a step."""
    products = [(kernels.gemm(m.n, m.k, dtype if m.name != "router" else "bf16"), m.count) for m in model.matmuls(tp)]
    experts = None
    if (e := model.experts) is not None:
        if e.shared or e.dense_layers:
            raise CannotPlan(f"{model.name}: shared experts and dense first layers have no operator data yet")
        experts = kernels.experts(model.hidden, e.inter, e.active, e.count, tp)
    reduce = kernels.all_reduce(tp) if tp > 1 else None
    moved, launches = _element_wise(model, tp)
    bandwidth = _HBM_SHARE * gpu.hbm_bytes_s

    def seconds(tokens: float) -> float:
        total = sum(count * curve(tokens) for curve, count in products) + launches * engine.kernel_s
        total += moved * tokens / bandwidth
        if experts is not None:
            total += experts(tokens)
        if reduce is not None:
            total += 2 * reduce(2 * tokens * model.hidden)
        return total

    sizes = kernels.token_sizes
    return Curve(sizes, [seconds(size) for size in sizes])


def _element_wise(model: ModelFacts, tp: int) -> tuple[float, int]:
    """(bytes a token, kernels) of norms, rotary, KV write and activation in one layer on one rank."""
    q, kv = model.heads // tp * model.head_dim, model.kv_heads_of(tp) * model.head_dim
    inter = (model.experts.inter * model.experts.active if model.experts else model.inter) // tp
    norms = 2 * 4 * model.hidden  # read residual and input, write both
    rotary = 2 * (q + 2 * kv) * (2 if model.qk_norm else 1)
    activation = (3 if model.gated else 2) * inter
    return 2.0 * (norms + rotary + 2 * kv + activation), 5 + 2 * model.qk_norm
