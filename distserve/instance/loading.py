"""From an instance's options to what its engine is asked to be."""

from __future__ import annotations

from distserve.engine.config import EngineConfig
from distserve.engine.room import PoolLimits
from distserve.instance.options import InstanceOptions


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
