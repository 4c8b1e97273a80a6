"""How large a pool may be: what the system says is free, what follows from it, and what is refused."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distserve.engine import memory
from distserve.engine.config import EngineConfig
from distserve.engine.memory import check_kv_dtype, free_of_host, largest_steps, sized, sized_for_ranks
from distserve.engine.room import (
    HOST_MOST_BYTES,
    PoolLimits,
    Room,
    blocks_of_pool,
    device_room,
    host_room,
    weight_bytes,
)
from distserve.engine.runner import Engine
from distserve.kv.shard import Parallel
from distserve.models.config import read_config
from distserve.models.errors import ModelError
from tests.tiny_models import make_tiny

MIB, GIB = 1 << 20, 1 << 30
MANY = 1 << 40


def test_a_host_gives_half_of_what_is_free_beside_the_weights():
    assert host_room(6 * GIB, GIB, 64, PoolLimits()) == Room(6 * GIB, 3 * GIB, 64)
    assert host_room(6 * GIB, GIB, 64, PoolLimits(fraction=0.25)).budget == 6 * GIB // 4
    assert host_room(1 << 50, GIB, 64, PoolLimits()).budget == HOST_MOST_BYTES


def test_a_budget_is_for_weights_and_pool_and_no_more_than_is_free():
    assert host_room(6 * GIB, GIB, 64, PoolLimits(memory_bytes=3 * GIB)) == Room(2 * GIB, GIB, 64)
    assert host_room(GIB, GIB, 64, PoolLimits(memory_bytes=3 * GIB)).free == GIB
    assert host_room(6 * GIB, 4 * GIB, 64, PoolLimits(memory_bytes=3 * GIB)) == Room(0, 0, 64)


def test_ranks_of_one_host_share_it():
    room = host_room(8 * GIB, GIB, 64, PoolLimits(), ranks=4)
    assert room == Room(2 * GIB, GIB, 64)
    assert host_room(1 << 50, GIB, 64, PoolLimits(), ranks=4).budget * 4 == HOST_MOST_BYTES


def test_a_gpu_keeps_room_for_the_largest_step():
    room = device_room(60 * GIB, 80 * GIB, 16 * GIB, 4 * GIB, 64, PoolLimits())
    assert room.free == 56 * GIB
    assert room.budget == int(min(60 * 0.9, 80 * 0.9 - 16) * GIB) - 4 * GIB


def test_instances_on_one_gpu_take_their_shares_in_any_order():
    limits = PoolLimits(share=0.5)
    first = device_room(79 * GIB, 80 * GIB, 10 * GIB, GIB, 64, limits).budget
    second = device_room(79 * GIB - 10 * GIB - first, 80 * GIB, 10 * GIB, GIB, 64, limits).budget
    assert first == second == 25 * GIB
    assert device_room(5 * GIB, 80 * GIB, 10 * GIB, 6 * GIB, 64, limits) == Room(0, 0, 64)


def test_an_automatic_pool_is_no_larger_than_a_batch_can_fill():
    room = Room(8 * GIB, 4 * GIB, MIB)
    assert blocks_of_pool(None, room, 16, MANY) == 4096
    assert blocks_of_pool(None, room, 16, 1000) == 63


def test_a_pool_that_was_asked_for_may_take_all_that_is_free_but_not_more():
    room = Room(8 * GIB, 4 * GIB, MIB)
    assert blocks_of_pool(8192 * 16, room, 16, 1) == 8192
    with pytest.raises(ModelError, match=r"131073 tokens needs 8.00 GiB, but 8.00 GiB are free .* --kv-tokens 131072"):
        blocks_of_pool(8192 * 16 + 1, room, 16, 1)
    with pytest.raises(ModelError, match="not one block fits"):
        blocks_of_pool(16, Room(0, 0, MIB), 16, 1)
    with pytest.raises(ModelError, match="not one block of 16 tokens"):
        blocks_of_pool(None, Room(GIB, MIB - 1, MIB), 16, MANY)


def test_limits_out_of_range_are_refused():
    for wrong in ({"fraction": 1.5}, {"fraction": -0.1}, {"share": 0.0}, {"share": 2.0}):
        with pytest.raises(ModelError, match="between 0 and 1"):
            PoolLimits(**wrong)


@pytest.mark.parametrize("family", ["llama", "llama_tied", "qwen3", "opt"])
def test_weights_are_reckoned_to_a_tenth(family, tmp_path):
    directory = make_tiny(family, tmp_path)
    engine = Engine.load(EngineConfig(model=str(directory), pool_blocks=4, kernels="torch"))
    assert weight_bytes(read_config(directory), 4) == pytest.approx(engine.weight_bytes, rel=0.1)


# ── what the system says ─────────────────────────────────────────────────────────────────────────────────────────────


def system(root: Path, groups: str, **files: object) -> Path:
    """A root with 8 GiB available and these files of control groups."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: {1 << 24} kB\nMemAvailable:   {8 << 20} kB\n")
    (root / "proc/self/cgroup").write_text(groups)
    for name, content in files.items():
        file = root / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{content}\n")
    return root


def test_without_limits_the_kernel_is_believed(tmp_path):
    files = {"memory.max": "max", "memory.current": 5 * GIB}
    assert free_of_host(system(tmp_path, "0::/\n", **files)) == 8 * GIB


def test_version_2_every_group_above_counts_and_page_cache_is_no_use(tmp_path):
    files = {
        "a/memory.max": 4 * GIB,
        "a/memory.current": 3 * GIB,
        "a/memory.stat": f"anon 1\ninactive_file {2 * GIB}",
        "a/b/memory.max": "max",
        "a/b/memory.current": 1,
    }
    assert free_of_host(system(tmp_path, "0::/a/b\n", **files)) == 3 * GIB


