"""One benchmark from its options to its result: which kind of run, warm-up, measurement, and the document it leaves."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from distserve.loadgen.client import Client, Record
from distserve.loadgen.goodput import Point, search
from distserve.loadgen.http import HttpFailed, get_json
from distserve.loadgen.machine import CpuWatch, hardware, versions
from distserve.loadgen.run import Progress, closed_loop, open_loop, warm_up
from distserve.loadgen.stats import Slo, summarize
from distserve.loadgen.words import EnglishWords, VocabularyWords, WordSource
from distserve.loadgen.workload import Ask, BadWorkload, FilePrompts, RandomPrompts, poisson, read_requests, replayed

_LONGEST_RATE = 10_000.0


class BenchFailed(RuntimeError):
    """The benchmark could not be carried out; the text is for the user."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure. Exactly one kind of run: goodput search, closed loop, Poisson arrivals, or a replay."""

    client: Client
    requests: Path | None = None
    rate: float | None = None
    duration_s: float | None = None
    num_requests: int | None = None
    concurrency: int | None = None
    goodput: bool = False
    slo: Slo = field(default_factory=Slo)
    prompt_tokens: int = 256
    max_tokens: int = 64
    tokenizer: Path | None = None  # a tokenizer.json; None: English words
    seed: int = 1
    warmup: int = 3
    least_rate: float = 0.02
    most_rate: float = 200.0
    tolerance: float = 0.1
    least_requests: int = 30  # in a point of the goodput search
    most_requests: int = 400
    server_pids: tuple[int, ...] = ()

    @property
    def kind(self) -> str:
        """Raises ``BenchFailed`` when the options ask for nothing that can be run."""
        if self.goodput:
            return "goodput"
        if self.concurrency is not None:
            if self.num_requests is None:
                raise BenchFailed("--concurrency needs --num-requests: how many requests to send in all")
            return "closed"
        if self.rate is not None:
            if self.duration_s is None and self.num_requests is None:
                raise BenchFailed("--rate needs --duration (seconds) or --num-requests")
            return "poisson"
        if self.requests is not None:
            return "replay"
        raise BenchFailed(
            "nothing to run: give --rate R --duration S, --concurrency N --num-requests M, --goodput, "
            "or --requests FILE with arrival_s"
        )


