"""From an instance's options to what its engine and its machine are asked to be."""

from __future__ import annotations

from dataclasses import replace

from distserve.engine.config import EngineConfig
from distserve.engine.room import PoolLimits
from distserve.instance.options import InstanceOptions
from distserve.sched.config import InstanceConfig


def engine_config(options: InstanceOptions) -> EngineConfig:
    """Raises ModelError for a dtype or a share that no engine has."""
    return EngineConfig(
        model=options.model,
        name=options.model_name,
        dtype=options.dtype,
        kv_dtype=options.kv_cache_dtype,
        device=options.device,
        kernels=options.kernels,
        cuda_graphs=options.cuda_graphs,
        threads=options.threads,
        steps_in_flight=steps_in_flight(options),
        kv_tokens=options.kv_tokens or 0,
        measured=options.kv_tokens is None,
        limits=PoolLimits(
            fraction=options.kv_memory_fraction or 0.0,
            memory_bytes=options.memory_bytes or 0,
            share=options.memory_share,
            max_sequences=options.machine.max_sequences,
            max_batch_tokens=options.machine.max_batch_tokens,
        ),
        block_size=options.block_size,
        max_model_len=options.max_model_len or 0,
    )


def steps_in_flight(options: InstanceOptions) -> int:
    """As asked; else as many as keep the device busy: one for each stage, two on a GPU, for the host's sake.

    A CPU of one rank has nothing to gain: whoever would plan the next step takes its cores from the one that runs.
    """
    if options.steps_in_flight is not None:
        return options.steps_in_flight
    if options.tp * options.pp > 1:
        return options.pp
    return 2 if options.device.startswith("cuda") else 1


def machine_config(options: InstanceOptions) -> InstanceConfig:
    """Steps follow one another within one rank; over several ranks those in flight are disjoint."""
    count = steps_in_flight(options)
    return replace(options.machine, steps_in_flight=count, follow_up=count > 1 and options.tp * options.pp == 1)