def test_version_1(tmp_path):
    files = {
        "memory/job/memory.limit_in_bytes": 2 * GIB,
        "memory/job/memory.usage_in_bytes": GIB + MIB,
        "memory/job/memory.stat": f"total_inactive_file {MIB}",
        "memory/memory.limit_in_bytes": 0x7FFFFFFFFFFFF000,
        "memory/memory.usage_in_bytes": 5 * GIB,
    }
    assert free_of_host(system(tmp_path, "7:cpu:/job\n4:memory:/job\n", **files)) == GIB


def test_a_group_over_its_limit_has_nothing_left_and_an_unseen_one_none_to_say(tmp_path):
    files = {"memory.max": GIB, "memory.current": 2 * GIB}
    assert free_of_host(system(tmp_path, "0::/not/mounted/here\n", **files)) == 0
    assert free_of_host(tmp_path / "nowhere") is None


# ── engines ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny("llama", tmp_path_factory.mktemp("room")))


def test_an_engine_measures_its_pool(model, monkeypatch, caplog):
    block = Engine.load(EngineConfig(model=model, pool_blocks=4)).pool.block_bytes
    monkeypatch.setattr(memory, "free_of_host", lambda: 200 * block)
    with caplog.at_level(logging.INFO):
        engine = Engine.load(EngineConfig(model=model, measured=True, limits=PoolLimits(max_sequences=16)))
    assert engine.spec.pool_blocks == engine.pool.blocks == 100
    assert "KV pool of 1600 tokens" in caplog.text
    few = Engine.load(EngineConfig(model=model, measured=True, limits=PoolLimits(max_sequences=2)))
    assert few.spec.pool_tokens == 2 * few.spec.max_model_len
    with caplog.at_level(logging.WARNING):
        short = Engine.load(EngineConfig(model=model, measured=True, limits=PoolLimits(fraction=0.05)))
    assert short.pool.blocks == 10
    assert "fewer than the 512 of the longest request" in caplog.text
    with pytest.raises(ModelError, match="--kv-tokens 3200 fits"):
        Engine.load(EngineConfig(model=model, kv_tokens=4000))


def test_where_nothing_is_told_only_a_number_will_do(model, monkeypatch):
    monkeypatch.setattr(memory, "free_of_host", lambda: None)
    assert Engine.load(EngineConfig(model=model, kv_tokens=320)).pool.blocks == 20
    with pytest.raises(ModelError, match="give --kv-tokens a number"):
        Engine.load(EngineConfig(model=model, measured=True))


def test_ranks_agree_on_a_pool_before_they_load(model, monkeypatch):
    shape = read_config(Path(model))
    free = weight_bytes(shape, 4) + 64 * MIB
    monkeypatch.setattr(memory, "free_of_host", lambda: free)
    config = EngineConfig(model=model, measured=True, limits=PoolLimits(max_sequences=1 << 20))
    whole = sized_for_ranks(config, shape, 512, Parallel(1, 1), 1)
    cut = sized_for_ranks(config, shape, 512, Parallel(2, 1), 2)
    assert whole.blocks > 100
    assert abs(cut.blocks - whole.blocks) <= 1  # two ranks, half of the memory each, half of every block each


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a driver would say of a GPU of 80 GiB, 60 of them free, where we hold 16 and a step needs 4."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 16 * GIB)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(memory, "peak_of_steps", lambda *about: 4 * GIB)


@pytest.mark.usefixtures("gpu")
def test_a_gpu_is_asked_where_kv_lies_on_one(model):
    shape = read_config(Path(model))
    limits = PoolLimits(max_sequences=1 << 30)
    config = EngineConfig(model=model, device="cuda", measured=True, limits=limits)
    block = memory.block_bytes(config, shape, Parallel())
    assert sized(config, shape, None, 512, GIB).blocks == 50 * GIB // block  # 0.9 of 60, less a step
    asked = EngineConfig(model=model, device="cuda", kv_tokens=60 * GIB // block * 16)
    assert sized(asked, shape, None, 512, GIB).blocks == 60 * GIB // block  # no step is tried for a number
    with pytest.raises(ModelError, match=r"but 60.00 GiB are free"):
        sized(replace(asked, kv_tokens=asked.kv_tokens + 16), shape, None, 512, GIB)


@pytest.mark.usefixtures("gpu")
def test_8_bit_kv_is_refused_where_a_gpu_has_no_such_numbers(model):
    check_kv_dtype(EngineConfig(model=model, kv_dtype="fp8_e4m3"))
    check_kv_dtype(EngineConfig(model=model, device="cuda", kv_dtype="bfloat16"))
    with pytest.raises(ModelError, match=r"fp8_e4m3 needs a GPU of compute capability 8.9 or later, and cuda has 8.0"):
        check_kv_dtype(EngineConfig(model=model, device="cuda", kv_dtype="fp8_e4m3"))


def test_the_largest_steps_are_within_the_limits(model):
    config = EngineConfig(model=model, limits=PoolLimits(max_batch_tokens=100, max_sequences=7))
    prompts, answers = largest_steps(config, 64)
    assert [len(item.token_ids) for item in prompts.items] == [64, 36]
    assert [len(item.token_ids) for item in answers.items] == [1] * 7
    engine = Engine.load(EngineConfig(model=model, pool_blocks=1, kernels="torch"))
    assert len(engine.run(prompts).tokens) == 2
    assert len(engine.run(answers).tokens) == 7