class Bench:
    """A plan being carried out."""

    def __init__(self, plan: Plan, changed: Callable[[Progress], None], say: Callable[[str], None]) -> None:
        """``changed`` hears of progress inside a run, ``say`` of each point of a search."""
        self._plan, self._changed, self._say = plan, changed, say
        self.kind = plan.kind
        words: WordSource = VocabularyWords(plan.tokenizer) if plan.tokenizer else EnglishWords()
        self._file = (
            read_requests(plan.requests, words, plan.seed, plan.max_tokens) if plan.requests is not None else None
        )
        if self._file == []:
            raise BadWorkload(f"the requests file {plan.requests} holds no request")
        self._words = words

    async def run(self) -> dict[str, Any]:
        """Warm up, measure, and return the document (without the command that led here). Raises ``BenchFailed``."""
        plan = self._plan
        served = await self._served()
        if error := await warm_up(plan.client, self._prompts(0), plan.warmup):
            raise BenchFailed(f"a warm-up request failed: {error}")
        watch = CpuWatch(plan.server_pids)
        results = await {
            "goodput": self._goodput,
            "closed": self._closed,
            "poisson": self._poisson,
            "replay": self._replay,
        }[self.kind]()
        return {
            "kind": "measured",
            "run": self.kind,
            "when": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "versions": versions(),
            "hardware": hardware(),
            "server": {"url": _url(plan.client), "model": plan.client.model, "models": served},
            "workload": self._workload(),
            "cores": watch.stop(),
            "results": results,
        }

    async def _served(self) -> list[str]:
        """Names of the models the server says it has; an unreachable server ends the benchmark here."""
        client = self._plan.client
        try:
            told = await get_json(client.target, "/v1/models", client.headers, 30.0)
        except (OSError, TimeoutError) as error:
            raise BenchFailed(f"no server answers at {_url(client)}: {error}") from error
        except HttpFailed as error:
            if error.status == 401:
                raise BenchFailed(f"{_url(client)} wants an API key: {error}") from error
            return []  # measured all the same: not every server lists its models
        data = told.get("data") if isinstance(told, dict) else None
        return [str(m.get("id")) for m in data or ()]

    def _prompts(self, number: int) -> Iterator[Ask]:
        """An endless stream of asks; another for every number, the same for every run of the same seed."""
        plan = self._plan
        seed = plan.seed * 1_000_003 + number
        source = (
            FilePrompts(self._file, seed)
            if self._file
            else RandomPrompts(self._words, plan.prompt_tokens, plan.max_tokens, seed)
        )
        return iter(source)

    def _progress(self) -> Progress:
        return Progress(changed=self._changed)

    async def _poisson(self) -> dict[str, Any]:
        plan = self._plan
        assert plan.rate is not None
        count = plan.num_requests or max(1, round(plan.rate * (plan.duration_s or 0.0)))
        asks = poisson(self._prompts(1), plan.rate, count, plan.seed)
        records, wall_s = await open_loop(plan.client, asks, self._progress())
        return {"rate": plan.rate, **summarize(records, plan.slo, wall_s).as_json()}

    async def _replay(self) -> dict[str, Any]:
        asks = replayed(self._file or [], self._plan.duration_s)
        records, wall_s = await open_loop(self._plan.client, asks, self._progress())
        return summarize(records, self._plan.slo, wall_s).as_json()

    async def _closed(self) -> dict[str, Any]:
        plan = self._plan
        assert plan.concurrency is not None and plan.num_requests is not None
        run = closed_loop(plan.client, self._prompts(1), plan.concurrency, plan.num_requests, self._progress())
        records, wall_s = await run
        return {"concurrency": plan.concurrency, **summarize(records, plan.slo, wall_s).as_json()}

    async def _goodput(self) -> dict[str, Any]:
        plan = self._plan
        found = await search(
            self._point,
            start=plan.rate or 1.0,
            least=plan.least_rate,
            most=min(plan.most_rate, _LONGEST_RATE),
            tolerance=plan.tolerance,
        )
        return asdict(found)

    async def _point(self, rate: float, number: int) -> Point:
        """One rate: enough requests to tell, stopped early once too many have missed."""
        plan = self._plan
        wanted = round(rate * (plan.duration_s or 30.0))
        count = max(plan.least_requests, min(plan.most_requests, wanted))
        may_miss = (1 - plan.slo.attainment) * count

        def decided(ended: Sequence[Record]) -> bool:
            return sum(not plan.slo.meets(r) for r in ended) > may_miss + 1e-9

        asks = poisson(self._prompts(number + 1), rate, count, plan.seed + number)
        records, wall_s = await open_loop(plan.client, asks, self._progress(), decided)
        summary = summarize(records, plan.slo, wall_s)
        early = any(r.cut_off for r in records)
        point = Point(rate, summary.attained >= plan.slo.attainment - 1e-9, early, summary)
        self._say(_point_words(point))
        return point

    def _workload(self) -> dict[str, Any]:
        plan = self._plan
        slo = {k: v for k, v in asdict(plan.slo).items() if v != float("inf")}
        prompts: dict[str, Any] = (
            {"file": plan.requests.name, "requests": len(self._file or [])}
            if plan.requests is not None
            else {"prompt_tokens": plan.prompt_tokens, "max_tokens": plan.max_tokens}
        )
        words = "one-token words of the model's vocabulary" if plan.tokenizer else "common English words"
        return {
            **prompts,
            "words": words,
            "ignore_eos": plan.client.ignore_eos,
            "temperature": plan.client.temperature,
            "rate": plan.rate,
            "duration_s": plan.duration_s,
            "concurrency": plan.concurrency,
            "warmup": plan.warmup,
            "seed": plan.seed,
            "slo": slo,
        }


def _url(client: Client) -> str:
    target = client.target
    return f"{'https' if target.tls else 'http'}://{target.host}:{target.port}{target.path}"


def _point_words(point: Point) -> str:
    s = point.summary
    verdict = "holds" if point.passed else "fails"
    early = " (decided early)" if point.decided_early else ""
    return (
        f"{point.rate:8.2f} req/s {verdict}: {s.attained:6.1%} within target, TTFT p90 {s.ttft_s.p90:.3f} s, "
        f"TPOT p90 {s.tpot_s.p90:.4f} s, {s.requests} requests{early}"
    )
