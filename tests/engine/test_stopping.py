"""A step given up ends between two layers, touches no other step, and leaves a pool that the next one is right on."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from distserve.core.types import StepPlan
from distserve.engine.config import EngineConfig
from distserve.engine.forward import TorchForward
from distserve.engine.native import NativeForward, take_over
from distserve.engine.runner import Engine, build_model
from distserve.engine.stopping import StepGivenUp, StopSign
from distserve.models.catalog import default_cache
from distserve.models.config import read_config
from distserve_kernels.cores import Threads
from distserve_kernels.native import library
from tests.engine.driver import Running, complete, ids
from tests.tiny_models import VOCAB_SIZE, make_tiny

LAYERS = 8
BLOCKS = tuple(range(64))


def built() -> bool:
    try:
        library.find_compiler()
    except library.NativeUnavailable:
        return False
    return True


native = pytest.mark.skipif(not built(), reason="native kernels cannot be built")
KERNELS = [pytest.param("native", marks=native), "torch"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("tiny"), num_hidden_layers=LAYERS)


@pytest.fixture(scope="module", params=[1, 2])
def engines(request: pytest.FixtureRequest, directory: Path) -> dict[str, Engine]:
    """One of each kind, by kernels; of one thread and of a team that must agree."""
    kinds = ["native", "torch"] if built() else ["torch"]
    options = {"model": str(directory), "pool_blocks": 64, "threads": request.param}
    before = torch.get_num_threads()
    made = {kernels: Engine.load(EngineConfig(kernels=kernels, **options)) for kernels in kinds}  # type: ignore[arg-type]
    torch.set_num_threads(before)
    return made


@pytest.fixture(params=KERNELS)
def engine(request: pytest.FixtureRequest, engines: dict[str, Engine]) -> Engine:
    return engines[request.param]


def prompt(length: int, seed: int = 3) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()


def plan(number: int, tokens: list[int]) -> StepPlan:
    return StepPlan(number, (Running("r", tuple(tokens), BLOCKS).item(),))


@pytest.mark.parametrize("length", [1, 40, 300])
def test_a_step_given_up_beforehand_writes_nothing_and_the_next_is_right(engine: Engine, length: int) -> None:
    tokens = prompt(length)
    right = ids(complete(engine, tokens, 5))
    engine.pool.tensor.zero_()
    engine.give_up(77)
    with pytest.raises(StepGivenUp, match="step 77"):
        engine.run(plan(77, tokens))
    assert not engine.pool.tensor.any()
    assert ids(complete(engine, tokens, 5)) == right


def test_a_sign_for_one_step_ends_no_other(engine: Engine) -> None:
    engine.give_up(5)
    assert engine.run(plan(4, prompt(20))).tokens
    assert engine.run(plan(6, prompt(20))).tokens


def test_torch_stops_at_the_layer_it_has_come_to(directory: Path) -> None:
    """Another thread gives the step up while its third layer runs: the others are not begun."""
    whole = Engine.load(EngineConfig(model=str(directory), kernels="torch", pool_blocks=64))
    forward = whole.forward
    assert isinstance(forward, TorchForward)
    right = ids(complete(whole, prompt(200), 4))
    whole.pool.tensor.zero_()
    third = forward._model.layers[2]  # type: ignore[attr-defined]

    def while_it_runs(*inputs: object) -> object:
        other = threading.Thread(target=whole.give_up, args=(1,))
        other.start()
        other.join()
        return third(*inputs)

    forward._model.layers[2] = while_it_runs  # type: ignore[attr-defined]
    with pytest.raises(StepGivenUp):
        whole.run(plan(1, prompt(200)))
    assert written(whole.pool.tensor) == [True] * 3 + [False] * (LAYERS - 3)
    forward._model.layers[2] = third  # type: ignore[attr-defined]
    whole.give_up(0)
    assert ids(complete(whole, prompt(200), 4)) == right


def written(pool: torch.Tensor) -> list[bool]:
    """Of each layer, whether any KV stands in it."""
    return [bool(pool[:, layer].any()) for layer in range(pool.shape[1])]


class KvSign(StopSign):
    """A sign that stands in the pool itself: the step is given up once it has written that place."""

    def __init__(self, place: torch.Tensor) -> None:
        super().__init__()
        self._place = place

    @property
    def address(self) -> int:
        return self._place.data_ptr()

    @property
    def number(self) -> int:
        return ctypes.c_int64.from_address(self._place.data_ptr()).value


@native
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("layer", [0, 3, LAYERS - 1])
def test_native_stops_at_the_layer_it_has_come_to(directory: Path, threads: int, layer: int) -> None:
    """The KV that one layer writes is itself the sign: the layers behind it are not begun, whatever the threads do."""
    config = EngineConfig(model=str(directory), pool_blocks=64)
    shape = read_config(directory)
    with torch.inference_mode():
        model, _ = build_model(directory, shape, config, shape.max_positions, None)
        pool = torch.zeros((64, LAYERS, 2, shape.kv_heads, config.block_size, shape.head_dim))
        sign = KvSign(pool[BLOCKS[0], layer, 0, 0, 0])
        forward = take_over(
            model, shape, pool, shape.max_positions, Threads(threads), default_cache() / "native", None, sign
        )
        assert isinstance(forward, NativeForward)
        whole = forward(plan(1, prompt(300)))
        assert whole is not None
        whole = whole.clone()
        number = sign.number
        pool.zero_()
        with pytest.raises(StepGivenUp):
            forward(plan(number, prompt(300)))
        assert written(pool) == [True] * (layer + 1) + [False] * (LAYERS - 1 - layer)
        again = forward(plan(1, prompt(300)))
        assert again is not None
        assert torch.equal(again, whole)


@native
def test_native_is_given_up_from_another_thread(engines: dict[str, Engine]) -> None:
    """While a step of many long prompts runs, which takes no interpreter's lock."""
    engine = engines["native"]
    right = ids(complete(engine, prompt(300), 4))
    items = tuple(Running(f"r{n}", tuple(prompt(500, n)), BLOCKS[:32]).item() for n in range(12))
    outcome: list[BaseException | None] = []

    def run() -> None:
        try:
            engine.run(StepPlan(9, items))
            outcome.append(None)
        except StepGivenUp as given_up:
            outcome.append(given_up)

    engine.pool.tensor.zero_()
    step = threading.Thread(target=run)
    step.start()
    for _ in until_layer_0_is_written(engine, step):
        pass
    engine.give_up(9)
    step.join()
    assert isinstance(outcome[0], StepGivenUp)
    assert not engine.pool.tensor[:, -1].any(), "the last layer was begun all the same"
    assert ids(complete(engine, prompt(300), 4)) == right


def until_layer_0_is_written(engine: Engine, step: threading.Thread) -> Iterator[None]:
    while step.is_alive() and not engine.pool.tensor[0, 0, 0, 0, 0].any():
        yield
