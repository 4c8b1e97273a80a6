"""Steps launched ahead of the host, as a GPU runs them: the same code on a CPU in Triton's interpreter. Tokens with
followers are those without, whatever they ask; what fails takes what is behind it, and nothing before it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distserve.core.types import CHOSEN_BEFORE, Sampling, StepItem, StepPlan
from distserve.engine.chosen import ChosenIds
from distserve.engine.config import EngineConfig
from distserve.engine.device_sampler import DeviceSampler
from distserve.engine.device_steps import DeviceSteps
from distserve.engine.graphs import GraphedForward, uncaptured
from distserve.engine.runner import Engine
from distserve.engine.sampler import choose_tokens
from distserve.engine.stepping import StepOutput
from distserve.engine.stopping import StepGivenUp
from distserve.engine.triton_forward import PagedForward
from tests.engine.driver import Running, ids, run
from tests.tiny_models import make_tiny

pytest.importorskip("triton", reason="triton is not installed: pip install 'distserve[dev]' has it on Linux")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GREEDY = Sampling(temperature=0.0)
KINDS = [
    GREEDY,
    Sampling(temperature=0.9, top_k=20, seed=3),
    Sampling(temperature=1.2, top_p=0.8, seed=4),
    Sampling(temperature=0.7, seed=5),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("tiny"), num_hidden_layers=2)


def loaded(directory: Path, depth: int, graphs: str = "off", kernels: str = "triton") -> Engine:
    return Engine.load(
        EngineConfig(
            str(directory),
            pool_blocks=80,
            block_size=4,
            kernels=kernels,
            device=DEVICE,
            cuda_graphs=graphs,
            max_model_len=256,
            steps_in_flight=depth,
        )
    )


def on_buffers(engine: Engine) -> Engine:
    """Its decode steps through fixed buffers; on a CPU unrecorded."""
    forward = engine.forward
    if isinstance(forward, PagedForward):
        forward = GraphedForward(forward.model, engine.pool, forward, 256, uncaptured, 8, forward.chosen)
    return Engine(engine.spec, forward, engine.pool, engine.weight_bytes, depth=engine.depth)


def sequences(lengths: Sequence[int], kinds: Sequence[Sampling]) -> list[Running]:
    generator = torch.Generator().manual_seed(7)
    found, block = [], 0
    for i, (n, kind) in enumerate(zip(lengths, kinds, strict=True)):
        need = -(-(n + 16) // 4)
        prompt = tuple(torch.randint(3, 380, (n,), generator=generator).tolist())
        found.append(Running(str(i), prompt, tuple(range(block, block + need)), kind))
        block += need
    return found


def ahead(engine: Engine, batch: Sequence[Running], tokens: int) -> list[list[int]]:
    """Each step is submitted before the one before it was waited for: all but the first follow. Prompts go first."""
    outputs: dict[str, list[int]] = {s.id: [] for s in batch}
    outstanding: deque[StepPlan] = deque()

    def take() -> None:
        outstanding.popleft()
        for request, token in engine.wait().tokens:
            outputs[request].append(token.id)

    for number in range(1, tokens + 1):
        items = []
        for s in batch:
            item = s.item()
            if number > 1:
                at = len(s.prompt) + number - 2
                item = replace(item, start=at, token_ids=(CHOSEN_BEFORE,), output_index=number - 1, sample=True)
            items.append(item)
        if len(outstanding) == engine.depth:
            take()
        plan = StepPlan(number, tuple(items if number % 2 else reversed(items)))
        engine.submit(plan)
        outstanding.append(plan)
    while outstanding:
        take()
    return [outputs[s.id] for s in batch]


def in_turn(engine: Engine, batch: Sequence[Running], tokens: int) -> list[list[int]]:
    run(engine, batch, tokens)
    return [ids(s.output) for s in batch]


@pytest.mark.parametrize(
    ("kinds", "depth", "tokens"),
    [([GREEDY] * 3, 2, 5), ([GREEDY] * 3, 3, 4), ([GREEDY, KINDS[1], KINDS[3]], 2, 3)],
    ids=["greedy", "three in flight", "drawn"],
)
def test_tokens_of_followers_are_those_of_torch_step_by_step(
    directory: Path, kinds: list[Sampling], depth: int, tokens: int
) -> None:
    """In another order every second step, so that rows do not stay where they were."""
    wanted = in_turn(loaded(directory, 1, kernels="torch"), sequences((5, 9, 2), kinds), tokens)
    assert ahead(loaded(directory, depth), sequences((5, 9, 2), kinds), tokens) == wanted
    assert len({token for answer in wanted for token in answer}) > 4


def test_followers_in_fixed_buffers(directory: Path) -> None:
    wanted = in_turn(loaded(directory, 1, kernels="torch"), sequences((5, 9, 2), [GREEDY] * 3), 5)
    engine = on_buffers(loaded(directory, 2))
    assert isinstance(engine.forward, GraphedForward)
    assert ahead(engine, sequences((5, 9, 2), [GREEDY] * 3), 5) == wanted


def test_rows_that_ask_more_are_served_by_the_host_and_followed_all_the_same(directory: Path) -> None:
    kinds = [replace(GREEDY, logprobs=2), Sampling(temperature=0.8, seed=9), GREEDY]
    plain = [replace(kinds[0], logprobs=-1), *kinds[1:]]
    wanted = in_turn(loaded(directory, 1, kernels="torch"), sequences((5, 9, 2), plain), 3)
    assert ahead(loaded(directory, 2), sequences((5, 9, 2), kinds), 3) == wanted


def test_a_prompt_in_chunks_beside_followers(directory: Path) -> None:
    """Steps of both kinds, one that samples nothing among them."""
    one, late = sequences((5, 11), [GREEDY] * 2)
    alone = zip(sequences((5, 11), [GREEDY] * 2), (4, 1), strict=True)
    wanted = [in_turn(loaded(directory, 1, kernels="torch"), [s], n)[0] for s, n in alone]
    engine = loaded(directory, 2)
    whole = late.item()
    chunks = [
        replace(whole, token_ids=whole.token_ids[low:high], start=low, sample=high == 11)
        for low, high in ((0, 4), (4, 8), (8, 11))
    ]
    singles = [replace(one.item(), start=5 + i, token_ids=(CHOSEN_BEFORE,), output_index=i + 1) for i in range(3)]
    plans = [(one.item(),), (singles[0], chunks[0]), (chunks[1], singles[1]), (chunks[2], singles[2])]
    found: dict[str, list[int]] = {"0": [], "1": []}
    for number, items in enumerate(plans, 1):
        engine.submit(StepPlan(number, items))
        if number > 1:
            for request, token in engine.wait().tokens:
                found[request].append(token.id)
    for request, token in engine.wait().tokens:
        found[request].append(token.id)
    assert [found["0"], found["1"]] == wanted


def test_torch_on_a_device_fills_in_on_the_host(directory: Path) -> None:
    """A forward pass that takes no ids on the device: its steps are computed to their end when they are submitted."""
    wanted = in_turn(loaded(directory, 1, kernels="torch"), sequences((5, 9), [GREEDY] * 2), 4)
    engine = loaded(directory, 1, kernels="torch")
    device = torch.device(DEVICE)
    engine._stepping = DeviceSteps(engine.forward, DeviceSampler(device, None), choose_tokens, device, 2, None)
    assert ahead(engine, sequences((5, 9), [GREEDY] * 2), 4) == wanted


# ── what goes wrong ──────────────────────────────────────────────────────────────────────────────────────────────────


class Scripted:
    """A forward pass whose logits name the next token as the sum of a step's tokens, and that fails when told to."""

    def __init__(self) -> None:
        self.chosen = ChosenIds()
        self.fail: dict[int, Exception] = {}
        self.ran: list[int] = []

    def __call__(self, plan: StepPlan) -> Tensor | None:
        if plan.number in self.fail:
            raise self.fail[plan.number]
        followers = self.chosen.followers((i, item.request_id) for i, item in enumerate(plan.items) if item.follows)
        token_ids = torch.tensor([item.token_ids[-1] for item in plan.items])
        followers.fill(token_ids, [torch.tensor(column) for column in followers.columns])
        self.ran.append(plan.number)
        rows = [token_ids[i] for i, item in enumerate(plan.items) if item.sample]
        return torch.nn.functional.one_hot(torch.stack(rows) + 1, 100).float() if rows else None


