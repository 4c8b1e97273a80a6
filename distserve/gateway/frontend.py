"""What every front end asks of the gateway, in one place.

Owns the map from model names to their codecs, and joins it with what the backend knows of members. Knows nothing of
HTTP or gRPC.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from distserve.core.types import Code, ModelSpec
from distserve.gateway.admission import Admission
from distserve.gateway.answer import Answer, open_answer
from distserve.gateway.ask import Ask, Chat, Prompt
from distserve.gateway.auth import ApiKeys, Caller
from distserve.gateway.backend import Backend, RequestFailed
from distserve.gateway.limits import Limits
from distserve.gateway.plan import Plan, Served, check_token_ids, make_plan, tokenize
from distserve.gateway.text import TextCodec
from distserve.gateway.traffic import Traffic


@dataclass(frozen=True, slots=True)
class ModelView:
    """A model as a client sees it. ``spec`` is None while no member serves it."""

    name: str
    codec: TextCodec
    spec: ModelSpec | None
    max_tokens: int


def _unobserved(_front_end: str, _code: Code) -> None:
    return None


class FrontEnd:
    """The gateway as its front ends see it.

    ``codecs``: one for each served model, by the name clients use (``ModelSpec.name``). ``refused`` is told of every
    error that is answered: ("http" | "grpc" | "oip", code). ``keys``: who may ask; everybody when left out.
    """

    def __init__(
        self,
        backend: Backend,
        codecs: Mapping[str, TextCodec],
        limits: Limits | None = None,
        refused: Callable[[str, Code], None] = _unobserved,
        keys: ApiKeys | None = None,
        traffic: Traffic | None = None,
    ) -> None:
        self.backend = backend
        self.traffic = traffic or Traffic()
        self.limits = limits or Limits()
        self.refused = refused
        self.keys = keys or ApiKeys()
        self.admission = Admission(self.limits.max_client_streams)
        self._codecs = dict(codecs)
        self._last_known: dict[str, ModelView] = {}

    def models(self) -> Sequence[ModelView]:
        """Every model, in a fixed order, whether a member serves it now or not."""
        return [self.model(name) for name in self._codecs]

    def model(self, name: str) -> ModelView:
        """One model; an empty name means the only one. Raises ``RequestFailed`` NOT_FOUND."""
        if not name and len(self._codecs) == 1:
            name = next(iter(self._codecs))
        codec = self._codecs.get(name)
        if codec is None:
            known = ", ".join(f"'{known}'" for known in self._codecs)
            asked = f"The model '{name}' does not exist" if name else "No model was named"
            raise RequestFailed(Code.NOT_FOUND, f"{asked}; this cluster serves {known}.", param="model")
        spec = next((m.spec for m in self.backend.members() if m.spec.name == name), None)
        room = self.backend.max_request_tokens(name) if spec is not None else 0
        if spec is not None and room > 0:
            self._last_known[name] = ModelView(name, codec, spec, room)
        # While every member that could decode restarts, requests are planned by what was there and wait their patience.
        return self._last_known.get(name) or ModelView(name, codec, spec, room)

    async def plan(self, ask: Ask) -> Plan:
        """Check and tokenize. Raises ``RequestFailed``."""
        return await make_plan(ask, self._served(ask.model), self.limits)

    async def open(self, plan: Plan, caller: Caller | None = None) -> Answer:
        """Start answering; who calls this owns the answer and closes it. Raises ``RequestFailed``."""
        leave = self.admission.enter(caller or Caller(), len(plan.requests))
        try:
            return await open_answer(plan, self.backend, closed=leave)
        except BaseException:
            leave()
            raise

    async def tokenize(self, model: str, prompt: str | Chat, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of a text (which may be empty here) or a chat."""
        if prompt == "":
            return self.model(model).codec.encode("", add_special_tokens)
        prompts: tuple[Prompt, ...] = (prompt,)
        ask = Ask(prompts, model=model, add_special_tokens=add_special_tokens)
        return await tokenize(self._served(model), prompt, ask, self.limits)

    def detokenize(self, model: str, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of token ids."""
        served = self._served(model)
        check_token_ids(token_ids, served.spec.vocab_size, "tokens")
        return served.codec.decode(token_ids, skip_special_tokens)

    def _served(self, name: str) -> Served:
        view = self.model(name)
        if view.spec is None or view.max_tokens < 1:
            raise RequestFailed(
                Code.UNAVAILABLE, f"No instance serves the model '{view.name}' right now; try again shortly.", 1.0
            )
        return Served(view.name, view.codec, view.spec, view.max_tokens)
