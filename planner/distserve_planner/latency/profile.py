"""A profile: what one machine was seen to do with one model, and what was fitted to it. Read, checked, written as JSON.

Made by ``distserve profile``. Knows no engine: samples come in, a document goes out. All times are seconds of wall
clock, all lengths tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from distserve_planner.refusal import CannotPlan, mapping, number, only_known, whole

VERSION = 1
KINDS = ("prefill", "decode")
LINKS = ("shm", "gloo", "nccl")


@dataclass(frozen=True, slots=True)
class Sample:
    """One step shape and how long it took: ``seconds`` is the median of ``count`` runs, ``least`` the best."""

    chunks: tuple[tuple[int, int], ...]  # (new tokens, tokens of that sequence computed before)
    decodes: int
    decode_context: int  # new tokens included
    seconds: float
    least: float
    count: int

    @property
    def rows(self) -> int:
        """Tokens the step computes: rows of every matrix product."""
        return sum(n for n, _ in self.chunks) + self.decodes

    @property
    def kind(self) -> str:
        if not self.chunks:
            return "decode"
        return "mixed" if self.decodes else "prefill"


@dataclass(frozen=True, slots=True)
class Curve:
    """``seconds = table(rows) + sum(weight × feature)``; the table is linear between its knots and ends with them.

    A line is a table of two knots. ``error``: root mean square of the relative error, each sample told by a fit without
    it and its fold; ``worst``: the largest residual of the final fit; ``form``: which of the forms tried it is.
    """

    form: str
    knots: tuple[float, ...]
    values: tuple[float, ...]
    weights: Mapping[str, float]
    error: float
    median_residual: float
    worst_residual: float
    tried: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Range:
    """What was measured; beyond it a model refuses."""

    step_tokens: int  # of one step with prompts
    sequence: int  # longest prompt computed, tokens before it included
    batch: int  # decodes of one step
    context: int  # sum over the decodes of one step


@dataclass(frozen=True, slots=True)
class LinkCost:
    """One way for KV: ``latency_s`` a stage and ``bytes_s`` beyond; ``points``: (bytes, seconds) as measured."""

    latency_s: float
    bytes_s: float
    error: float
    points: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Extra:
    """How much longer a step takes while all other instances are busy: ``constant_s + relative × its time alone``.

    ``points``: (alone, beside) in seconds, as measured in turns.
    """

    constant_s: float = 0.0
    relative: float = 0.0
    points: tuple[tuple[float, float], ...] = ()


Crowd = Mapping[str, Mapping[str, Extra]]
"""Kind of a step (``prefill`` with prompts, ``decode`` without) → what the others are at meanwhile → extra time."""


@dataclass(frozen=True, slots=True)
class LiveCost:
    """What a running cluster adds to its steps, measured on one (``layout``) by a client on the same machine.

    ``around_s`` + ``around_token_s`` per prompt token: from due to the instance and from there to the client.
    ``turn_s`` + ``row_s`` per sampled token: between two steps of an instance. ``handoff_s``: a hand-off beyond its
    bytes and its first step. ``crowd_*``: relative slow-down of a step while all other instances are busy, beyond that
    of the bare engine: the gateway and the client want the same cores.
    """

    layout: str = ""
    around_s: float = 0.0
    around_token_s: float = 0.0
    turn_s: float = 0.0
    row_s: float = 0.0
    handoff_s: float = 0.0
    crowd_prefill: float = 0.0
    crowd_decode: float = 0.0
    prefill_scale: float = 1.0  # by recalibration: measured over foretold
    decode_scale: float = 1.0
    seen: Mapping[str, Any] = field(default_factory=dict)  # the raw figures behind these


@dataclass(frozen=True, slots=True)
class Profile:
    """The whole file. ``instances`` of ``threads`` threads each shared the machine's ``cores`` cores."""

    version: int
    model: str
    dtype: str
    threads: int
    instances: int
    cores: int
    block_size: int
    kv_tokens: int
    kv_bytes_per_token: float
    max_len: int
    prefill: Curve
    decode: Curve
    range: Range
    links: Mapping[str, LinkCost]
    crowd: Crowd
    live: LiveCost
    samples: tuple[Sample, ...]
    about: Mapping[str, Any] = field(default_factory=dict)  # when, command, versions, hardware, load, duration

    @property
    def link(self) -> LinkCost:
        """What instances of one machine use: shared memory where it was measured."""
        for name in LINKS:
            if name in self.links:
                return self.links[name]
        raise CannotPlan("the profile holds no link over which KV could move; measure it anew")

    def check(self) -> None:
        """Raises CannotPlan with what contradicts itself."""
        if self.version != VERSION:
            raise CannotPlan(f"profile: version {self.version} is not known; this planner reads version {VERSION}")
        for kind in KINDS:
            if set(self.crowd.get(kind, {})) != set(KINDS):
                raise CannotPlan(f"profile.crowd: {kind} beside {' and '.join(KINDS)} is needed; measure it anew")
        for name, curve in (("prefill", self.prefill), ("decode", self.decode)):
            knots = curve.knots
            if len(knots) != len(curve.values) or len(knots) < 2 or list(knots) != sorted(knots):
                raise CannotPlan(f"profile.{name}: knots must ascend and have one value each; measure it anew")
            if min(curve.values) < 0 or max(curve.values) <= 0:
                raise CannotPlan(f"profile.{name}: a step cannot take {min(curve.values):g} s; measure it anew")