@pytest.fixture
def scripted() -> Scripted:
    return Scripted()


@pytest.fixture
def steps(scripted: Scripted) -> DeviceSteps:
    device = torch.device("cpu")
    return DeviceSteps(scripted, DeviceSampler(device, None), choose_tokens, device, 2, scripted.chosen)


def plan(number: int, *items: tuple[str, int], sample: bool = True) -> StepPlan:
    return StepPlan(number, tuple(StepItem(name, 0, (token,), (0,), sample, sampling=GREEDY) for name, token in items))


def told(output: StepOutput) -> dict[str, int]:
    return {name: token.id for name, token in output.tokens}


def test_ids_are_followed_by_request(steps: DeviceSteps) -> None:
    steps.submit(plan(1, ("a", 10), ("b", 20)))
    steps.submit(plan(2, ("b", CHOSEN_BEFORE), ("c", 30)))
    assert told(steps.wait()) == {"a": 11, "b": 21}
    steps.submit(plan(3, ("c", CHOSEN_BEFORE), ("b", CHOSEN_BEFORE), ("a", CHOSEN_BEFORE)))
    assert told(steps.wait()) == {"b": 22, "c": 31}
    assert told(steps.wait()) == {"c": 32, "b": 23, "a": 12}, "a was sampled by the step before the last"


