"""The load generator: statistics against closed forms, arrivals, files, and a scripted server at the other end."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
import math
import random
import statistics
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Metaspace

from distserve.cli.main import main
from distserve.loadgen.bench import Bench, BenchFailed, Plan
from distserve.loadgen.client import Client, Record
from distserve.loadgen.goodput import Point, search
from distserve.loadgen.http import HttpFailed, Target, get_json
from distserve.loadgen.machine import CpuWatch, hardware, tree_cpu_s
from distserve.loadgen.run import Progress, closed_loop, open_loop
from distserve.loadgen.stats import Slo, Spread, Summary, percentile, summarize
from distserve.loadgen.words import ENGLISH, EnglishWords, VocabularyWords
from distserve.loadgen.workload import (
    Ask,
    BadWorkload,
    FilePrompts,
    RandomPrompts,
    poisson,
    read_requests,
    replayed,
)
from tests.cli.sse_server import Script, sse_server


def record(ttft: float = 0.1, gaps: tuple[float, ...] = (0.1, 0.1), due: float = 0.0, **fields: Any) -> Record:
    times = list(itertools.accumulate((due + ttft, *gaps)))
    return Record(due, due, times, times[-1], output_tokens=len(times), **fields)


# ── statistics ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_percentiles_are_those_of_the_textbook() -> None:
    values = sorted(random.Random(1).random() for _ in range(101))
    assert percentile(values, 50) == statistics.median(values)
    assert percentile(values, 90) == values[90]
    assert percentile([1.0, 2.0], 25) == 1.25
    assert percentile([7.0], 99) == 7.0


def test_a_spread_of_evenly_spaced_values() -> None:
    spread = Spread.of([float(n) for n in reversed(range(101))])
    assert (spread.count, spread.mean, spread.p50, spread.p90, spread.p95, spread.p99, spread.max) == (
        *(101, 50.0, 50.0, 90.0, 95.0, 99.0, 100.0),
    )
    assert Spread.of([]).count == 0


def test_latencies_count_from_when_a_request_was_due() -> None:
    late = Record(due=10.0, sent=12.0, token_times=[12.5, 12.6, 12.8], end=12.9, output_tokens=3)
    assert late.ttft_s == pytest.approx(2.5)
    assert late.tpot_s == pytest.approx(0.15)
    assert late.e2e_s == pytest.approx(2.9)
    assert late.gaps_s == pytest.approx([0.1, 0.2])


def test_tokens_that_came_in_fewer_messages_still_count_one_by_one() -> None:
    bundled = Record(0.0, 0.0, [1.0, 2.0], 2.0, output_tokens=11)
    assert bundled.tpot_s == pytest.approx(0.1)


def test_a_single_token_has_no_time_per_token() -> None:
    assert record(gaps=()).tpot_s == 0.0


def test_attainment_counts_failed_and_cut_off_requests_as_missed() -> None:
    slo = Slo(ttft_s=0.5, tpot_s=0.2)
    records = [
        record(),
        record(ttft=0.6),
        record(gaps=(0.3, 0.3)),
        record(error="HTTP 500: no"),
        Record(0.0, 0.0, cut_off=True),
    ]
    summary = summarize(records, slo, wall_s=2.0)
    assert summary.attained == pytest.approx(1 / 5)
    assert summary.ttft_attained == pytest.approx(2 / 5)
    assert summary.tpot_attained == pytest.approx(2 / 5)
    assert (summary.requests, summary.failed) == (5, 2)
    assert summary.errors == {"HTTP 500: no": 1, "cut off: the run was decided": 1}
    assert summary.output_token_rate == pytest.approx(9 / 2)


@pytest.mark.parametrize(
    ("text", "slo"),
    [
        ("", Slo()),
        ("ttft=1.0,tpot=0.1", Slo(1.0, 0.1)),
        ("tpot=0.1, attainment=0.99", Slo(math.inf, 0.1, attainment=0.99)),
        ("e2e=5", Slo(e2e_s=5.0)),
    ],
)
def test_targets_are_read(text: str, slo: Slo) -> None:
    assert Slo.parse(text) == slo


@pytest.mark.parametrize("text", ["ttfb=1", "ttft=fast", "attainment=0", "attainment=1.1"])
def test_targets_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"ttf|number|attainment"):
        Slo.parse(text)


# ── arrivals and prompts ─────────────────────────────────────────────────────────────────────────────────────────────


def same(prompt: str = "x") -> itertools.repeat[Ask]:
    return itertools.repeat(Ask(prompt, 4))


def test_poisson_arrivals_have_the_rate_asked_for_and_the_spread_of_chance() -> None:
    asks = poisson(same(), rate=50.0, count=5000, seed=3)
    times = [a.due_s for a in asks]
    assert times == sorted(times)
    assert times[-1] == pytest.approx(5000 / 50.0)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert statistics.fmean(gaps) == pytest.approx(0.02, rel=0.01)
    assert statistics.stdev(gaps) == pytest.approx(0.02, rel=0.05), "an exponential's spread is its mean"
    assert asks == poisson(same(), 50.0, 5000, 3)
    assert asks != poisson(same(), 50.0, 5000, 4)


def test_a_replay_keeps_the_files_times() -> None:
    asks = [Ask("a", 1, 7.0), Ask("b", 1, 5.0), Ask("c", 1, 9.5)]
    assert [(a.prompt, a.due_s) for a in replayed(asks, None)] == [("b", 0.0), ("a", 2.0), ("c", 4.5)]
    assert [a.prompt for a in replayed(asks, 3.0)] == ["b", "a"]
    with pytest.raises(BadWorkload, match="no arrival_s"):
        replayed([Ask("a", 1), Ask("b", 1)], None)


def test_random_prompts_never_repeat_and_follow_the_seed() -> None:
    prompts = [a.prompt for a in itertools.islice(RandomPrompts(EnglishWords(), 20, 4, seed=1), 200)]
    assert len(set(prompts)) == 200
    assert all(isinstance(p, str) and len(p.split()) == 20 for p in prompts)
    assert prompts == [a.prompt for a in itertools.islice(RandomPrompts(EnglishWords(), 20, 4, seed=1), 200)]


def test_a_files_prompts_go_round_in_an_order_of_the_seed() -> None:
    asks = [Ask(str(n), 1) for n in range(5)]
    twice = list(itertools.islice(FilePrompts(asks, 1), 10))
    assert sorted(a.prompt for a in twice[:5]) == sorted(a.prompt for a in twice[5:]) == [*"01234"]
    assert list(itertools.islice(FilePrompts(asks, 2), 10)) != twice


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> Path:
    words = [*(f"\u2581{w}" for w in ENGLISH), "\u2581Upper", "\u2581ab", "x"]
    tokenizer = Tokenizer(WordLevel({w: n for n, w in enumerate(words)}, unk_token="x"))
    tokenizer.pre_tokenizer = Metaspace(prepend_scheme="never")
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_words_of_a_vocabulary_are_one_token_each(tokenizer_file: Path) -> None:
    source = VocabularyWords(tokenizer_file)
    assert set(source.words) == set(ENGLISH)
    text = source.text(50, random.Random(1))
    assert len(Tokenizer.from_file(str(tokenizer_file)).encode(text).ids) == 50


def write_lines(path: Path, *rows: Any) -> Path:
    opener: Any = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt") as file:
        file.write("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n\n")
    return path


def test_every_kind_of_row_is_read(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "requests.jsonl.gz",
        {"prompt": "hello", "max_tokens": 3, "arrival_s": 1.5},
        {"prompt": [1, 2], "max_tokens": 3},
        {"prompt_token_ids": [4, 5, 6]},
        {"messages": [{"role": "user", "content": "hi"}]},
        {"prompt_tokens": 7, "max_tokens": 2},
        {"input_tokens": 8, "output_tokens": 9, "arrival_s": 2},
        {"api": "chat", "system": "be kind", "turns": [{"user": "hey", "reference": None}]},
        {"api": "completion", "system": "once ", "turns": [{"user": "upon"}]},
    )
    asks = read_requests(path, EnglishWords(), seed=1, default_max_tokens=64)
    assert asks[0] == Ask("hello", 3, 1.5)
    assert [a.prompt for a in asks[1:3]] == [(1, 2), (4, 5, 6)]
    assert asks[2].max_tokens == 64
    assert asks[3].is_chat and not asks[0].is_chat
    assert [len(str(a.prompt).split()) for a in asks[4:6]] == [7, 8]
    assert (asks[5].max_tokens, asks[5].due_s) == (9, 2.0)
    assert [m["role"] for m in asks[6].prompt if isinstance(m, dict)] == ["system", "user"]
    assert asks[7].prompt == "once upon"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{", "requests.jsonl:1"),
        ([1], "JSON object"),
        ({"max_tokens": 3}, "exactly one of"),
        ({"prompt": "a", "prompt_tokens": 3}, "exactly one of"),
        ({"prompt": ""}, "empty"),
        ({"prompt": "a", "max_tokens": "many"}, "invalid literal"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(row: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(BadWorkload, match=words):
        read_requests(write_lines(tmp_path / "requests.jsonl", row), EnglishWords(), 1, 64)


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadWorkload, match="cannot read the requests file"):
        read_requests(tmp_path / "no.jsonl", EnglishWords(), 1, 64)


# ── against a scripted server ────────────────────────────────────────────────────────────────────────────────────────


def client(url: str, **fields: Any) -> Client:
    return Client(Target.parse(url), "scripted", timeout_s=20.0, **fields)


async def test_one_request_is_read_to_its_end() -> None:
    script = Script(first_s=0.03, gap_s=0.01)
    async with sse_server(script) as url:
        got = await client(url, api_key="k", extra={"top_k": 5}).send(Ask("hello", 6))
    assert got.ok and not got.error
    assert (got.output_tokens, got.prompt_tokens, got.finish_reason) == (6, 5, "length")
    assert len(got.token_times) == 6
    assert got.ttft_s >= 0.03
    assert got.tpot_s >= 0.01
    assert got.e2e_s >= got.ttft_s + 0.05
    body = script.seen[0]
    assert (body["prompt"], body["max_tokens"], body["ignore_eos"], body["top_k"]) == ("hello", 6, True, 5)
    assert script.paths == ["/v1/completions"]


async def test_a_chat_goes_to_the_chat_path_and_its_first_empty_delta_is_no_token() -> None:
    script = Script(usage=False)
    async with sse_server(script) as url:
        got = await client(url).send(Ask(({"role": "user", "content": "hi"},), 3))
    assert script.paths == ["/v1/chat/completions"]
    assert got.output_tokens == 3, "without usage, messages with text are counted"


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (Script(status=429), "HTTP 429: go away"),
        (Script(error_after=2), "the instance is gone"),
        (Script(break_after=2), "broke off"),
        (Script(tokens=lambda _: 0), "no token"),
    ],
)
async def test_what_goes_wrong_is_in_the_record(script: Script, words: str) -> None:
    async with sse_server(script) as url:
        got = await client(url).send(Ask("x", 5))
    assert words in got.error
    assert not got.ok


async def test_a_server_that_is_not_there_is_an_error_of_the_record() -> None:
    got = await client("http://127.0.0.1:1").send(Ask("x", 5))
    assert "Connect" in got.error


async def test_get_json_reads_json_and_nothing_else() -> None:
    async with sse_server(Script()) as url:
        assert (await get_json(Target.parse(url), "/v1/models", {}, 5.0)) == {
            "object": "list",
            "data": [{"id": "scripted"}],
        }
        with pytest.raises(HttpFailed, match="JSON"):
            await get_json(Target.parse(url), "/stream", {}, 5.0)


async def test_an_open_loop_sends_when_due_whatever_became_of_the_others() -> None:
    async with sse_server(Script(slots=1, first_s=0.05)) as url:
        asks = [Ask("x", 1, 0.01 * n) for n in range(10)]
        progress = Progress()
        records, wall_s = await open_loop(client(url), asks, progress)
    assert [r.ok for r in records] == [True] * 10
    waits = [r.ttft_s for r in records]
    assert waits == sorted(waits), "one slot: each waits for all before it, and the client does not hide it"
    assert waits[-1] >= 10 * 0.05 - 0.09
    assert wall_s >= 0.5
    assert (progress.total, progress.sent, progress.done, progress.failed) == (10, 10, 10, 0)


async def test_an_open_loop_gives_up_once_it_is_decided() -> None:
    async with sse_server(Script(slots=1, first_s=0.05)) as url:
        asks = [Ask("x", 1) for _ in range(20)]
        records, _ = await open_loop(client(url), asks, decided=lambda ended: len(ended) >= 3)
    assert sum(r.ok for r in records) >= 3
    assert any(r.cut_off for r in records)
    assert len(records) == 20


async def test_a_closed_loop_keeps_so_many_in_flight() -> None:
    script = Script(first_s=0.02)
    async with sse_server(script) as url:
        records, _ = await closed_loop(client(url), same(), concurrency=4, count=13)
    assert len(records) == len(script.seen) == 13
    starts = sorted((r.sent, 1) for r in records) + sorted((r.end, -1) for r in records)
    assert max(itertools.accumulate(step for _, step in sorted(starts))) == 4


def plan(url: str, **fields: Any) -> Plan:
    return Plan(client=client(url), warmup=1, prompt_tokens=4, max_tokens=3, **fields)


async def run(bench_plan: Plan) -> dict[str, Any]:
    return await Bench(bench_plan, lambda _: None, lambda _: None).run()


async def test_the_document_says_what_was_measured_where() -> None:
    async with sse_server(Script()) as url:
        document = await run(plan(url, rate=100.0, duration_s=0.2, slo=Slo(1.0, 0.5)))
    assert (document["kind"], document["run"]) == ("measured", "poisson")
    assert document["server"] == {"url": url, "model": "scripted", "models": ["scripted"]}
    assert document["workload"]["slo"] == {"ttft_s": 1.0, "tpot_s": 0.5, "attainment": 0.9}
    assert document["results"]["requests"] == 20
    assert document["results"]["attained"] == 1.0
    assert document["hardware"]["cores"] >= 1
    json.dumps(document)


async def test_a_goodput_search_finds_where_one_slot_gives_in() -> None:
    """One slot of 10 ms a request serves at most 100 a second: at several times that, most wait too long."""
    async with sse_server(Script(slots=1, first_s=0.01)) as url:
        document = await run(
            plan(url, goodput=True, rate=50.0, most_rate=800.0, tolerance=1.0, slo=Slo(ttft_s=0.4),
                 least_requests=100, most_requests=100)
        )  # fmt: skip
    results = document["results"]
    assert results["rate"] < results["fails_at"] <= 800.0
    assert [p["passed"] for p in sorted(results["curve"], key=lambda p: p["rate"])][-1] is False
    assert results["rate"] < 400.0


async def test_a_bench_that_cannot_start_says_why() -> None:
    with pytest.raises(BenchFailed, match="no server answers"):
        await run(plan("http://127.0.0.1:1", rate=1.0, duration_s=1.0))
    async with sse_server(Script(status=503)) as url:
        with pytest.raises(BenchFailed, match="warm-up request failed: HTTP 503"):
            await run(plan(url, rate=1.0, duration_s=1.0))


# ── the search itself ────────────────────────────────────────────────────────────────────────────────────────────────


EMPTY: Summary = summarize([], Slo(), 1.0)


async def searched(capacity: float, **bounds: float) -> tuple[float, float | None, list[float]]:
    async def measure(rate: float, _: int) -> Point:
        return Point(rate, rate <= capacity, False, EMPTY)

    found = await search(
        measure,
        **{"start": 1.0, "least": 0.05, "most": 100.0, "tolerance": 0.05} | bounds,  # type: ignore[arg-type]
    )
    return found.rate, found.fails_at, [p.rate for p in found.curve]


@pytest.mark.parametrize("capacity", [0.3, 0.9999, 1.0, 1.7, 12.0, 80.0])
async def test_the_search_closes_in_on_the_capacity(capacity: float) -> None:
    rate, fails_at, tried = await searched(capacity)
    assert fails_at is not None
    assert rate <= capacity < fails_at
    assert fails_at / rate <= 1.05 + 1e-9
    assert len(tried) < 30


async def test_the_search_knows_its_limits() -> None:
    assert (await searched(math.inf, most=7.0))[:2] == (7.0, None)
    assert (await searched(0.0))[:2] == (0.0, 0.05)


# ── the command, and the machine ─────────────────────────────────────────────────────────────────────────────────────


async def test_the_command_prints_a_table_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    requests = write_lines(tmp_path / "r.jsonl", {"prompt": "a", "max_tokens": 3}, {"prompt": "b", "max_tokens": 2})
    out = tmp_path / "deep" / "out.json"
    async with sse_server(Script()) as url:
        argv = ["bench", "--url", url, "--model", "scripted", "--requests", str(requests), "--rate", "50"]
        argv += ["--duration", "0.2", "--slo", "ttft=1.0,tpot=0.1", "--json", str(out), "--plain"]
        assert await asyncio.to_thread(main, argv) == 0
    shown = capsys.readouterr().out
    assert "TTFT" in shown and "within target: 100.0%" in shown
    document = json.loads(out.read_text())
    assert document["workload"]["file"] == "r.jsonl"
    assert document["results"]["requests"] == 10


def test_the_machine_is_described_and_watched() -> None:
    assert hardware()["memory_gib"] > 0
    watch = CpuWatch(server_pids=(1,))
    sum(n * n for n in range(200_000))
    shares = watch.stop()
    assert set(shares) == {"server", "client", "others"}
    assert shares["client"] > 0
    assert tree_cpu_s([999_999_999]) == 0.0
