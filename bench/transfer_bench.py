"""How fast KV moves between two processes of this machine, against the machine's own limits, side by side in one run.

The KV of one prompt (SmolLM2-135M's shape) goes from the pool of this process to that of a second one, through the
whole data plane: gather, checksum, lane, verification, scatter, events. Beside it, in turns and over the same bytes: a
plain copy in memory, and a bare gloo send/recv between the same two processes. Ratios are of medians; wall time alone
says little on a shared machine.

    python bench/transfer_bench.py --out bench/results/transfer.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import queue
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from distserve.core.types import InstanceRef, Ticket
from distserve.transfer import Mover, StageSent, TransferConfig

LAYERS, KV_HEADS, HEAD_DIM, BLOCK = 30, 3, 64, 16
SOURCE, DESTINATION = InstanceRef("source", 1), InstanceRef("destination", 1)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def block_table(tokens: int, fragmented: bool, block: int = BLOCK) -> tuple[int, ...]:
    """A table of adjacent blocks, or one without any two adjacent ones."""
    count = -(-tokens // block)
    return tuple(range(0, 2 * count, 2)) if fragmented else tuple(range(count))


def make_pool(tokens: int, dtype: torch.dtype, block: int = BLOCK) -> torch.Tensor:
    blocks = 2 * -(-tokens // block)
    pool = torch.empty(blocks, LAYERS, 2, KV_HEADS, block, HEAD_DIM, dtype=dtype)
    pool.view(torch.uint8).fill_(7)  # every page is there before anything is timed
    return pool


def ticket(number: int, tokens: int) -> Ticket:
    return Ticket(f"m{number}", "r", 1 << 16, SOURCE, DESTINATION, "model", number, 0, tokens, 60.0)


def bare_group(rank: int, port: int) -> tuple[Any, dist.Store]:
    """A plain two-rank gloo group, as anybody would make it."""
    timeout = timedelta(seconds=60)
    store = dist.TCPStore("127.0.0.1", port, is_master=rank == 0, timeout=timeout, wait_for_workers=False)
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # missing in torch's stubs
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout = timeout
    return dist.ProcessGroupGloo(store, rank, 2, options), store


def serve(pipe: Connection) -> None:
    """The second process: does what the first one says, one command at a time."""
    torch.set_num_threads(1)
    mover: Mover | None = None
    group: Any = None
    pool = torch.empty(0)
    while True:
        match pipe.recv():
            case ("mover", dtype, tokens, block, kind, config):
                if mover is not None:
                    mover.close()
                pool = make_pool(tokens, DTYPES[dtype], block)
                mover = Mover(
                    DESTINATION, pool, block, fingerprint="model", report=lambda event: None, kind=kind, config=config
                )
                pipe.send(mover.address)
            case ("open", one, blocks):
                assert mover is not None
                mover.open_ticket(one, blocks)
                pipe.send(None)
            case ("group", port):
                group, _store = bare_group(1, port)
            case ("receive", nbytes):
                flat = pool.view(torch.uint8).view(-1)[:nbytes]
                pipe.send(None)
                group.recv([flat], 0, 0).wait()
                pipe.send(None)
            case _:
                if mover is not None:
                    mover.close()
                return


class Case:
    """One way of moving the prompt's KV: a pair of movers, timed from ``send_stage`` to ``StageSent``."""

    def __init__(
        self, pipe: Connection, dtype: str, tokens: int, kind: str, config: TransferConfig, fragmented: bool, block: int
    ) -> None:
        self._pipe = pipe
        self._tokens = tokens
        self._events: queue.Queue[Any] = queue.Queue()
        self._pool = make_pool(tokens, DTYPES[dtype])
        self._mover = Mover(
            SOURCE, self._pool, BLOCK, fingerprint="model", report=self._events.put, kind=kind, config=config
        )
        pipe.send(("mover", dtype, tokens, block, kind, config))
        self._address = pipe.recv()
        self._here = block_table(tokens, fragmented)
        self._there = block_table(tokens, fragmented, block)
        self._number = 0

    def once(self) -> tuple[float, int]:
        """Seconds and bytes of one hand-off."""
        self._number += 1
        one = ticket(self._number, self._tokens)
        self._pipe.send(("open", one, self._there))
        self._pipe.recv()
        began = time.perf_counter()
        self._mover.send_stage(one, self._address, 0, self._tokens, self._here, True)
        event = self._events.get(timeout=60)
        seconds = time.perf_counter() - began
        assert isinstance(event, StageSent), event
        return seconds, event.nbytes

    def seconds(self) -> float:
        return self.once()[0]

    def close(self) -> None:
        self._mover.close()


def bare_gloo(pipe: Connection, group: Any, data: torch.Tensor) -> float:
    """Seconds of one send/recv of ``data``, until the receiver has it all."""
    pipe.send(("receive", data.numel()))
    pipe.recv()
    began = time.perf_counter()
    group.send([data], 1, 0).wait()
    pipe.recv()
    return time.perf_counter() - began


