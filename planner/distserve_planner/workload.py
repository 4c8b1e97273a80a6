"""Workloads: who arrives when, with how long a prompt and an answer. Read from traces, resampled or fitted; seeded.

Knows no latency and no cluster. Trace rows have the keys ``input_tokens``, ``output_tokens`` and, where known,
``arrival_s``, ``prefix_blocks``, ``session_id``, ``turn``, ``client``; a plain list of ``[prompt, output, arrival_s]``
is read too. Lengths keep their input–output correlation: pairs are resampled as pairs, and a fit is of both at once.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any, Protocol

import numpy as np

from distserve_planner.refusal import CannotPlan, nearest, whole

Seconds = np.ndarray
MOST_TOKENS, MOST_SECONDS, MOST_CV = 1 << 31, 1e12, 100.0
BLOCK_SIZES = (16, 32, 64, 128, 256, 512, 1024, 2048)


@dataclass(frozen=True, slots=True)
class Job:
    """One request to come. ``prefix`` names the prompt's blocks of ``Workload.prefix_tokens`` tokens, chained."""

    prompt: int
    output: int
    arrival_s: float
    prefix: tuple[int, ...] = ()
    session: str = ""
    client: str = ""
    slo_class: str = ""


@dataclass(frozen=True, slots=True)
class Workload:
    """Jobs in the order given (not necessarily of arrival), and how many tokens one prefix block stands for."""

    jobs: tuple[Job, ...]
    prefix_tokens: int = 0
    name: str = ""

    @property
    def span_s(self) -> float:
        """From the first arrival to the last."""
        times = [j.arrival_s for j in self.jobs]
        return max(times) - min(times) if times else 0.0

    @property
    def rate(self) -> float:
        """Mean arrivals a second: n - 1 gaps over the span; infinite when all come at once."""
        return (len(self.jobs) - 1) / self.span_s if self.span_s else math.inf

    def at_rate(self, rate: float) -> Workload:
        """The same arrivals with time stretched to this mean rate: burstiness stays (thinning would smooth it)."""
        check_rate(rate)
        if not self.span_s:
            raise CannotPlan(f"workload {self.name or 'given'} spans no time, so it has no rate to scale")
        start, factor = min(j.arrival_s for j in self.jobs), self.rate / rate
        return replace(self, jobs=tuple(replace(j, arrival_s=(j.arrival_s - start) * factor) for j in self.jobs))

    def lengths(self) -> np.ndarray:
        """[n, 2] ints: prompt and output tokens."""
        return np.array([(j.prompt, j.output) for j in self.jobs], dtype=np.int64).reshape(-1, 2)


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def read(path: Path | str) -> Workload:
    """A trace (``.jsonl``, ``.jsonl.gz``) or a JSON list of ``[prompt, output, arrival_s]``. Raises CannotPlan."""
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CannotPlan(f"{path} cannot be read: {error.strerror}; give a trace or a list of requests") from error
    try:
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode()
        rows = _rows(text)
    except RecursionError as error:
        raise CannotPlan(f"{path} has too many lists or objects within each other") from error
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise CannotPlan(f"{path} is not JSON: {error}") from error
    if not rows:
        raise CannotPlan(f"{path} holds no requests; a plan needs at least one")
    jobs = tuple(_job(row, f"{path.name}, request {i + 1}") for i, row in enumerate(rows))
    return Workload(jobs, _prefix_tokens(jobs, path.name), path.name.split(".")[0])


def _rows(text: str) -> list[Any]:
    if not text.lstrip().startswith("["):
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    try:
        return list(json.loads(text))
    except json.JSONDecodeError:  # one list a line
        return [json.loads(line) for line in text.splitlines() if line.strip()]


def _job(row: Any, where: str) -> Job:
    if isinstance(row, list | tuple) and len(row) == 3:
        row = {"input_tokens": row[0], "output_tokens": row[1], "arrival_s": row[2]}
    if not isinstance(row, dict):
        raise CannotPlan(f"{where}: [prompt tokens, output tokens, arrival seconds] or a trace row is needed")
    prompt, output = (
        whole(row.get(key), f"{where}: {key}", most=MOST_TOKENS) for key in ("input_tokens", "output_tokens")
    )
    arrival = row.get("arrival_s", 0.0)
    if isinstance(arrival, bool) or not isinstance(arrival, int | float) or not 0 <= arrival < MOST_SECONDS:
        raise CannotPlan(f"{where}: arrival_s must be seconds from 0 on, not {arrival!r:.200}")
    prefix = row.get("prefix_blocks", ())
    if not isinstance(prefix, list | tuple) or not all(isinstance(block, int) for block in prefix):
        raise CannotPlan(f"{where}: prefix_blocks must be a list of whole numbers")
    return Job(
        prompt=prompt,
        output=output,
        arrival_s=float(arrival),
        prefix=tuple(prefix),
        session=str(row.get("session_id", "")),
        client=str(row.get("client", "")),
        slo_class=str(row.get("slo_class", "")),
    )


