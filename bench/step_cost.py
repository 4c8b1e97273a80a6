"""How the cost of a step grows: with the batch, the context and the prompt's length; and the host's time beside it.

Step times are of the bare engine. Host time is what a step of the real step loop takes outside the forward pass, with
the real machine, metrics and sampling, while ``batch`` sequences decode: events and effects, the plan, the sampling.
Messages to gateways are encoded by another thread and not in it. A curve is called super-linear when the time grows by
over 1.1 times as much as its work from one point to the next: work is the sequences of a batch, the tokens of a
context, and of a prompt the floating point operations (attention is quadratic by nature). ``growth`` says more.

    python bench/step_cost.py           # writes results/step_cost.json and results/step_cost.svg
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import matplotlib
import torch
from common import RESULTS, write
from growth import TOLERANCE, Curve, curve, verdict
from prometheus_client import CollectorRegistry

from distserve.core.effects import AbortSend, CloseTicket, OpenTicket, SendStage
from distserve.core.events import GatewayAttached, Submit
from distserve.core.types import (
    Endpoint,
    GatewayRef,
    InstanceRef,
    Member,
    Request,
    Role,
    Sampling,
    StepItem,
    StepPlan,
    Stopping,
    first_epoch,
)
from distserve.engine.config import DTYPES, EngineConfig
from distserve.engine.forward import Forward
from distserve.engine.runner import Engine, StepOutput
from distserve.instance.inbox import Inbox
from distserve.instance.loop import StepLoop, Turn
from distserve.loadgen.machine import CpuWatch
from distserve.models.catalog import resolve_model
from distserve.models.config import read_config
from distserve.observe.metrics import InstanceMetrics
from distserve.sched.config import InstanceConfig
from distserve.sched.instance import InstanceState

matplotlib.use("svg")
GREEDY = Sampling(temperature=0.0)
DRAWN = Sampling(temperature=0.8, top_p=0.95, seed=1)
HOST_KINDS = {
    "greedy": GREEDY,
    "top-p 0.95": DRAWN,
    "top-k 50, top-p 0.95": replace(DRAWN, top_k=50),
    "top-p 0.95, three penalties": replace(DRAWN, repetition_penalty=1.1, presence_penalty=0.1, frequency_penalty=0.1),
    "greedy, 5 logprobs": replace(GREEDY, logprobs=5),
}
GATEWAY = GatewayRef("bench", 1)
BATCH_CONTEXT = 256
"""Tokens of KV behind each sequence of the curve over batches."""

CONTEXT_BATCHES = (1, 16)
HOST_PROMPT = 16
"""Tokens of each prompt of the host curve: short, because the host does not read them."""


class Timed:
    """A forward pass with a stop-watch: ``spans`` of (begin, end, rows, sampled)."""

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self.spans: list[tuple[float, float, int, int]] = []

    def __call__(self, plan: StepPlan) -> torch.Tensor | None:
        began = time.perf_counter()
        logits = self._forward(plan)
        self.spans.append((began, time.perf_counter(), plan.tokens, len(logits) if logits is not None else 0))
        return logits


class Steps:
    """Steps of one engine, timed."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._repeats = args.repeats
        longest = max([1, *args.batches]) * (BATCH_CONTEXT + 16), max([1, *args.contexts]) * max(CONTEXT_BATCHES) + 1024
        config = EngineConfig(model=args.model, dtype=args.dtype, threads=args.threads, kv_tokens=max(*longest, 4096))
        self.engine = Engine.load(config)
        self.engine._pass.forward = self.forward = Timed(self.engine.forward)
        self._shape = read_config(resolve_model(args.model))
        self._parameters = self.engine.weight_bytes / DTYPES[args.dtype].itemsize

    def decode(self, batch: int, context: int) -> float:
        """Best seconds of a step of ``batch`` sequences with ``context`` tokens behind each, sampling included."""
        each = -(-(context + 1) // self.engine.spec.block_size)
        items = tuple(
            StepItem(str(i), context, (17 + i,), tuple(range(i * each, (i + 1) * each)), True, 1, GREEDY)
            for i in range(batch)
        )
        return self._best(StepPlan(1, items))

    def prefill(self, tokens: int) -> float:
        """Best seconds of one whole prompt."""
        ids = tuple(torch.randint(3, self.engine.spec.vocab_size, (tokens,)).tolist())
        blocks = tuple(range(-(-tokens // self.engine.spec.block_size)))
        return self._best(StepPlan(1, (StepItem("a", 0, ids, blocks, True, 0, GREEDY),)))

    def prefill_operations(self, tokens: float) -> float:
        """Floating point operations of a prompt: layers, attention, and the head for one row."""
        head = self._shape.hidden * self._shape.vocab_size
        width = self._shape.heads * self._shape.head_dim
        pairs = tokens * (tokens + 1) / 2
        return 2 * tokens * (self._parameters - head) + 4 * pairs * self._shape.layers * width + 2 * head

    def _best(self, plan: StepPlan) -> float:
        return min(self.engine.run(plan).forward_s for _ in range(self._repeats + 1))


@dataclass(slots=True)
class NoMoves:
    """The data plane of an instance that is alone."""

    asked: list[object] = field(default_factory=list)

    def open_ticket(self, ticket: Any, blocks: tuple[int, ...]) -> None:
        self.asked.append(OpenTicket)

    def close_ticket(self, move_id: str) -> None:
        self.asked.append(CloseTicket)

    def send_stage(self, ticket: Any, address: str, start: int, end: int, blocks: tuple[int, ...], final: bool) -> None:
        self.asked.append(SendStage)

    def abort_send(self, move_id: str) -> None:
        self.asked.append(AbortSend)

    def peer_lost(self, peer: InstanceRef) -> None:
        self.asked.append(peer)


class TimedEngine:
    """An engine whose steps begin and end on record, around those of its forward pass."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.depth = engine.depth
        self.spans: list[tuple[float, float]] = []

    def submit(self, plan: StepPlan) -> None:
        self._engine.submit(plan)

    def wait(self) -> StepOutput:
        began = time.perf_counter()
        output = self._engine.wait()
        self.spans.append((began, time.perf_counter()))
        return output

    def give_up(self, number: int) -> None:
        self._engine.give_up(number)


def host_time(steps: Steps, batch: int, count: int, sampling: Sampling) -> dict[str, float]:
    """Median seconds a step, by part, over some ``count`` steps of the step loop that decode ``batch`` sequences."""
    engine, forward = TimedEngine(steps.engine), steps.forward
    member = Member(Endpoint(InstanceRef("bench", 1), "", ""), Role.MIXED, steps.engine.spec)
    config = InstanceConfig(max_sequences=batch, max_waiting=batch, prefix_cache=False)
    machine, inbox = InstanceState(member, config), Inbox()
    inbox.put(GatewayAttached(GATEWAY))
    for i in range(batch):
        prompt = tuple(3 + (7 * i + n) % 1000 for n in range(HOST_PROMPT))
        stopping = Stopping(count + 8 + batch * HOST_PROMPT // config.max_mixed_tokens)
        request = Request(f"r{i}", member.spec.name, prompt, sampling, stopping, 3600.0)
        inbox.put(Submit(GATEWAY, request, first_epoch(1), member.endpoint, (), 3600.0))

    def outward(turn: Turn) -> None:
        if turn.idle and forward.spans:
            inbox.stop()

    metrics = InstanceMetrics(CollectorRegistry(), model_name="bench", instance="bench", role=Role.MIXED)
    forward.spans.clear()
    StepLoop(inbox, machine, engine, NoMoves(), outward, [metrics]).run()
    return parts_of(forward.spans, engine.spans, batch)


def parts_of(
    forwards: Sequence[tuple[float, float, int, int]], runs: Sequence[tuple[float, float]], batch: int
) -> dict[str, float]:
    """Of the steps that decode the whole batch, and are followed by another such step."""
    whole = [rows == batch == sampled for _, _, rows, sampled in forwards]
    found: dict[str, list[float]] = {"forward_s": [], "engine_s": [], "machine_s": [], "host_s": []}
    for i in range(len(forwards) - 1):
        if not (whole[i] and whole[i + 1]):
            continue
        began, ended = forwards[i][:2]
        machine = runs[i + 1][0] - runs[i][1]
        in_engine = (runs[i][1] - runs[i][0]) - (ended - began)
        found["forward_s"].append(ended - began)
        found["engine_s"].append(in_engine)
        found["machine_s"].append(machine)
        found["host_s"].append(in_engine + machine)
    if not found["host_s"]:
        raise SystemExit(f"no two steps in a row decoded all {batch} sequences; ask for more --host-steps")
    return {name: statistics.median(values) for name, values in found.items()} | {"steps": len(found["host_s"])}


def step_curves(steps: Steps, args: argparse.Namespace) -> list[Curve]:
    curves = []
    points = {n: said(f"decode, batch {n}", steps.decode(n, BATCH_CONTEXT)) for n in args.batches}
    curves.append(curve(f"decode, {BATCH_CONTEXT} tokens of context", "batch", points))
    for batch in CONTEXT_BATCHES:
        points = {n: said(f"decode, batch {batch}, context {n}", steps.decode(batch, n)) for n in args.contexts}
        curves.append(curve(f"decode, batch {batch}", "context", points))
    points = {n: said(f"prefill of {n} tokens", steps.prefill(n)) for n in args.prompts}
    curves.append(curve("prefill", "prompt tokens", points, steps.prefill_operations))
    return curves


def host_curves(steps: Steps, args: argparse.Namespace) -> tuple[list[Curve], dict[str, Any]]:
    curves, parts = [], {}
    for name, sampling in HOST_KINDS.items():
        rows: dict[str, dict[str, float]] = {}
        for batch in args.host_batches:
            rows[str(batch)] = row = host_time(steps, batch, args.host_steps, sampling)
            said(f"host, batch {batch}, {name} (machine {row['machine_s'] * 1e3:.2f} ms)", row["host_s"])
        curves.append(curve(f"host, {name}", "batch", {int(n): row["host_s"] for n, row in rows.items()}))
        parts[name] = rows
    return curves, parts


def said(what: str, seconds: float) -> float:
    print(f"  {what}: {seconds * 1e3:.2f} ms", flush=True)
    return seconds


def plot(curves: Sequence[Curve], name: str) -> None:
    """One panel for each axis, both axes logarithmic; a straight dotted line is linear growth."""
    from matplotlib import pyplot  # after the backend was chosen

    matplotlib.rcParams["svg.hashsalt"] = name
    panels = [("batch", False), ("context", False), ("prompt tokens", False), ("batch", True)]
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7.5), constrained_layout=True)
    for axis, (over, host) in zip(axes.flat, panels, strict=True):
        for line in (c for c in curves if c.over == over and c.name.startswith("host") is host):
            shown = [(x, y * 1e3) for x, y in zip(line.x, line.y, strict=True) if x > 0]
            growing = f" (x^{line.exponent:.2f})" if line.exponent is not None else ""
            axis.plot(*zip(*shown, strict=True), marker="o", label=line.name + growing)
            (x0, _), (x1, y1) = shown[0], shown[-1]
            axis.plot((x0, x1), (y1 * x0 / x1, y1), linestyle=":", color="grey", linewidth=1)
        axis.set(xscale="log", yscale="log", xlabel=over, ylabel="ms", title="host time a step" if host else "step")
        axis.set_xscale("log", base=2)
        axis.grid(True, which="major", alpha=0.3)
        axis.legend(fontsize=8)
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / f"{name}.svg", metadata={"Date": None})


def main() -> None:
    args = arguments()
    watch = CpuWatch()
    steps = Steps(args)
    curves = step_curves(steps, args)
    hosts, parts = host_curves(steps, args)
    curves += hosts
    for line in curves:
        print(verdict(line))
    largest = max(args.host_batches)
    for name, rows in parts.items():
        host, machine, sampling, forward = (
            rows[str(largest)][part] * 1e3 for part in ("host_s", "machine_s", "engine_s", "forward_s")
        )
        print(
            f"host time at batch {largest}, {name}: {host:.2f} ms a step (machine and effects {machine:.2f}, sampling "
            f"{sampling:.2f}) beside {forward:.1f} ms of forward pass"
        )
    plot(curves, args.name)
    body = {"model": args.model, "dtype": args.dtype, "threads": args.threads, "cores": watch.stop()}
    write(args.name, {**body, "tolerance": TOLERANCE, "curves": [asdict(c) for c in curves], "host": parts})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    powers = [2**n for n in range(9)]
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(DTYPES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="+", default=powers)
    parser.add_argument("--contexts", type=int, nargs="+", default=[0, 128, 256, 512, 1024, 2048, 4096])
    parser.add_argument("--prompts", type=int, nargs="+", default=[16, 32, 64, 128, 256, 512, 1024, 2048])
    parser.add_argument("--host-batches", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--host-steps", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--name", default="step_cost", help="of the files in bench/results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
