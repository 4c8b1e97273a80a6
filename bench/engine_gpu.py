"""Decode steps of a model of 8B's shape (random weights) through the engine: its memory floor, graphs on and off, one
step in flight and two, and the share of a step in which the device waits for the host. Run by ``kernels_gpu.py``; knows
no command.

Floor: the bytes that a step must read (all weights but the embedding's table, and the KV of every sequence) over the
rate at which the device copies. Host gap: the time of a step in which no kernel and no copy ran, by torch's profiler.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_common import Shapes, median

from distserve.core.types import CHOSEN_BEFORE, Sampling, StepItem, StepPlan
from distserve.engine.config import DTYPES, EngineConfig
from distserve.engine.graphs import GraphedForward, uncaptured
from distserve.engine.runner import Engine
from distserve.engine.triton_forward import PagedForward

GREEDY = Sampling(temperature=0.0)
STEPS = 64
IN_FLIGHT = (1, 2)
GOAL_FLOOR, GOAL_GAP = 1.3, 0.05


@dataclass(frozen=True, slots=True)
class Step:
    """Decode steps of one batch at one context."""

    batch: int
    context: int
    graphs: bool
    in_flight: int  # steps submitted and not yet waited for
    step_s: float  # by the clock, from one step's tokens to the next's
    tokens_per_s: float
    floor_s: float
    over_floor: float
    busy_s: float | None  # of the device, a step
    host_gap: float | None  # share of the step; None where there is no device to wait


def measure(shapes: Shapes, copy_rate: float) -> dict[str, Any]:
    """Every batch and context with graphs and without, on one loaded model; prints a line for each."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        engine = load(shapes, Path(folder))
    load_s = time.perf_counter() - began
    print(f"engine: {engine.weight_bytes / 1e9:.1f} GB of weights, ready in {load_s:.0f} s", flush=True)
    found = []
    for graphs, one in sides(engine):
        found += [asdict(decode(one, shapes, batch, context, graphs, copy_rate)) for batch, context in shapes.steps]
    return {"load_s": load_s, "weight_bytes": engine.weight_bytes, "goals": {"over_floor": GOAL_FLOOR, "gap": GOAL_GAP},
            "steps": found}  # fmt: skip


def sides(engine: Engine) -> Iterator[tuple[bool, Engine]]:
    """(graphs, engine): with graphs and without, one step in flight and two, over the same weights and pool.

    Dry, the engine has none: its steps then go through the same buffers, unrecorded. Where they could not be recorded
    there is one side only.
    """
    forward = engine.forward
    if isinstance(forward, PagedForward) and engine.pool.tensor.device.type == "cpu":
        forward = GraphedForward(
            forward.model, engine.pool, forward, engine.spec.max_model_len, uncaptured, 4, forward.chosen
        )
    graphed = isinstance(forward, GraphedForward)
    for graphs, one in [(True, forward), (False, forward.beside)] if graphed else [(False, forward)]:
        for depth in IN_FLIGHT:
            yield graphs, Engine(engine.spec, one, engine.pool, engine.weight_bytes, depth=depth)


def load(shapes: Shapes, folder: Path) -> Engine:
    """A model of this shape with random weights, and a pool for the largest case."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": shapes.vocab,
        "hidden_size": shapes.hidden,
        "intermediate_size": shapes.wide,
        "num_hidden_layers": shapes.layers,
        "num_attention_heads": shapes.heads,
        "num_key_value_heads": shapes.kv_heads,
        "head_dim": shapes.dim,
        "max_position_embeddings": 16384,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    tokens = max(batch * (context + 2 * STEPS + 2 * shapes.size) for batch, context in shapes.steps)
    names = {dtype: name for name, dtype in DTYPES.items()}
    return Engine.load(
        EngineConfig(
            model=f"random:{folder}",
            dtype=names[shapes.dtype],
            device=shapes.device,
            kernels="triton",
            block_size=shapes.size,
            kv_tokens=tokens,
        )
    )


def decode(engine: Engine, shapes: Shapes, batch: int, context: int, graphs: bool, copy_rate: float) -> Step:
    """Steps as an instance takes them: a new plan each time, one token longer, sampled and read by the host."""
    run = Stepper(engine, batch, context, shapes.size)
    steps = 2 if shapes.dry else STEPS
    run.steps(1 if shapes.dry else 8)
    times = run.steps(steps)
    busy = None if shapes.dry else busy_seconds(run, steps)
    step_s = median(times)
    table = shapes.vocab * shapes.hidden * shapes.dtype.itemsize
    kv = batch * (context + steps / 2) * engine.pool.block_bytes / shapes.size
    floor_s = (engine.weight_bytes - table + kv) / copy_rate
    gap = None if busy is None else max(0.0, 1 - busy / step_s)
    in_flight = engine.depth
    found = Step(batch, context, graphs, in_flight, step_s, batch / step_s, floor_s, step_s / floor_s, busy, gap)
    waits = "" if gap is None else f"   host gap {gap:5.1%} (goal {GOAL_GAP:.0%})"
    print(
        f"decode {batch:3} × {context:5}  graphs {'on ' if graphs else 'off'} in flight {in_flight} "
        f"{step_s * 1e3:8.2f} ms "
        f"{found.tokens_per_s:9.0f} tok/s   {found.over_floor:5.2f}× the floor (goal {GOAL_FLOOR}){waits}",
        flush=True,
    )
    return found


class Stepper:
    """Sequences that decode on and on over blocks of their own."""

    def __init__(self, engine: Engine, batch: int, context: int, size: int) -> None:
        self._engine, self._batch, self._at, self._size = engine, batch, context, size
        self._each = engine.pool.blocks // batch
        self._tokens = [17 + i % 40 for i in range(batch)]
        self._number = 0

    def steps(self, count: int) -> list[float]:
        """Seconds between the tokens of ``count`` steps; a sequence that is at its end stays there.

        As many steps as may be are in flight: all but the first take their tokens from the one before, on the device.
        """
        times: list[float] = []
        submitted, began = 0, time.perf_counter()
        while len(times) < count:
            while submitted < min(count, len(times) + self._engine.depth):
                self._engine.submit(self._plan(follow=submitted > len(times)))
                submitted += 1
            self._tokens = [token.id for _, token in self._engine.wait().tokens]
            now = time.perf_counter()
            times.append(now - began)
            began = now
        return times

    def _plan(self, follow: bool) -> StepPlan:
        self._number += 1
        held = min(self._each, self._at // self._size + 1)
        self._at = min(self._at, self._each * self._size - 1)
        items = tuple(
            StepItem(
                str(i), self._at, (CHOSEN_BEFORE if follow else token,),
                tuple(range(i * self._each, i * self._each + held)), True, 1, GREEDY,
            )
            for i, token in enumerate(self._tokens)
        )  # fmt: skip
        self._at += 1
        return StepPlan(self._number, items)


def busy_seconds(run: Stepper, steps: int) -> float:
    """Time a step in which the device ran a kernel or a copy."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run.steps(steps)
        torch.cuda.synchronize()
    on_device = [event.time_range for event in profile.events() if event.device_type.name == "CUDA"]
    return covered([(span.start, span.end) for span in on_device]) / 1e6 / steps


def covered(spans: list[tuple[float, float]]) -> float:
    """The length of the union of spans."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
