"""Files of operators and planners: settings, requests, traces, plans and clusters are read or refused in a sentence."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from distserve.launch.settings import BadSetting, read_file, resolve
from distserve.launch.words import settings
from distserve.loadgen.words import EnglishWords
from distserve.loadgen.workload import BadWorkload, read_requests
from distserve_planner import cluster, workload
from distserve_planner.plan import as_text, read_plan
from distserve_planner.refusal import CannotPlan
from tests.fuzz.hostile import TEXTS, bent_bytes, bent_json, bounded

CLUSTER: dict[str, Any] = {
    "version": 1, "pod": "slice", "network_gbs": 25, "name": "c",
    "gpu_types": {"a100-big": {"like": "a100-80g", "memory_gib": 96}},
    "nodes": [
        {"name": "left", "gpu": "a100-80g", "gpus": 8, "nvlink_domains": [4, 4]},
        {"name": "right", "count": 3, "gpu": "a100-big", "gpus": 8, "price_per_hour": 2.5, "nvlink_gbs": 300},
    ],
}  # fmt: skip
PLAN: dict[str, Any] = {
    "version": 1, "model": "m", "cluster": "c", "pod": "slice", "algorithm": "low", "objective": "goodput",
    "latency": "roofline", "policy": "p", "slo": {"ttft_s": 0.2, "tpot_s": 0.1, "attainment": 0.9},
    "load": {"name": "w", "rate": 2.0, "prompt_tokens": 5.0, "output_tokens": 6.0, "requests": 10, "seed": 0},
    "instances": [
        {"id": "p0", "role": "prefill", "gpu": "a100-80g", "tp": 2, "pp": 1, "kv_tokens": 99,
         "stages": [{"node": "left", "gpus": [0, 1]}]},
        {"id": "d0", "role": "decode", "gpu": "a100-80g", "tp": 1, "pp": 1, "kv_tokens": 99,
         "stages": [{"node": "left", "gpus": [2]}]},
    ],
    "prediction": {
        "attainment": 0.95, "ttft_p50_s": 0.1, "ttft_p90_s": 0.2, "tpot_p50_s": 0.1, "tpot_p90_s": 0.1, "goodput": 3.0,
        "goodput_low": 2.0, "goodput_high": 4.0, "gpus": 3, "per_gpu": 1.0,
    },
    "links": [{"link": "l", "bytes_s": 5.0, "capacity_bytes_s": 100.0}], "why": "because", "notes": ["n"],
}  # fmt: skip
TRACE = [
    {"input_tokens": 30, "output_tokens": 5, "arrival_s": 0.0, "prefix_blocks": [1, 2], "session_id": "s"},
    {"input_tokens": 20, "output_tokens": 7, "arrival_s": 0.5, "prefix_blocks": [1, 3]},
]
REQUESTS = [
    {"prompt": "Hello", "max_tokens": 5, "arrival_s": 0.0}, {"prompt_token_ids": [1, 2], "max_tokens": 3},
    {"messages": [{"role": "user", "content": "Hi"}]}, {"prompt_tokens": 12, "output_tokens": 4},
    {"turns": [{"user": "a", "assistant": "b"}], "system": "s"},
]  # fmt: skip
SETTINGS = {"model": "m", "prefill": 1, "http-port": 8000, "grace": 2.5, "api-keys": None, "serve": {"decode": 2}}

ODD_YAML = (
    b"", b"\xff\xfe\0", b"a: !!python/object:os.system x", b"a: 2001-13-45", b"a: &x [*x]",
    b"? [a]\n: b", b"a: " + b"9" * 5000, b"a: 0x", b"a: 1:99999999999999999:9", b"a: .inf\nb: .nan",
    b"%YAML 9.9\n---\n",
    b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(
        b"%c: &%c [*%c,*%c,*%c,*%c,*%c,*%c,*%c,*%c,*%c]\n" % ((i + 1, i + 1) + (i,) * 9) for i in range(97, 106)
    ),
)  # fmt: skip


def yamls(data: Any, valid: Any, known: tuple[str, ...] = ()) -> bytes:
    """A document near the valid one, broken bytes of it, or something that only YAML can say."""
    text = yaml.safe_dump(valid).encode()
    near = bent_json(valid, known, (3, 50)).map(lambda v: json.dumps(v).encode())  # JSON is YAML, and quick to write
    return bytes(data.draw(near | near | bent_bytes(text) | st.sampled_from(ODD_YAML)))


def said_well(error: Exception) -> None:
    assert str(error).strip() and "Traceback" not in str(error) and len(str(error)) < 20_000


@bounded(50)
@given(data=st.data())
def test_settings(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "settings.yaml"
    known = tuple(s.key for s in settings("serve"))
    path.write_bytes(yamls(data, SETTINGS, known))
    try:
        values = resolve(settings("serve"), flags={}, environ={}, file=read_file(path), section="serve")
        assert values
    except BadSetting as error:
        said_well(error)


@pytest.mark.parametrize("deep", [b"[" * 1000, b"- " * 1000 + b"x"])
def test_lists_within_lists(tmp_path: Path, deep: bytes) -> None:
    path = tmp_path / "deep.yaml"
    path.write_bytes(deep)
    with pytest.raises(BadSetting, match="within each other"):
        read_file(path)
    with pytest.raises(CannotPlan, match="within each other"):
        read_plan(path)


@bounded(60)
@given(value=st.sampled_from(TEXTS) | st.text(max_size=10), at=st.integers(0, 10_000))
def test_variables(value: str, at: int) -> None:
    known = settings("serve")
    setting = known[at % len(known)]
    try:
        resolve(known, flags={"model": "m"}, environ={setting.variable: value}, file={})
    except BadSetting as error:
        said_well(error)


@bounded(50)
@given(data=st.data())
def test_requests_of_the_load_generator(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    some = REQUESTS[: data.draw(st.integers(1, 5))]
    rows = [data.draw(bent_json(row, ("prompt", "turns", "messages", "arrival_s"))) for row in some]
    content = b"\n".join(json.dumps(row).encode() for row in rows)
    path = tmp_path_factory.getbasetemp() / data.draw(st.sampled_from(("r.jsonl", "r.jsonl.gz")))
    packed = gzip.compress(content, mtime=0) if path.suffix == ".gz" else content
    path.write_bytes(data.draw(st.just(packed) | bent_bytes(packed)))
    try:
        for ask in read_requests(path, EnglishWords(), 0, 16):
            assert ask.prompt and ask.max_tokens > 0 and 0 <= ask.due_s < float("inf")
    except BadWorkload as error:
        said_well(error)


@bounded(50)
@given(data=st.data())
def test_clusters(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "cluster.yaml"
    path.write_bytes(yamls(data, CLUSTER))
    try:
        found = cluster.read_cluster(path)
        assert found.gpus > 0 and len(found.domains) > 0
    except CannotPlan as error:
        said_well(error)


@bounded(50)
@given(data=st.data())
def test_plans(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "plan.yaml"
    path.write_bytes(yamls(data, PLAN))
    try:
        assert as_text(read_plan(path))
    except CannotPlan as error:
        said_well(error)


@bounded(50)
@given(data=st.data())
def test_traces(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    rows = data.draw(bent_json(TRACE))
    lines = b"\n".join(json.dumps(row).encode() for row in (rows if isinstance(rows, list) else [rows]))
    odd = (b"[" * 100_000, b"[1e999]", b"[[1, 2, 1e400]]", gzip.compress(lines, mtime=0))
    content = data.draw(st.sampled_from((lines, lines, json.dumps(rows).encode(), *odd)))
    path = tmp_path_factory.getbasetemp() / "trace.jsonl"
    path.write_bytes(data.draw(st.just(content) | bent_bytes(content)))
    try:
        found = workload.read(path)
        assert found.jobs and found.rate > 0
        assert len(found.lengths()) == len(found.jobs)
    except CannotPlan as error:
        said_well(error)
