"""``plan.yaml``: what the planner decided, for people, for ``distserve serve --plan`` and for the manifests.

Versioned and validated on reading; an unknown key names the nearest known one. Knows nothing of how a plan is found.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

import yaml

from distserve.core.documents import parse_yaml
from distserve.sched.batching import BatchPolicy
from distserve.sched.config import InstanceConfig
from distserve_planner.refusal import MOST, CannotPlan, mapping, nearest, only_known

VERSION = 1
ROLES = ("prefill", "decode", "mixed")


@dataclass(frozen=True, slots=True)
class Stage:
    """Where one pipeline stage sits: GPU numbers on one node, one a tensor-parallel rank."""

    node: str
    gpus: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PlannedInstance:
    """One instance. ``kv_tokens``: the KV that fits beside its weights."""

    id: str
    role: str
    gpu: str
    tp: int
    pp: int
    kv_tokens: int
    stages: tuple[Stage, ...]


@dataclass(frozen=True, slots=True)
class PlannedLink:
    """Expected KV traffic of one link and what it carries, bytes a second in one direction."""

    link: str
    bytes_s: float
    capacity_bytes_s: float


@dataclass(frozen=True, slots=True)
class Targets:
    """Latency limits in seconds and the share of requests that must meet both."""

    ttft_s: float
    tpot_s: float
    attainment: float


@dataclass(frozen=True, slots=True)
class TargetsOfClass:
    """The targets of one class of requests. ``rule``: lengths it takes (as ``--slo``); ``predicted``: attainment of its
    ``requests`` at the planned rate."""

    name: str
    ttft_s: float
    tpot_s: float
    attainment: float
    rule: str
    requests: int
    predicted: float


@dataclass(frozen=True, slots=True)
class Load:
    """What the plan is for: ``rate`` in requests a second, mean lengths in tokens."""

    name: str
    rate: float
    prompt_tokens: float
    output_tokens: float
    requests: int
    seed: int


@dataclass(frozen=True, slots=True)
class Prediction:
    """At the planned rate, on the placed links. Seconds. ``goodput`` in requests a second with its 95 % interval, of
    all instances; ``cost_per_million`` dollars per 10^6 output tokens at the planned rate, 0 when no price is told.
    """

    attainment: float
    ttft_p50_s: float
    ttft_p90_s: float
    tpot_p50_s: float
    tpot_p90_s: float
    goodput: float
    goodput_low: float
    goodput_high: float
    gpus: int
    per_gpu: float
    cost_per_million: float = 0.0
    uncertainty: float = 0.0


@dataclass(frozen=True, slots=True)
class Alternative:
    """Another way, for comparison. ``kind``: disaggregated or colocated; goodput of one unit of ``gpus`` GPUs."""

    what: str
    kind: str
    gpus: int
    goodput: float
    goodput_low: float
    goodput_high: float
    per_gpu: float
    verdict: str = ""


@dataclass(frozen=True, slots=True)
class Batching:
    """Limits of an instance's steps, in the words of ``distserve serve``."""

    batching: str = "chunked"
    max_batch_tokens: int = 2048
    max_mixed_tokens: int = 512
    prefill_chunk: int = 512
    max_sequences: int = 64
    headroom_share: float = 0.02
    prefix_cache: bool = False

    @staticmethod
    def of(config: InstanceConfig) -> Batching:
        """The limits of an instance's settings."""
        values = {f.name: getattr(config, f.name) for f in dataclasses.fields(Batching)}
        return Batching(**(values | {"batching": str(config.batching)}))

    def onto(self, config: InstanceConfig) -> InstanceConfig:
        """``config`` with these limits. Raises CannotPlan for an unknown batching."""
        known = [str(each) for each in BatchPolicy]
        if self.batching not in known:
            hint = nearest(self.batching, known)
            raise CannotPlan(f"plan: unknown batching {self.batching!r}{hint} (known: {', '.join(known)})")
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return dataclasses.replace(config, **(values | {"batching": BatchPolicy(self.batching)}))


