"""How large a KV pool may be: arithmetic over bytes that somebody else measured. Reads nothing, allocates nothing.

An automatic pool takes a part of what is free beside the weights, and no more than the sequences of a full batch can
fill. One whose size was asked for is taken at its word, or refused when it does not fit.
"""

from __future__ import annotations

from dataclasses import dataclass

from distserve.models.config import ModelConfig
from distserve.models.errors import ModelError

HOST_FRACTION, DEVICE_FRACTION = 0.5, 0.9
"""Of free memory, for an automatic pool. A host also holds page cache, staging and other programs; a GPU is ours."""

HOST_MOST_BYTES = 4 << 30
"""For an automatic pool on a CPU: a decode step reads all of its KV, and more than this takes over 0.1 s to read."""

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """What an instance may take, and how much of it can be of use. Zeros: no limit, or the device's usual."""

    fraction: float = 0.0  # of free memory, for an automatic pool; 0: by device
    memory_bytes: int = 0  # of the host, for weights and KV of all ranks on it; 0: all that is free
    share: float = 1.0  # of a GPU's whole memory, where instances share it
    max_sequences: int = 64  # in a batch
    max_batch_tokens: int = 2048  # of one step

    def __post_init__(self) -> None:
        if not 0 <= self.fraction <= 1 or not 0 < self.share <= 1:
            raise ModelError(f"of free memory a pool takes a part between 0 and 1, not {self.fraction} of {self.share}")


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes for the pool of the tightest rank: what one can take at most, and what an automatic one takes."""

    free: int
    budget: int
    block_bytes: int


def host_room(free: int, weights: int, block_bytes: int, limits: PoolLimits, ranks: int = 1) -> Room:
    """On a CPU: ``free`` bytes of the host now, beside ``weights`` that its ``ranks`` hold of the instance."""
    left = min(free, limits.memory_bytes - weights) if limits.memory_bytes else free
    left = max(0, left) // ranks
    return Room(left, min(int(left * (limits.fraction or HOST_FRACTION)), HOST_MOST_BYTES // ranks), block_bytes)


def device_room(free: int, total: int, held: int, activations: int, block_bytes: int, limits: PoolLimits) -> Room:
    """On a GPU: ``free`` of ``total`` bytes now, of which a step needs ``activations``; we hold ``held`` already.

    A share is of the total, so that instances that start together, or again, need not know of each other.
    """
    fraction = limits.fraction or DEVICE_FRACTION
    ours = total * fraction * limits.share - held
    return Room(max(0, free - activations), max(0, int(min(free * fraction, ours)) - activations), block_bytes)


def blocks_of_pool(wanted_tokens: int | None, room: Room, block_size: int, useful_tokens: int) -> int:
    """Blocks of a pool for ``wanted_tokens``, or (None) of one that fits. ModelError with a sentence when none does."""
    fits = room.free // room.block_bytes
    if wanted_tokens is None:
        blocks = min(room.budget // room.block_bytes, -(-useful_tokens // block_size))
        if blocks < 1:
            raise ModelError(
                f"{room.free / GIB:.2f} GiB are free beside the weights, of which {room.budget / GIB:.2f} GiB may hold "
                f"KV: not one block of {block_size} tokens; free some memory, or raise --kv-memory-fraction"
            )
        return blocks
    blocks = -(-wanted_tokens // block_size)
    if blocks > fits:
        nearest = f"--kv-tokens {fits * block_size} fits" if fits else "not one block fits"
        raise ModelError(
            f"a KV pool of {wanted_tokens} tokens needs {blocks * room.block_bytes / GIB:.2f} GiB, but "
            f"{room.free / GIB:.2f} GiB are free beside the weights; {nearest}, or say --kv-tokens auto"
        )
    return blocks


def weight_bytes(shape: ModelConfig, element_bytes: int) -> int:
    """About the bytes of a model's weights, from its configuration: its matrices, without biases and norms."""
    gates = 2 if shape.rope is not None else 1
    heads = (2 * shape.heads + 2 * shape.kv_heads) * shape.head_dim
    layer = shape.hidden * (heads + (gates + 1) * shape.intermediate)
    vocabulary = shape.vocab_size * shape.hidden * (1 if shape.tied else 2)
    positions = 0 if shape.rope is not None else shape.max_positions * shape.hidden
    return (shape.layers * layer + vocabulary + positions) * element_bytes