def write_profile(profile: Profile, path: Path | str) -> None:
    """Raises CannotPlan when it cannot be written."""
    profile.check()
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(_rounded(asdict(profile)), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise CannotPlan(f"cannot write {path}: {error.strerror or error}") from error


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list | tuple) else value


def read_profile(path: Path | str) -> Profile:
    """Raises CannotPlan with a sentence for what is missing, unknown or ill-typed."""
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise CannotPlan(f"cannot read the profile {path}: {error.strerror or error}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CannotPlan(f"the profile {path} is not valid JSON: {error}") from error
    return profile_of(mapping(document, str(path)))


def profile_of(document: Mapping[str, Any]) -> Profile:
    """A profile from its plain form. Raises CannotPlan."""
    known = list(Profile.__dataclass_fields__)
    only_known(document, known, "profile")
    for name in known:
        if name not in document and name != "about":
            raise CannotPlan(f"profile: {name!r} is missing; make it with `distserve profile`")
    try:
        found = replace(
            Profile(**{**document, "about": document.get("about", {})}),
            prefill=_curve(document["prefill"], "prefill"),
            decode=_curve(document["decode"], "decode"),
            range=Range(**{k: whole(v, f"profile.range.{k}") for k, v in document["range"].items()}),
            links={k: _link(v, f"profile.links.{k}") for k, v in document["links"].items()},
            crowd={k: {o: _extra(e) for o, e in v.items()} for k, v in document["crowd"].items()},
            live=LiveCost(**document["live"]),
            samples=tuple(_sample(each) for each in document["samples"]),
        )
    except (TypeError, KeyError, AttributeError) as error:
        raise CannotPlan(f"profile: it is not of the form that `distserve profile` writes ({error})") from error
    for name in ("threads", "instances", "cores", "block_size", "kv_tokens", "max_len"):
        whole(getattr(found, name), f"profile.{name}")
    number(found.kv_bytes_per_token, "profile.kv_bytes_per_token")
    found.check()
    return found


def _curve(document: Mapping[str, Any], where: str) -> Curve:
    made = Curve(**document)
    return replace(
        made,
        knots=_numbers(made.knots, f"profile.{where}.knots"),
        values=_numbers(made.values, f"profile.{where}.values"),
    )


def _numbers(values: Sequence[Any], where: str) -> tuple[float, ...]:
    return tuple(number(v, where, -1e-12) for v in values)


def _link(document: Mapping[str, Any], where: str) -> LinkCost:
    made = LinkCost(**document)
    number(made.bytes_s, f"{where}.bytes_s")
    number(made.latency_s, f"{where}.latency_s", -1e-12)
    return replace(made, points=tuple((float(a), float(b)) for a, b in made.points))


def _extra(document: Mapping[str, Any]) -> Extra:
    made = Extra(**document)
    return replace(made, points=tuple((float(a), float(b)) for a, b in made.points))


def _sample(document: Mapping[str, Any]) -> Sample:
    made = Sample(**document)
    return replace(made, chunks=tuple((int(n), int(b)) for n, b in made.chunks))