@dataclass(frozen=True, slots=True)
class Plan:
    """The whole file. ``why``: one sentence; ``notes``: what the reader must know before trusting it.

    ``profile``: the file of the machine it was planned with, if it was; ``threads`` of an instance and ``dtype`` are
    then that profile's. ``overflow_prefill_tokens``: of the dispatch, as ``distserve serve`` has it.
    """

    version: int
    model: str
    cluster: str
    pod: str
    algorithm: str
    objective: str
    latency: str
    policy: str
    slo: Targets
    load: Load
    instances: tuple[PlannedInstance, ...]
    prediction: Prediction
    why: str
    links: tuple[PlannedLink, ...] = ()
    alternatives: tuple[Alternative, ...] = ()
    notes: tuple[str, ...] = ()
    trace: str = ""
    profile: str = ""
    dtype: str = ""
    threads: int = 0
    batching: Batching = Batching()
    overflow_prefill_tokens: int = 0
    slo_classes: tuple[TargetsOfClass, ...] = ()

    @property
    def roles(self) -> tuple[str, ...]:
        """Of its instances, prefill first, then decode, then mixed: the order ``distserve serve`` starts them in."""
        return tuple(sorted((each.role for each in self.instances), key=ROLES.index))

    def count(self, role: str) -> int:
        return sum(1 for instance in self.instances if instance.role == role)

    def check(self) -> None:
        """Raises CannotPlan with the first thing that contradicts itself."""
        if self.version != VERSION:
            raise CannotPlan(f"plan: version {self.version} is not known; this planner reads version {VERSION}")
        if not self.instances:
            raise CannotPlan("plan: it has no instances")
        if self.overflow_prefill_tokens < 0:
            raise CannotPlan("plan: overflow_prefill_tokens must not be negative; 0 turns it off")
        taken: dict[tuple[str, int], str] = {}
        for each in self.instances:
            _check_instance(each)
            for stage in each.stages:
                for gpu in stage.gpus:
                    if (other := taken.setdefault((stage.node, gpu), each.id)) != each.id:
                        raise CannotPlan(f"plan: GPU {gpu} of {stage.node} is given to both {other} and {each.id}")
        ids = [each.id for each in self.instances]
        if len(set(ids)) < len(ids):
            raise CannotPlan("plan: two instances have the same id")
        roles = {each.role for each in self.instances}
        if "mixed" not in roles and roles != {"prefill", "decode"}:
            raise CannotPlan("plan: it needs prefill and decode instances, or mixed ones")


def _check_instance(each: PlannedInstance) -> None:
    if each.role not in ROLES:
        known = ", ".join(ROLES)
        raise CannotPlan(f"plan: {each.id} has role {each.role!r}{nearest(each.role, ROLES)} (known: {known})")
    if each.tp < 1 or each.pp < 1 or each.kv_tokens < 0:
        raise CannotPlan(f"plan: {each.id} needs tp and pp of at least 1, and no negative kv_tokens")
    if len(each.stages) != each.pp:
        raise CannotPlan(f"plan: {each.id} has pp={each.pp} but {len(each.stages)} stages")
    if any(len(set(stage.gpus)) != each.tp for stage in each.stages):
        raise CannotPlan(f"plan: {each.id} has tp={each.tp}, so each of its stages needs {each.tp} different GPUs")


# ── the file ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def write_plan(plan: Plan, path: str | Path) -> None:
    """As YAML, keys in the order of the classes. Raises CannotPlan when it cannot be written."""
    plan.check()
    head = "# Made by `distserve plan`. Read by `distserve serve --plan` and `distserve verify`.\n"
    text = yaml.safe_dump(_plain(plan), sort_keys=False, allow_unicode=True, width=110)
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(head + text, encoding="utf-8")
    except OSError as error:
        raise CannotPlan(f"cannot write {path}: {error.strerror or error}") from error


