"""Arrange by factory: members, requests and machines small enough to read."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from distserve.core.effects import Effect, RunStep, Send
from distserve.core.events import GatewayAttached, ReserveAsked, StepDone, Submit
from distserve.core.types import (
    Endpoint,
    GatewayRef,
    InstanceRef,
    Member,
    ModelSpec,
    Request,
    Role,
    Sampling,
    Stopping,
    Token,
    first_epoch,
)
from distserve.sched.config import InstanceConfig
from distserve.sched.instance import InstanceState

GATEWAY = GatewayRef("g", 1)
EPOCH = first_epoch(1)
T = TypeVar("T")
Make = Callable[..., InstanceState]
"""The fixture ``make``: a member and settings into an instance."""


def spec(blocks: int = 32, block_size: int = 8, fingerprint: str = "fp", max_len: int = 4096) -> ModelSpec:
    return ModelSpec("m", fingerprint, 1000, max_len, (2,), 1, 1, 8, "float32", block_size, blocks)


def member(id: str, role: Role, *, incarnation: int = 1, **model: int | str) -> Member:
    return Member(Endpoint(InstanceRef(id, incarnation), f"{id}:1", f"{id}:2"), role, spec(**model))  # type: ignore[arg-type]


P, D, M = member("p", Role.PREFILL), member("d", Role.DECODE), member("m", Role.MIXED)


def request(id: str = "r", prompt: int | tuple[int, ...] = 20, max_tokens: int = 5, **stopping: object) -> Request:
    tokens = tuple(range(100, 100 + prompt)) if isinstance(prompt, int) else prompt
    return Request(id, "m", tokens, Sampling(temperature=0.0), Stopping(max_tokens, **stopping), 100.0)  # type: ignore[arg-type]


def instance(who: Member, config: InstanceConfig | None = None) -> InstanceState:
    state = InstanceState(who, config or InstanceConfig(), seed=7)
    state.handle(GatewayAttached(GATEWAY), 0.0)
    return state


def submit(req: Request, decode: Member, *, epoch: int = EPOCH, delivered: tuple[int, ...] = ()) -> Submit:
    return Submit(GATEWAY, req, epoch, decode.endpoint, delivered, 100.0)


def reserve(
    req: Request, source: Member, destination: Member, *, move: str = "mv", epoch: int = EPOCH, **changes: object
) -> ReserveAsked:
    fields: dict[str, object] = {
        "move_id": move,
        "source": source.endpoint,
        "destination": destination.ref,
        "gateway": GATEWAY,
        "request": req,
        "epoch": epoch,
        "output": (),
        "fingerprint": "fp",
        "total_tokens": len(req.prompt_token_ids),
        "timeout_s": 30.0,
        "request_timeout_s": 100.0,
    }
    return ReserveAsked(**{**fields, **changes})  # type: ignore[arg-type]


def kinds(effects: list[Effect]) -> list[str]:
    """Effects by name; a Send by the name of what it carries."""
    return [type(e.event).__name__ if isinstance(e, Send) else type(e).__name__ for e in effects]


def find(effects: list[Effect], kind: type[T]) -> T:
    """The one effect, or event sent, of a kind."""
    found = [e for e in effects if isinstance(e, kind)]
    found += [e.event for e in effects if isinstance(e, Send) and isinstance(e.event, kind)]
    assert len(found) == 1, f"{len(found)} {kind.__name__} among {kinds(effects)}"
    return found[0]


def step_done(effects: list[Effect], token: int = 50) -> StepDone:
    """The engine's answer to the step among ``effects``: token ids ``token + output index``."""
    plan = find(effects, RunStep).plan
    made = tuple((i.request_id, Token(token + i.output_index)) for i in plan.items if i.sample)
    return StepDone(plan.number, made, 0.01)


def run_to_idle(state: InstanceState, effects: list[Effect], now: float = 1.0) -> list[Effect]:
    """Answer every step until no step is asked for; returns all effects."""
    out = list(effects)
    while any(isinstance(e, RunStep) for e in effects):
        effects = state.handle(step_done(effects), now)
        out += effects
        state.check()
    return out


def assert_all_free(state: InstanceState) -> None:
    ledger = state.residents.ledger
    assert state.idle
    assert ledger.owners() == ()
    assert ledger.free + ledger.evictable == ledger.total
