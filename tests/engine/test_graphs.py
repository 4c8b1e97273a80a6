"""Decode steps on fixed buffers, padded to a few sizes: the same logits and the same KV as the plain step, whatever ran
before. All but CUDA's own recording is tried on any device.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distserve.core.types import StepItem, StepPlan
from distserve.engine.config import EngineConfig
from distserve.engine.graphs import CudaCapture, GraphedForward, Run, batch_sizes, uncaptured
from distserve.engine.paged_inputs import NOWHERE
from distserve.engine.pool import KvPool
from distserve.engine.runner import Engine, build_model
from distserve.engine.triton_forward import PagedForward
from distserve.engine.upload import Upload
from distserve.models.config import read_config
from distserve.models.registry import Model
from distserve.models.step import PagedKv, StepInput
from tests.engine.driver import ids, run
from tests.engine.test_triton_forward import sequences
from tests.tiny_models import make_tiny

SIZE, BLOCKS, LENGTH, MOST = 4, 96, 512, 6


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("tiny"), num_hidden_layers=2)


class Rig:
    """A tiny model over a pool of noise, plain and on fixed buffers, with what the latter's model was given."""

    def __init__(self, directory: Path, kernels: str = "torch", capture: Callable[[Run], Run] = uncaptured) -> None:
        device = torch.device("cuda" if kernels == "cuda" else "cpu")
        config = EngineConfig(
            str(directory), block_size=SIZE, kernels="triton" if kernels != "torch" else "torch", device=device.type
        )
        shape = read_config(directory)
        with torch.inference_mode():
            model, _ = build_model(directory, shape, config, LENGTH, None)
        self.pool = KvPool(BLOCKS, shape.layers, shape.kv_heads, SIZE, shape.head_dim, torch.float32, device)
        generator = torch.Generator().manual_seed(3)
        self.pool.tensor.copy_(torch.randn(self.pool.tensor.shape, generator=generator))
        self.given: list[StepInput] = []
        self.beside: list[StepPlan] = []
        self.plain = PagedForward(model, self.pool, LENGTH)
        self.graphed = GraphedForward(self._noting(model), self.pool, self._beside, LENGTH, capture, MOST)

    def _noting(self, model: Model) -> Model:
        def call(step: StepInput, kv: object, before: Tensor | None = None) -> Tensor | None:
            self.given.append(step)
            return model(step, kv, before)  # type: ignore[arg-type]

        return call

    def _beside(self, plan: StepPlan) -> Tensor | None:
        self.beside.append(plan)
        return None

    def both(self, plan: StepPlan) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(logits, pool) after the plan by fixed buffers, and the same after the plain step from the same pool."""
        before = self.pool.tensor.clone()
        with torch.inference_mode():
            wanted, wanted_pool = self.plain(plan), self.pool.tensor.clone()
            self.pool.tensor.copy_(before)
            found = self.graphed(plan)
        assert found is not None and wanted is not None
        return found.clone(), self.pool.tensor.clone(), wanted, wanted_pool


def batch(*starts: int, shift: int = 0) -> StepPlan:
    """Single tokens at these positions, over blocks of their own."""
    items, block = [], shift
    for i, start in enumerate(starts):
        need = start // SIZE + 1
        items.append(StepItem(str(i), start, (10 + i + shift,), tuple(range(block, block + need)), True))
        block += need
    return StepPlan(1, tuple(items))


PLANS = [batch(0), batch(17, 3, 40), batch(5, 6, 7, 8, 9, 10), batch(2, 60), batch(11, shift=9), batch(4, 0, 0, 31, 2)]


def test_sizes_are_powers_of_two_up_to_the_limit():
    assert batch_sizes(1) == (1,)
    assert batch_sizes(8) == (1, 2, 4, 8)
    assert batch_sizes(10) == (1, 2, 4, 8, 10)
    assert batch_sizes(256)[-2:] == (128, 256)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_padded_steps_are_the_plain_ones(directory, kernels):
    """Logits, and every byte of the pool: padding writes nowhere. Batches grow and shrink over stale rows."""
    if kernels == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
    rig = Rig(directory, kernels)
    for plan in PLANS if kernels == "torch" else PLANS[1:4]:
        found, found_pool, wanted, wanted_pool = rig.both(plan)
        assert found.shape == wanted.shape
        assert (found - wanted).abs().max() < 1e-4
        assert (found_pool - wanted_pool).abs().max() < 1e-4
    assert not rig.beside


def test_padding_writes_and_reads_nothing(directory):
    rig = Rig(directory)
    plan = batch(5, 6, 7)
    with torch.inference_mode():
        rig.graphed(batch(40, 41, 42, 43))  # leaves rows behind
        before = rig.pool.tensor.clone()
        rig.graphed(plan)
    step = rig.given[-1]
    assert isinstance(step.kv, PagedKv) and step.kv.decode is not None
    assert (step.kv.slots[3:] == NOWHERE).all() and (step.kv.decode.lengths[3:] == 0).all()
    changed = (rig.pool.tensor != before).flatten(1).any(1).nonzero().flatten().tolist()
    assert changed == [item.blocks[-1] for item in plan.items]


def test_a_table_is_sent_once_and_again_when_its_row_has_another(directory):
    """The same rows a token further on; then a row's blocks change, grow, or are another sequence's."""
    rig = Rig(directory)
    sent: list[int] = []
    upload = rig.graphed._buffers._upload
    send = upload.send

    def counting(*columns: array[int]) -> tuple[Tensor, ...]:
        sent.append(len(columns[2]))
        return send(*columns)

    upload.send = counting  # type: ignore[method-assign]
    one, two = batch(17, 3).items
    grown, moved = replace(two, start=4, blocks=(*two.blocks, 50)), replace(one, blocks=tuple(range(60, 65)))
    steps = [(one, two), (replace(one, start=18), two), (one, grown), (moved, grown), (grown,), (moved, grown)]
    for items in steps:
        found, _, wanted, _ = rig.both(StepPlan(1, items))
        assert (found - wanted).abs().max() < 1e-4
    assert sent == [2, 2, 0, 1, 1, 1, 1, 1], "two for recording size 2, one for size 1; then rows that changed"


def test_a_size_is_recorded_once_on_memory_that_never_moves(directory):
    """What a graph needs: the second step of a size reads the very tensors that the first one read."""
    recorded: list[Run] = []

    def capture(run: Run) -> Run:
        recorded.append(run)
        run()
        return run

    rig = Rig(directory, capture=capture)
    with torch.inference_mode():
        for plan in (batch(3, 4, 5), batch(50, 6, 7, 8), batch(9, 90, 1)):
            rig.graphed(plan)
    assert len(recorded) == 1
    places = {tuple(t.data_ptr() for t in tensors(step)) for step in rig.given}
    assert len(rig.given) == 4 and len(places) == 1


def tensors(step: StepInput) -> list[Tensor]:
    assert isinstance(step.kv, PagedKv) and step.kv.decode is not None and step.sample_rows is not None
    decode = step.kv.decode
    return [step.token_ids, step.positions, step.sample_rows, step.kv.slots, decode.tables, decode.lengths]


def test_recording_every_size_leaves_the_pool_as_it_was(directory):
    recorded: list[int] = []

    def capture(run: Run) -> Run:
        recorded.append(len(run()))
        return run

    rig = Rig(directory, capture=capture)
    before = rig.pool.tensor.clone()
    with torch.inference_mode():
        rig.graphed.record_all()
    assert recorded == [6, 4, 2, 1]
    assert torch.equal(rig.pool.tensor, before)
    found, _, wanted, _ = rig.both(batch(7, 30))
    assert len(recorded) == 4 and (found - wanted).abs().max() < 1e-4


@pytest.mark.parametrize(
    "plan",
    [
        batch(*range(MOST + 1)),
        StepPlan(1, (StepItem("p", 0, (1, 2), (0,), True), *batch(5, shift=3).items)),
        StepPlan(1, (StepItem("quiet", 0, (1,), (0,), False),)),
    ],
    ids=["too many", "a prompt among them", "samples nothing"],
)
def test_other_steps_go_to_the_plain_forward(directory, plan):
    rig = Rig(directory)
    assert rig.graphed(plan) is None
    assert rig.beside == [plan] and not rig.given


def test_sequences_at_the_longest_length_fit_the_buffers(directory):
    rig = Rig(directory)
    plan = StepPlan(1, (StepItem("long", BLOCKS * SIZE - 1, (9,), tuple(range(BLOCKS)), True), *batch(3).items))
    found, _, wanted, _ = rig.both(plan)
    assert (found - wanted).abs().max() < 1e-4


def test_what_was_sent_stays_when_more_is_sent():
    """Buffers take turns and grow; nothing that was sent before changes."""
    upload = Upload(torch.device("cpu"))
    sent = []
    for n in (3, 0, 40_000, 5, 7):
        wide, narrow = array("q", range(n)), array("i", range(n, 2 * n))
        sent.append((n, *upload.send(wide, narrow)))
    for n, wide_there, narrow_there in sent:
        assert not n or (wide_there.data_ptr() | narrow_there.data_ptr()) % 16 == 0
        assert wide_there.tolist() == list(range(n)) and narrow_there.tolist() == list(range(n, 2 * n))


# ── with a GPU ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.gpu
def test_recorded_steps_are_the_plain_ones(directory):
    rig = Rig(directory, "cuda", CudaCapture())
    with torch.inference_mode():
        rig.graphed.record_all()
    calls = len(rig.given)
    for plan in PLANS * 2:
        found, found_pool, wanted, wanted_pool = rig.both(plan)
        assert (found - wanted).abs().max() < 1e-3
        assert (found_pool - wanted_pool).abs().max() < 1e-3
    assert len(rig.given) == calls, "a replay runs no Python of the model"


@pytest.mark.gpu
def test_graphs_are_recorded_while_another_thread_copies(directory):
    """The mover's thread uses the device at any time; what it does is neither recorded nor refused."""
    ending = threading.Event()

    def copy() -> None:
        one = torch.zeros(1 << 20, device="cuda")
        host = torch.zeros(1 << 20, pin_memory=True)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            while not ending.is_set():
                one.copy_(host, non_blocking=True)
                stream.synchronize()

    thread = threading.Thread(target=copy)
    thread.start()
    try:
        rig = Rig(directory, "cuda", CudaCapture())
        with torch.inference_mode():
            rig.graphed.record_all()
    finally:
        ending.set()
        thread.join(30)
    found, _, wanted, _ = rig.both(PLANS[1])
    assert (found - wanted).abs().max() < 1e-3


@pytest.mark.gpu
def test_an_engine_with_graphs_chooses_the_tokens_of_one_without(directory):
    answers = {}
    for graphs in ("auto", "off"):
        engine = Engine.load(
            EngineConfig(str(directory), pool_blocks=40, device="cuda", cuda_graphs=graphs, max_model_len=LENGTH)
        )
        batch_of = sequences((5, 19, 33), 16)
        run(engine, batch_of, 12)
        answers[graphs] = [ids(s.output) for s in batch_of]
    assert answers["auto"] == answers["off"]


@pytest.mark.gpu
def test_integers_travel_in_page_locked_memory():
    upload = Upload(torch.device("cuda"))
    assert all(turn.memory.is_pinned() for turn in upload._turns)
    sent = [upload.send(array("q", [i] * 50_000), array("i", [i])) for i in range(20)]  # faster than it is copied
    for i, (wide, narrow) in enumerate(sent):
        assert wide.eq(i).all() and narrow.tolist() == [i]