def test_what_was_never_chosen_is_not_followed(steps: DeviceSteps, scripted: Scripted) -> None:
    steps.submit(plan(1, ("a", 10), sample=False))
    steps.submit(plan(2, ("a", CHOSEN_BEFORE)))
    assert told(steps.wait()) == {}
    with pytest.raises(StepGivenUp, match="chose no token for a"):
        steps.wait()
    steps.submit(plan(3, ("a", 5)))
    assert told(steps.wait()) == {"a": 6} and scripted.ran == [1, 3]


@pytest.mark.parametrize("error", [StepGivenUp("enough"), RuntimeError("no memory")], ids=["given up", "failed"])
def test_a_step_that_does_not_end_takes_those_behind_it(
    steps: DeviceSteps, scripted: Scripted, error: Exception
) -> None:
    scripted.fail[2] = error
    steps.submit(plan(1, ("a", 1)))
    steps.submit(plan(2, ("a", CHOSEN_BEFORE)))
    assert told(steps.wait()) == {"a": 2}, "the one before it is sound"
    steps.submit(plan(3, ("a", CHOSEN_BEFORE)))
    with pytest.raises(type(error), match=str(error)):
        steps.wait()
    with pytest.raises(StepGivenUp, match="after one that did not end"):
        steps.wait()
    assert scripted.ran == [1]
    steps.submit(plan(4, ("a", 7)))
    assert told(steps.wait()) == {"a": 8}


def test_an_error_that_the_device_tells_late_voids_what_was_launched_behind(
    steps: DeviceSteps, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps.submit(plan(1, ("a", 1)))
    steps.submit(plan(2, ("a", CHOSEN_BEFORE)))

    def break_(self: object) -> None:
        raise RuntimeError("the device broke")

    monkeypatch.setattr(type(steps._outstanding[0]), "finish", break_)
    with pytest.raises(RuntimeError, match="the device broke"):
        steps.wait()
    monkeypatch.undo()
    with pytest.raises(StepGivenUp):
        steps.wait()
    with pytest.raises(RuntimeError, match="no step is outstanding"):
        steps.wait()


def test_more_than_the_depth_is_refused_and_closing_waits(steps: DeviceSteps) -> None:
    steps.submit(plan(1, ("a", 1)))
    steps.submit(StepPlan(2, ()))
    with pytest.raises(RuntimeError, match="2 steps are outstanding"):
        steps.submit(plan(3, ("a", 1)))
    assert told(steps.wait()) == {"a": 2}
    assert told(steps.wait()) == {}
    steps.submit(plan(4, *((str(i), i % 90) for i in range(600))))  # more ids than fit the memory they come back in
    assert told(steps.wait())["599"] == 599 % 90 + 1
    steps.close()
    steps.close()


# ── with a GPU ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", ["auto", "off"])
def test_launched_ahead_on_a_gpu_tokens_stay_the_same(directory: Path, graphs: str) -> None:
    for kinds in ([GREEDY] * 4, KINDS):
        wanted = in_turn(loaded(directory, 1, graphs), sequences((5, 9, 2, 30), kinds), 12)
        for _ in range(5):  # a race does not show every time
            assert ahead(loaded(directory, 2, graphs), sequences((5, 9, 2, 30), kinds), 12) == wanted


@pytest.mark.gpu
def test_submitting_waits_for_no_step(directory: Path) -> None:
    """While the device is busy the next steps are launched: when the last is, the first has not even begun."""
    engine = loaded(directory, 2)
    batch = sequences((5, 9), [GREEDY] * 2)
    in_turn(engine, batch, 2)  # compiles
    torch.cuda._sleep(2_000_000_000)  # about a second of the step stream's time
    done = torch.cuda.Event()
    done.record()
    items = [s.item() for s in batch]
    engine.submit(StepPlan(3, tuple(items)))
    follow = [replace(item, start=item.start + 1, token_ids=(CHOSEN_BEFORE,), output_index=3) for item in items]
    engine.submit(StepPlan(4, tuple(follow)))
    assert not done.query(), "submitting waited for the device"
    assert len(engine.wait().tokens) == len(engine.wait().tokens) == 2
    assert done.query()
