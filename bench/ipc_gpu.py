"""How fast KV moves between two processes over one GPU: the device-memory lane (CUDA IPC) and, beside it, shared memory
of the host, with checksums and without. Run by ``kernels_gpu.py``; knows no command.

A hand-off is timed from ``send_stage`` to the word that the destination has verified and stored it. Its share of the
copy rate is that of one plain copy of the same bytes within the device, which a hand-off makes three times (gather,
across, scatter), with a checksum at either end. As a program it is the destination: ``python bench/ipc_gpu.py KIND …``.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from gpu_common import Shapes, median

from distserve.core.types import InstanceRef, Ticket
from distserve.transfer import Mover, MoverEvent, StageSent, TransferConfig

SOURCE, TARGET = InstanceRef("source", 1), InstanceRef("target", 1)
WAIT_S = 60.0
REPEATS = 12


@dataclass(frozen=True, slots=True)
class Moved:
    """One way, measured."""

    kind: str
    checksum: bool
    nbytes: int
    seconds: float
    bytes_per_s: float
    share: float  # of a plain copy's rate within the device


def measure(shapes: Shapes, copy_rate: float) -> list[dict[str, Any]]:
    """Every way; prints a line for each."""
    found = []
    for kind in ("shm",) if shapes.dry else ("ipc", "shm"):
        for checksum in (True, False):
            one = hand_off(shapes, kind, checksum, copy_rate)
            found.append(asdict(one))
            said = f"{kind}{' + checksum' if checksum else ''}"
            print(
                f"KV between two processes, {said:16} {one.nbytes / 2**20:8.1f} MiB {one.seconds * 1e3:8.2f} ms "
                f"{one.bytes_per_s / 1e9:8.1f} GB/s {one.share:6.1%} of a device's own copy",
                flush=True,
            )
    return found


def pool_of(shape: list[int], dtype: str, device: str) -> torch.Tensor:
    return torch.zeros(shape, dtype=getattr(torch, dtype), device=device)


def hand_off(shapes: Shapes, kind: str, checksum: bool, copy_rate: float) -> Moved:
    """The median of ``REPEATS`` moves of the whole pool over one link."""
    shape = [shapes.moved_blocks, shapes.layers, 2, shapes.kv_heads, shapes.size, shapes.dim]
    dtype, tokens = str(shapes.dtype).removeprefix("torch."), shapes.moved_blocks * shapes.size
    pool = pool_of(shape, dtype, shapes.device)
    pool.normal_()
    if pool.is_cuda:
        torch.cuda.current_stream().synchronize()  # what is sent must be final
    events: queue.Queue[MoverEvent] = queue.Queue()
    mover = Mover(
        SOURCE, pool, shapes.size, fingerprint="bench", report=events.put, kind=kind,
        config=TransferConfig(checksum=checksum),
    )  # fmt: skip
    asked = [sys.executable, __file__, kind, dtype, shapes.device, str(int(checksum)), *map(str, shape)]
    with subprocess.Popen(asked, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None and other.stdout is not None
        try:
            address, times = other.stdout.readline().strip(), []
            for number in range(2 if shapes.dry else REPEATS):
                ticket = Ticket(f"m{number}", "r", 1, SOURCE, TARGET, "bench", number + 1, 0, tokens, 60.0)
                other.stdin.write(json.dumps([number, tokens]) + "\n")
                other.stdin.flush()
                other.stdout.readline()  # the ticket is open
                began = time.perf_counter()
                mover.send_stage(ticket, address, 0, tokens, tuple(range(shape[0])), True)
                event = events.get(timeout=WAIT_S)
                times.append(time.perf_counter() - began)
                if not isinstance(event, StageSent):
                    raise SystemExit(f"ipc_gpu: a move over {kind} failed: {event}")
        finally:
            mover.close()
            other.stdin.close()
    seconds = median(times[1:])  # the first opens the link
    return Moved(kind, checksum, pool.nbytes, seconds, pool.nbytes / seconds, 2 * pool.nbytes / seconds / copy_rate)


def destination(kind: str, dtype: str, device: str, checksum: str, *shape: str) -> None:
    """Open a ticket for each line that comes in; end with the input."""
    sizes = [int(each) for each in shape]
    mover = Mover(
        TARGET, pool_of(sizes, dtype, device), sizes[4], fingerprint="bench", report=lambda event: None, kind=kind,
        config=TransferConfig(checksum=bool(int(checksum))),
    )  # fmt: skip
    print(mover.address, flush=True)
    for line in sys.stdin:
        number, tokens = json.loads(line)
        mover.close_ticket(f"m{number - 1}")
        ticket = Ticket(f"m{number}", "r", 1, SOURCE, TARGET, "bench", number + 1, 0, tokens, 60.0)
        mover.open_ticket(ticket, tuple(range(sizes[0])))
        print("open", flush=True)
    mover.close()


if __name__ == "__main__":
    destination(*sys.argv[1:])