def read_plan(path: str | Path) -> Plan:
    """Raises CannotPlan with a sentence for what is missing, unknown, ill-typed or contradictory."""
    try:
        document = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise CannotPlan(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:  # no UTF-8, or no YAML
        raise CannotPlan(f"{path} {error}") from error
    return plan_of(mapping(document, str(path)))


def plan_of(document: Mapping[str, Any]) -> Plan:
    """A plan from its plain form. Raises CannotPlan."""
    plan: Plan = _build(Plan, document, "plan")
    plan.check()
    return plan


def plain(plan: Plan) -> dict[str, Any]:
    """The plan as dicts, lists and numbers."""
    found: dict[str, Any] = _plain(plan)
    return found


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return value


def _build(kind: Any, document: Any, where: str) -> Any:
    """The dataclass ``kind`` from a mapping, every field checked against its annotation."""
    document = mapping(document, where)
    hints = typing.get_type_hints(kind)
    only_known(document, list(hints), where)
    values = {}
    for field in dataclasses.fields(kind):
        if field.name in document:
            values[field.name] = _value(hints[field.name], document[field.name], f"{where}.{field.name}")
        elif field.default is MISSING and field.default_factory is MISSING:
            raise CannotPlan(f"{where}: {field.name!r} is missing")
    return kind(**values)


def _value(kind: Any, value: Any, where: str) -> Any:
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise CannotPlan(f"{where}: a list is needed here")
        inner = typing.get_args(kind)[0]
        return tuple(_value(inner, each, f"{where}[{i}]") for i, each in enumerate(value))
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, where)
    fits = isinstance(value, int | float) if kind is float else isinstance(value, kind)
    absurd = isinstance(value, int | float) and not abs(value) < MOST
    if not fits or isinstance(value, bool) != (kind is bool) or absurd:
        raise CannotPlan(f"{where}: {value!r:.200} is not of type {kind.__name__}")
    return float(value) if kind is float else value


# ── the table ────────────────────────────────────────────────────────────────────────────────────────────────────────


def as_text(plan: Plan) -> str:
    """What a person reads: the plan, its links, the runners-up and the colocated baseline, and why."""
    p, slo = plan.prediction, plan.slo
    lines = [
        f"{plan.model} on {plan.cluster} ({plan.pod} pods): {plan.load.rate:g} req/s of {plan.load.name}, "
        f"TTFT ≤ {slo.ttft_s:g} s and TPOT ≤ {slo.tpot_s:g} s for {slo.attainment:.0%}",
        "",
        *_table(("instance", "GPU", "tp", "pp", "where", "KV tokens"), [_instance_row(i) for i in plan.instances]),
        "",
        f"predicted at {plan.load.rate:g} req/s: attainment {p.attainment:.1%}, TTFT p50 {p.ttft_p50_s:.3f} s, "
        f"p90 {p.ttft_p90_s:.3f} s, TPOT p50 {p.tpot_p50_s * 1e3:.1f} ms, p90 {p.tpot_p90_s * 1e3:.1f} ms",
        f"goodput {p.goodput:.2f} req/s ({p.goodput_low:.2f} to {p.goodput_high:.2f}) on {p.gpus} GPUs = "
        f"{p.per_gpu:.2f} per GPU"
        + (f"; ${p.cost_per_million:.2f} per million output tokens" if p.cost_per_million else ""),
        f"step times from {plan.latency}, ± {p.uncertainty:.0%}",
        "",
    ]
    for c in plan.slo_classes:
        limits = f"TTFT ≤ {c.ttft_s:g} s and TPOT ≤ {c.tpot_s:g} s for {c.attainment:.0%}"
        rule = f" ({c.rule})" if c.rule else ""
        lines.append(f"class {c.name}{rule}: {limits}; predicted {c.predicted:.1%} of {c.requests}")
    if plan.slo_classes:
        lines.append("")
    if plan.links:
        heads = ("link", "expected GB/s", "capacity GB/s", "used")
        lines += [*_table(heads, [_link_row(link) for link in plan.links]), ""]
    if plan.alternatives:
        wide = ("compared (one unit)", "GPUs", "req/s", "95 % interval", "per GPU", "")
        lines += [*_table(wide, [_alternative_row(a) for a in plan.alternatives]), ""]
    lines.append(plan.why)
    lines += [f"note: {note}" for note in plan.notes]
    return "\n".join(lines)


def _instance_row(each: PlannedInstance) -> list[str]:
    places = "; ".join(f"{s.node}:{','.join(map(str, s.gpus))}" for s in each.stages)
    return [each.id, each.gpu, str(each.tp), str(each.pp), places, f"{each.kv_tokens:,}"]


def _link_row(link: PlannedLink) -> list[str]:
    share = link.bytes_s / link.capacity_bytes_s if link.capacity_bytes_s else 0.0
    return [link.link, f"{link.bytes_s / 1e9:.2f}", f"{link.capacity_bytes_s / 1e9:.1f}", f"{share:.1%}"]


def _alternative_row(a: Alternative) -> list[str]:
    interval = f"{a.goodput_low:.2f} to {a.goodput_high:.2f}"
    return [a.what, str(a.gpus), f"{a.goodput:.2f}", interval, f"{a.per_gpu:.3f}", a.verdict]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in (heads, *rows))
    return ["  ".join(row).rstrip() for row in padded]
