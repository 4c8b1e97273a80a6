"""What memory is free, read from the system, and the size of the KV pool that follows from it.

A host's is what the kernel calls available, bounded by the limits of the control groups (version 2 or 1) this process
is in. A GPU's is the driver's word, once the largest step has shown what activations need; that half never ran on a
GPU so far.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from distserve.core.types import Sampling, StepItem, StepPlan
from distserve.engine.config import EngineConfig
from distserve.engine.forward import TorchForward
from distserve.engine.pool import KvPool
from distserve.engine.room import GIB, Room, blocks_of_pool, device_room, host_room, weight_bytes
from distserve.engine.sampler import choose_tokens
from distserve.kv.shard import KvCut, Parallel
from distserve.models.config import ModelConfig
from distserve.models.errors import ModelError
from distserve.models.registry import Model

log = logging.getLogger(__name__)
FP8_CAPABILITY = (8, 9)
"""The first CUDA compute capability with 8-bit floats."""


def sized(config: EngineConfig, shape: ModelConfig, model: Model, length: int, held: int) -> EngineConfig:
    """``config`` with its ``pool_blocks`` decided, for an instance of one rank whose ``held`` weight bytes are loaded.

    Raises ModelError when a pool that was asked for does not fit, or none does.
    """
    check_kv_dtype(config)
    if config.pool_blocks:
        return config
    device = torch.device(config.device)
    block = block_bytes(config, shape, Parallel())
    if device.type == "cuda":
        steps = peak_of_steps(config, shape, model, length) if config.measured else 0
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        room = device_room(free, total, torch.cuda.memory_reserved(device), steps, block, config.limits)
    else:
        if (found := free_of_host()) is None:
            return _untold(config)
        room = host_room(found, held, block, config.limits)
    return _with_blocks(config, room, length)


def sized_for_ranks(
    config: EngineConfig, shape: ModelConfig, length: int, parallel: Parallel, local_ranks: int
) -> EngineConfig:
    """As ``sized``, for ranks that hold nothing yet and take pools of one size, ``local_ranks`` of them on this host.

    Weights are reckoned from the configuration; other ranks' GPUs are taken to be like this one.
    """
    check_kv_dtype(config)
    if config.pool_blocks:
        return config
    device = torch.device(config.device)
    block = block_bytes(config, shape, parallel)
    each = weight_bytes(shape, config.torch_dtype.itemsize) // parallel.ranks
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        room = device_room(free - each, total, each, 0, block, config.limits)
    else:
        if (found := free_of_host()) is None:
            return _untold(config)
        weights = each * local_ranks
        room = host_room(found - weights, weights, block, config.limits, local_ranks)
    return _with_blocks(config, room, length)


def check_kv_dtype(config: EngineConfig) -> None:
    """Raise ModelError for KV of a dtype that the device has not."""
    device = torch.device(config.device)
    if config.kv_name.startswith("fp8") and device.type == "cuda":
        found = torch.cuda.get_device_capability(device)
        if found < FP8_CAPABILITY:
            raise ModelError(
                f"KV in {config.kv_name} needs a GPU of compute capability 8.9 or later, and {device} has "
                f"{found[0]}.{found[1]}; say --kv-cache-dtype auto"
            )


def block_bytes(config: EngineConfig, shape: ModelConfig, parallel: Parallel) -> int:
    """Bytes of one block in the largest pool among the ranks."""
    cut = KvCut(parallel, shape.layers, shape.kv_heads)
    parts = [cut.part(rank) for rank in range(parallel.ranks)]
    rows = max(len(part.layers) * len(part.heads) for part in parts)
    return 2 * rows * config.block_size * shape.head_dim * config.kv_torch_dtype.itemsize


def _with_blocks(config: EngineConfig, room: Room, length: int) -> EngineConfig:
    wanted = None if config.measured else config.kv_tokens
    blocks = blocks_of_pool(wanted, room, config.block_size, config.limits.max_sequences * length)
    tokens = blocks * config.block_size
    if config.measured:
        held = blocks * room.block_bytes / GIB
        log.info("KV pool of %d tokens, %.2f GiB a rank of %.2f GiB that are free", tokens, held, room.free / GIB)
    if tokens < length:
        log.warning("the KV pool holds %d tokens, fewer than the %d of the longest request", tokens, length)
    return replace(config, pool_blocks=blocks)


def _untold(config: EngineConfig) -> EngineConfig:
    """A pool on a system that does not say what is free: a size that was asked for is taken at its word."""
    if config.measured:
        raise ModelError("this system does not say how much memory is free; give --kv-tokens a number")
    return config


# ── a host ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def free_of_host(root: Path = Path("/")) -> int | None:
    """Bytes that this process could still take without swapping, or its group's limit ending it; None: not told.

    ``root`` is where proc and sys are mounted.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError, IndexError):
        return None
    return max(0, min((available, *_left_in_groups(root))))


def _left_in_groups(root: Path) -> Iterator[int]:
    """What each limited control group above this process has left; page cache that it could drop counts as left."""
    names = (("memory.max", "memory.current", "inactive_file"),
             ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"))  # fmt: skip
    for folder in _groups(root):
        for limit_name, used_name, cache_name in names:
            limit, used = _number(folder / limit_name), _number(folder / used_name)
            if limit is not None and used is not None:
                yield limit - max(0, used - _in_table(folder / "memory.stat", cache_name))


def _groups(root: Path) -> Iterator[Path]:
    """Folders of the memory control groups this process is in, inner ones first, as far as they can be seen."""
    mount = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = mount / "memory" if controllers else mount
        folder = top / path.lstrip("/")
        yield from (f for f in (folder, *folder.parents) if f.is_relative_to(top))


def _number(file: Path) -> int | None:
    """The number in a file; None when there is none, as for a limit that is "max"."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _in_table(file: Path, key: str) -> int:
    """A value of a file of "key value" lines; 0 when it is not there."""
    try:
        return int(dict(line.split() for line in file.read_text().splitlines())[key])
    except (OSError, KeyError, ValueError):
        return 0


# ── a GPU ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def peak_of_steps(config: EngineConfig, shape: ModelConfig, model: Model, length: int) -> int:
    """Bytes beyond weights and pool at the peak of the largest steps: one full of prompts, a full batch of answers."""
    device = torch.device(config.device)
    pool = KvPool(1, shape.layers, shape.kv_heads, config.block_size, shape.head_dim, config.kv_torch_dtype, device)
    forward = TorchForward(model, pool, dtype=config.torch_dtype)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    for plan in largest_steps(config, length):
        with torch.inference_mode():
            logits = forward(plan)
            if logits is not None:
                choose_tokens(logits, plan.items)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def largest_steps(config: EngineConfig, length: int) -> tuple[StepPlan, StepPlan]:
    """A step of as many prompt tokens as one may have, and one of as many sequences; all of it in block 0."""
    limits, size = config.limits, config.block_size

    def item(name: int, tokens: int) -> StepItem:
        return StepItem(str(name), 0, (0,) * tokens, (0,) * -(-tokens // size), True, 0, Sampling(temperature=0.0))

    chunks = range(0, limits.max_batch_tokens, length)
    prompts = tuple(item(at, min(length, limits.max_batch_tokens - at)) for at in chunks)
    return StepPlan(1, prompts), StepPlan(2, tuple(item(n, 1) for n in range(limits.max_sequences)))