def timed(act: Callable[[], Any]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def summary(seconds: list[float], nbytes: int) -> dict[str, float]:
    rates = sorted(nbytes / s / 1e9 for s in seconds)
    return {
        "median_ms": round(statistics.median(seconds) * 1e3, 3),
        "best_ms": round(min(seconds) * 1e3, 3),
        "median_gb_s": round(statistics.median(rates), 3),
        "best_gb_s": round(rates[-1], 3),
    }


class Neighbours:
    """How many cores everybody else on this machine used, from here to ``cores``. Linux; elsewhere unknown."""

    def __init__(self, *pids: int) -> None:
        self._pids = pids
        self._at = self._now()

    def cores(self) -> float | None:
        if self._at is None or (now := self._now()) is None:
            return None
        all_, ours, wall = (b - a for a, b in zip(self._at, now, strict=True))
        return round(max(0.0, (all_ - ours) / wall), 2)

    def _now(self) -> tuple[float, float, float] | None:
        tick = os.sysconf("SC_CLK_TCK")
        try:
            user, nice, system, _idle, _wait, irq, soft = map(int, Path("/proc/stat").read_text().split()[1:8])
            ours = [Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13] for pid in self._pids]
        except FileNotFoundError:
            return None
        used = sum(int(part) for parts in ours for part in parts)
        return (user + nice + system + irq + soft) / tick, used / tick, time.monotonic()


def measure(pipe: Connection, group: Any, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    """All cases of one dtype, in turns, so that each sees the same neighbours."""
    rows: dict[str, list[float]] = {}
    nbytes = 0
    for kind in ("shm", "gloo"):
        for checksum in (True, False):
            config = replace(args.config, checksum=checksum)
            case = Case(pipe, dtype, args.tokens, kind, config, args.fragmented, args.destination_block_size)
            nbytes = case.once()[1]  # opens the link
            source, target = (np.ones(nbytes, np.uint8) for _ in range(2))
            data, copy = torch.from_numpy(source), torch.from_numpy(target)
            acts: dict[str, Callable[[], float]] = {
                f"{kind}{'' if checksum else ' without checksum'}": case.seconds,
                "copy (numpy)": partial(timed, partial(np.copyto, target, source)),
                "copy (torch)": partial(timed, partial(copy.copy_, data)),
                "bare gloo": partial(bare_gloo, pipe, group, data),
            }
            for _ in range(args.repeats):
                for name, act in acts.items():
                    rows.setdefault(name, []).append(act())
            case.close()
    return judged({name: summary(seconds, nbytes) for name, seconds in rows.items()}, nbytes)


def judged(rows: dict[str, dict[str, float]], nbytes: int) -> dict[str, Any]:
    """The rows with the ratios that the goals speak of."""
    copy = max(rows["copy (numpy)"]["median_gb_s"], rows["copy (torch)"]["median_gb_s"])
    ratios = {
        "shm / copy": rows["shm"]["median_gb_s"] / copy,
        "gloo / bare gloo": rows["gloo"]["median_gb_s"] / rows["bare gloo"]["median_gb_s"],
        "checksum share, shm": 1 - rows["shm without checksum"]["median_ms"] / rows["shm"]["median_ms"],
        "checksum share, gloo": 1 - rows["gloo without checksum"]["median_ms"] / rows["gloo"]["median_ms"],
    }
    return {"nbytes": nbytes, "rows": rows, "ratios": {name: round(value, 3) for name, value in ratios.items()}}


def show(dtype: str, result: dict[str, Any]) -> None:
    print(f"\n{dtype}: {result['nbytes'] / 1e6:.1f} MB; others used {result['others_cores']} cores meanwhile")
    print(f"{'':24}{'median ms':>11}{'best ms':>10}{'median GB/s':>13}{'best GB/s':>11}")
    for name, row in sorted(result["rows"].items()):
        print(
            f"{name:24}{row['median_ms']:11.2f}{row['best_ms']:10.2f}{row['median_gb_s']:13.2f}{row['best_gb_s']:11.2f}"
        )
    for name, value in result["ratios"].items():
        print(f"  {name:24}{value:7.1%}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = TransferConfig()
    parser.add_argument("--tokens", type=int, default=900)
    parser.add_argument("--repeats", type=int, default=15, help="hand-offs a case")
    parser.add_argument("--dtypes", nargs="+", choices=[*DTYPES], default=[*DTYPES])
    for name in ("shm_piece_bytes", "shm_slots", "group_piece_bytes", "group_slots"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(default, name))
    parser.add_argument("--fragmented", action="store_true", help="no two blocks are adjacent")
    parser.add_argument("--destination-block-size", type=int, default=BLOCK)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    args = parser.parse_args()
    args.config = TransferConfig(
        shm_piece_bytes=args.shm_piece_bytes,
        shm_slots=args.shm_slots,
        group_piece_bytes=args.group_piece_bytes,
        group_slots=args.group_slots,
    )
    return args


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    here, there = multiprocessing.get_context("spawn").Pipe()
    child = multiprocessing.get_context("spawn").Process(target=serve, args=(there,), daemon=True)
    child.start()
    port = 20000 + os.getpid() % 20000
    here.send(("group", port))
    group, _store = bare_group(0, port)
    results: dict[str, Any] = {}
    for dtype in args.dtypes:
        assert child.pid is not None
        neighbours = Neighbours(os.getpid(), child.pid)
        results[dtype] = measure(here, group, dtype, args) | {"others_cores": neighbours.cores()}
        show(dtype, results[dtype])
    here.send(("end",))
    child.join(10)
    if args.out:
        settings = {k: v for k, v in vars(args).items() if k not in ("out", "config")}
        report = {
            "kind": "measured",
            "command": shlex.join(["python", *sys.argv]),
            "machine": {"cpus": os.cpu_count(), "processor": platform.processor() or platform.machine()},
            "load_average": os.getloadavg(),
            "settings": settings,
            "results": results,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
