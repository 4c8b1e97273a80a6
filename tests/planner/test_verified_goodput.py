"""Goodput foretold and measured of the same requests, judged alike; the measured side against a made-up server."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace

import pytest

from distserve.core.types import Role
from distserve.loadgen.client import Record
from distserve.loadgen.workload import Ask
from distserve.profiling import goodput
from distserve.profiling.goodput import Question, measured, told
from distserve.profiling.verify import Bounds, Figures, judge
from distserve_planner.latency.profiled import within
from distserve_planner.simulation.deployment import policy
from distserve_planner.simulation.shared import Machine
from distserve_planner.slo import parse_slos
from distserve_planner.workload import Job, Workload
from tests.planner.test_profile import profile

WORK = Workload(tuple(Job(100 + 20 * (i % 3), 8, i * 0.1, slo_class="ab"[i % 2]) for i in range(10)))
COMMON = parse_slos(["ttft=0.3,tpot=0.1"])
CLASSES = parse_slos(["a:ttft=0.3,tpot=0.1", "b:ttft=0.01,tpot=0.1,attainment=0.9"])


@dataclass
class OneServer:
    """Answers at once with what a single server of this many seconds a request would have taken."""

    work_s: float
    free: float = 0.0
    sent: int = 0

    async def send(self, ask: Ask, due: float | None = None) -> Record:
        assert due is not None
        self.sent += 1
        self.free = max(due, self.free) + self.work_s
        return Record(due, due, [self.free, self.free + 0.01], self.free + 0.01, 100, 8)


class NoWords:
    """Prompts without a tokenizer."""

    def ask(self, prompt: int, output: int, due_s: float = 0.0) -> Ask:
        return Ask("", output, due_s)


def search(question: Question, server: OneServer) -> float:
    said: list[float] = []
    found = asyncio.run(measured(question, server, NoWords(), lambda words, share: said.append(share)))  # type: ignore[arg-type]
    assert said == sorted(said) and said[-1] < 1
    return found


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(goodput, "SECONDS", 0.4)
    monkeypatch.setattr(goodput, "LEAST_RATE", 6.0)


def test_a_few_requests_are_repeated_until_the_time_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(goodput, "SECONDS", 30.0)
    asked = Question(WORK, COMMON).at(4.0)
    assert len(asked.jobs) == 120
    assert asked.rate == pytest.approx(4.0, rel=0.01)
    assert [j.prompt for j in asked.jobs[:10]] == [j.prompt for j in asked.jobs[10:20]]
    assert len(Question(WORK, COMMON).at(100.0).jobs) == goodput.MOST


def test_measured_goodput_is_where_the_server_is_full() -> None:
    assert 20 < search(Question(WORK, COMMON), OneServer(1 / 40)) < 70  # 40 a second, and what a short run forgives
    assert search(Question(WORK, COMMON), OneServer(0.4)) == 0.0  # too slow at any rate


def test_every_class_must_attain_as_in_the_simulation() -> None:
    alike = search(Question(WORK, COMMON), OneServer(0.02))
    assert alike > 0
    assert search(Question(WORK, CLASSES), OneServer(0.02)) == 0.0  # class b has 10 ms


def test_the_simulation_is_asked_the_same_and_says_no_where_a_class_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(goodput, "SECONDS", 30.0)
    machine = Machine(profile(), (Role.PREFILL, Role.DECODE), within(profile(), policy("serve")))
    assert told(Question(WORK, COMMON), machine) > 1
    assert told(Question(WORK, CLASSES), machine) == 0.0


SEEN = Figures(100, 0, 0.90, 0.200, 0.300, 0.030, 0.040, 1.8, goodput=4.0)


@pytest.mark.parametrize(
    ("foretold", "seen", "words"),
    [
        (4.9, 4.0, ""),
        (5.2, 4.0, "goodput is off by +30%"),
        (2.8, 4.0, "goodput is off by -30%"),
        (2.8, 0.0, "no rate met the targets"),
        (9.0, None, ""),
    ],
)
def test_goodput_is_judged_when_it_was_measured(foretold: float, seen: float | None, words: str) -> None:
    reasons = list(judge(replace(SEEN, goodput=foretold), replace(SEEN, goodput=seen), Bounds()))
    assert len(reasons) == bool(words) and all(words in reason for reason in reasons)