def _prefix_tokens(jobs: Sequence[Job], where: str) -> int:
    """Tokens a prefix block stands for: the one size at which every prompt has as many blocks as it lists."""
    chained = [j for j in jobs if j.prefix]
    if not chained:
        return 0
    for size in BLOCK_SIZES:
        if all(-(-j.prompt // size) == len(j.prefix) for j in chained):
            return size
    raise CannotPlan(f"{where}: no block size fits the numbers of prefix_blocks; leave them out or repair them")


# ── lengths ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Lengths(Protocol):
    """Draws ``n`` pairs of prompt and output tokens: ints, shape [n, 2], each at least 1."""

    def draw(self, n: int, rng: np.random.Generator) -> np.ndarray: ...


@dataclass(frozen=True, slots=True)
class Constant:
    """Every request alike."""

    prompt: int
    output: int

    def draw(self, n: int, rng: np.random.Generator) -> np.ndarray:
        return np.tile(np.array([[self.prompt, self.output]], dtype=np.int64), (n, 1))


@dataclass(frozen=True, slots=True)
class Resampled:
    """Pairs drawn from observed pairs with replacement: marginals and correlation are the sample's."""

    pairs: np.ndarray

    def draw(self, n: int, rng: np.random.Generator) -> np.ndarray:
        drawn: np.ndarray = self.pairs[rng.integers(0, len(self.pairs), n)]
        return drawn


PROBABILITIES = (0.0005, 0.01, 0.05, *(round(0.1 * i, 1) for i in range(1, 10)), 0.95, 0.99, 0.9995)
SCORES = tuple(NormalDist().inv_cdf(p) for p in PROBABILITIES)


@dataclass(frozen=True, slots=True)
class Fitted:
    """A Gaussian copula: each length by its quantiles at ``PROBABILITIES``, both tied by one correlation of their
    ranks."""

    prompt: tuple[float, ...]
    output: tuple[float, ...]
    correlation: float

    @classmethod
    def fit(cls, pairs: np.ndarray) -> Fitted:
        """Raises CannotPlan for fewer than two pairs."""
        if len(pairs) < 2:
            raise CannotPlan(f"{len(pairs)} requests are too few to fit a length distribution; give at least 2")
        columns = [np.quantile(pairs[:, i], PROBABILITIES).tolist() for i in (0, 1)]
        ranks = pairs.argsort(axis=0, kind="stable").argsort(axis=0)
        grid = np.array([NormalDist().inv_cdf((i + 0.5) / len(pairs)) for i in range(len(pairs))])
        correlation = float(np.corrcoef(grid[ranks].T)[0, 1])
        return cls(tuple(columns[0]), tuple(columns[1]), correlation)

    def draw(self, n: int, rng: np.random.Generator) -> np.ndarray:
        first, second = rng.standard_normal((2, n))
        second = self.correlation * first + math.sqrt(1 - self.correlation**2) * second
        logs = [np.interp(z, SCORES, np.log(q)) for z, q in ((first, self.prompt), (second, self.output))]
        return np.maximum(1, np.rint(np.exp(np.stack(logs, axis=1)))).astype(np.int64)


SHAREGPT = Fitted(
    prompt=(2, 10, 27, 89, 252, 386, 531.8, 690, 859, 1046, 1291, 1520, 1720, 1904, 2009),
    output=(1, 2, 5, 9, 14, 22, 36, 76, 162, 248, 351, 481, 620, 923, 1809),
    correlation=-0.143,
)
"""ShareGPT as DistServe's authors prepared it for OPT (prompt 764 and answer 183 tokens on average); the fit is
ours."""


# ── arrivals ─────────────────────────────────────────────────────────────────────────────────────────────────────────

Arrivals = Callable[[int, np.random.Generator], Seconds]
"""Draws ``n`` arrival times in seconds, ascending, from 0 on."""


def check_rate(rate: float) -> None:
    if not 0 < rate < math.inf:
        raise CannotPlan(f"a rate of {rate:g} requests a second cannot be served; give one above 0")


def poisson(rate: float) -> Arrivals:
    """Independent arrivals at ``rate`` a second: exponential gaps."""
    check_rate(rate)
    return lambda n, rng: np.cumsum(rng.exponential(1 / rate, n))


def gamma(rate: float, cv: float) -> Arrivals:
    """Gamma gaps with mean 1/rate and this coefficient of variation: 1 is Poisson, more is burstier, 0 is a clock."""
    check_rate(rate)
    if cv <= 0:
        return lambda n, rng: np.arange(1, n + 1) / rate
    return lambda n, rng: np.cumsum(rng.gamma(1 / cv**2, cv**2 / rate, n))


def varying(windows: Sequence[tuple[float, float]]) -> Arrivals:
    """Poisson arrivals at rates that change: (start of window in s, rate), ascending; the last window has no end."""
    starts, rates = [w[0] for w in windows], [w[1] for w in windows]
    if not windows or starts != sorted(starts) or starts[0] != 0 or min(rates) < 0 or rates[-1] <= 0:
        raise CannotPlan("rate windows must start at 0, ascend, hold no negative rate and end with one above 0")
    seen = np.concatenate([[0.0], np.cumsum(np.diff(starts) * np.array(rates[:-1]))])  # arrivals expected by each start

    def draw(n: int, rng: np.random.Generator) -> Seconds:
        due = np.cumsum(rng.exponential(1.0, n))  # unit-rate arrivals, bent by the inverse of the expected count
        window = np.searchsorted(seen, due, side="right") - 1
        return np.asarray(starts)[window] + (due - seen[window]) / np.asarray(rates)[window]

    return draw


def replayed(times: Iterable[float]) -> Arrivals:
    """The given times, over and over if more are wanted than there are."""
    once = np.sort(np.fromiter(times, dtype=float))
    if not len(once):
        raise CannotPlan("there are no arrivals to replay")
    period = (once[-1] - once[0]) * len(once) / max(1, len(once) - 1) or 1.0

    def draw(n: int, rng: np.random.Generator) -> Seconds:
        laps = -(-n // len(once))
        return np.concatenate([once - once[0] + lap * period for lap in range(laps)])[:n]

    return draw


def spread_ticks(workload: Workload, tick_s: float, seed: int) -> Workload:
    """Requests that share a tick of a coarse clock, laid uniformly over it: the raw stamps would invent bursts."""
    rng = np.random.default_rng(seed)
    shifts = rng.uniform(0.0, tick_s, len(workload.jobs))
    floors = [math.floor(j.arrival_s / tick_s) * tick_s for j in workload.jobs]
    moved = [replace(j, arrival_s=f + float(s)) for j, f, s in zip(workload.jobs, floors, shifts, strict=True)]
    return replace(workload, jobs=tuple(sorted(moved, key=lambda j: j.arrival_s)))


def synthetic(lengths: Lengths, arrivals: Arrivals, n: int, seed: int, name: str = "") -> Workload:
    """``n`` jobs. Lengths and arrivals have streams of their own: one seed gives the same lengths at every rate."""
    if n < 1:
        raise CannotPlan(f"a workload of {n} requests is empty; ask for at least 1")
    sizes, clock = np.random.default_rng([seed, 1]), np.random.default_rng([seed, 2])
    pairs, times = lengths.draw(n, sizes), arrivals(n, clock)
    jobs = (Job(p, o, t) for (p, o), t in zip(pairs.tolist(), times.tolist(), strict=True))
    return Workload(tuple(jobs), 0, name)


def resampled(workload: Workload, rate: float, n: int, seed: int) -> Workload:
    """A longer or shorter workload with the lengths of this one and Poisson arrivals."""
    return synthetic(Resampled(workload.lengths()), poisson(rate), n, seed, workload.name)


def burstiness(workload: Workload) -> float:
    """Coefficient of variation of the gaps between arrivals: 1 is Poisson's, more comes in bursts, 0 is a clock."""
    gaps = np.diff(np.sort([j.arrival_s for j in workload.jobs]))
    return float(gaps.std() / gaps.mean()) if len(gaps) and gaps.mean() else 0.0


def arrivals_named(word: str) -> Arrivals:
    """``poisson``, ``gamma:CV`` or ``varying:0=1,600=3`` (second = times the rate), 1 a second. Raises CannotPlan."""
    kind, _, rest = word.partition(":")
    try:
        if kind == "poisson" and not rest:
            return poisson(1.0)
        if kind == "gamma" and 0 <= (cv := float(rest)) <= MOST_CV:
            return gamma(1.0, cv)
        if kind == "varying":
            windows = [part.partition("=") for part in rest.split(",")]
            return varying([(float(start), float(times)) for start, _, times in windows])
    except ValueError as error:
        if isinstance(error, CannotPlan):
            raise
    known = ("poisson", "gamma:2", "varying:0=1,600=3")
    raise CannotPlan(f"unknown arrivals {word!r}{nearest(word, known)} (known: {', '.join(known)})")


def named(name: str, requests: int, seed: int, arrivals: Arrivals | None = None) -> Workload:
    """``sharegpt``, or ``constant:PROMPT/OUTPUT``, at 1 a second (Poisson unless given). Raises CannotPlan."""
    word, _, rest = name.partition(":")
    arrivals = arrivals or poisson(1.0)
    if word == "sharegpt" and not rest:
        return synthetic(SHAREGPT, arrivals, requests, seed, name)
    prompt, _, output = rest.partition("/")
    if word == "constant" and prompt.isdigit() and output.isdigit() and int(prompt) and int(output):
        lengths = Constant(int(prompt), int(output))
        return synthetic(lengths, arrivals, requests, seed, name)
    known = ("sharegpt", "constant:512/64")
    raise CannotPlan(
        f"unknown workload {name!r}{nearest(name, known)} (known: {', '.join(known)}; or give --trace FILE)"
    )
