"""What fits: weights under tensor and pipeline parallelism, and the KV that the rest of the memory holds.

The rule is the paper's simulator's (DISTSERVE §4.2): memory × utilisation, less a reserve for activations and buffers,
less the weights of one rank, in whole blocks; the tightest pipeline stage decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from distserve_planner.hardware import GIB, Gpu
from distserve_planner.models import ModelFacts
from distserve_planner.refusal import CannotPlan


@dataclass(frozen=True, slots=True)
class MemoryRule:
    """How much of a GPU may be used, and what it is used for.

    ``reserve`` is a share of the memory kept for activations, buffers and the driver.
    """

    utilisation: float = 0.95
    reserve: float = 0.01
    block_size: int = 16
    weight_dtype: str = ""
    kv_dtype: str = ""


@dataclass(frozen=True, slots=True)
class Room:
    """What one instance shape needs and leaves. Bytes are of its tightest rank; ``kv_tokens`` of the whole instance."""

    weight_bytes: float
    free_bytes: float
    kv_tokens: int

    @property
    def fits(self) -> bool:
        return self.kv_tokens > 0


DEFAULT_RULE = MemoryRule()


def room(model: ModelFacts, gpu: Gpu, tp: int, pp: int, rule: MemoryRule = DEFAULT_RULE) -> Room:
    """Weights and KV capacity of one instance at this parallelism.

    Raises CannotPlan when the model cannot be cut this way; a shape that is only too large has ``kv_tokens`` 0.
    """
    if (why := model.why_not(tp, pp)) is not None:
        raise CannotPlan(why)
    usable = gpu.memory_bytes * (rule.utilisation - rule.reserve)
    worst: Room | None = None
    for stage, layers in enumerate(model.stage_layers(pp)):
        weights = model.weight_bytes(tp, pp, stage, rule.weight_dtype)
        free = usable - weights
        block = layers * model.kv_bytes_per_layer(tp, rule.kv_dtype) * rule.block_size
        tokens = max(0, int(free // block)) * rule.block_size
        if worst is None or tokens < worst.kv_tokens or (tokens == worst.kv_tokens and free < worst.free_bytes):
            worst = Room(weights, free, tokens)
    assert worst is not None  # pp >= 1
    return worst


def shapes_that_fit(
    model: ModelFacts,
    gpu: Gpu,
    shapes: Iterable[tuple[int, int]],
    least_tokens: int = 1,
    rule: MemoryRule = DEFAULT_RULE,
) -> list[tuple[tuple[int, int], Room]]:
    """Those (tp, pp) whose instance holds at least ``least_tokens`` of KV, in the order given."""
    found = []
    for tp, pp in shapes:
        if model.why_not(tp, pp) is None and (r := room(model, gpu, tp, pp, rule)).kv_tokens >= max(1, least_tokens):
            found.append(((tp, pp), r))
    return found


def why_nothing_fits(
    model: ModelFacts,
    gpu: Gpu,
    shapes: Sequence[tuple[int, int]],
    least_tokens: int = 1,
    rule: MemoryRule = DEFAULT_RULE,
) -> str:
    """A sentence for the user: what is short, and how many GPUs of this type would do."""
    weights = model.weight_bytes(1, 1, 0, rule.weight_dtype)
    per_gpu = gpu.memory_bytes * (rule.utilisation - rule.reserve)
    most = max((tp * pp for tp, pp in shapes if model.why_not(tp, pp) is None), default=0)
    enough = _fewest_gpus(model, gpu, least_tokens, rule)
    hint = f"; {enough} of them in one instance would do" if enough else ""
    return (
        f"{model.name} does not fit: its weights take {weights / GIB:.1f} GiB and {least_tokens} tokens of KV "
        f"{least_tokens * model.kv_bytes_per_token(rule.kv_dtype) / GIB:.2f} GiB, while an instance may have at most "
        f"{most} × {gpu.name} with {per_gpu / GIB:.1f} GiB usable each{hint}"
    )


def _fewest_gpus(model: ModelFacts, gpu: Gpu, least_tokens: int, rule: MemoryRule) -> int:
    shapes = [(tp, pp) for tp in (1, 2, 4, 8, 16) for pp in (1, 2, 4, 8, 16)]
    fitting = shapes_that_fit(model, gpu, shapes, least_tokens, rule)
    return min((tp * pp for (tp, pp), _ in fitting), default=0)
