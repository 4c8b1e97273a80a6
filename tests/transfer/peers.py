"""Movers for tests: a pair in this process, and one in a process of its own that can be killed or stopped.

Run as a module it is that other process: it reads commands from its standard input, one JSON list a line, and writes
answers and events to its standard output.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash

from distserve.core.types import InstanceRef, Ticket
from distserve.engine.native import native_copies
from distserve.transfer import Mover, MoverEvent, TransferConfig
from distserve.transfer.ipc import LENT

ROOT = Path(__file__).resolve().parents[2]
LAYERS, KV_HEADS, HEAD_DIM = 3, 2, 8
WAIT_S = 60.0


def make_pool(seed: int, blocks: int, block_size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A pool of random bytes: every bit pattern, not only those of numbers."""
    shape = (blocks, LAYERS, 2, KV_HEADS, block_size, HEAD_DIM)
    words = torch.empty(shape, dtype=dtype).view(torch.uint8).numel()
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (words,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)


def shuffled(seed: int, tokens: int, blocks: int, block_size: int) -> tuple[int, ...]:
    """A block table for ``tokens``, in some adjacent runs and some not."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(blocks, generator=generator).tolist()
    return tuple(sorted(order[: (need := -(-tokens // block_size)) // 2]) + order[need // 2 : need])


def copy_tokens(
    source: torch.Tensor, here: tuple[int, ...], target: torch.Tensor, there: tuple[int, ...], start: int, end: int
) -> None:
    """What a move must do, token by token."""
    size, other = source.shape[4], target.shape[4]
    for at in range(start, end):
        target.view(torch.uint8)[there[at // other], :, :, :, at % other] = source.view(torch.uint8)[
            here[at // size], :, :, :, at % size
        ]


def digest(pool: torch.Tensor) -> str:
    return str(xxhash.xxh3_64_hexdigest(pool.cpu().view(torch.uint8).numpy().data))


def make_ticket(
    number: int, source: InstanceRef, destination: InstanceRef, total: int, have: int = 0, fingerprint: str = "model"
) -> Ticket:
    nonce = 7 * number + 1
    return Ticket(
        f"move-{number}", f"request-{number}", 1 << 16, source, destination, fingerprint, nonce, have, total, 30.0
    )


@dataclass
class Local:
    """A mover of this process with its pool, and its events in order."""

    ref: InstanceRef
    pool: torch.Tensor
    kind: str = "auto"
    config: TransferConfig = field(default_factory=TransferConfig)
    fingerprint: str = "model"
    mover: Mover = field(init=False)
    events: queue.Queue[MoverEvent] = field(init=False, default_factory=queue.Queue)

    def __post_init__(self) -> None:
        self.mover = Mover(
            self.ref,
            self.pool,
            self.pool.shape[4],
            fingerprint=self.fingerprint,
            report=self.events.put,
            kind=self.kind,
            config=self.config,
            native=native_copies("auto"),
        )

    def event(self) -> MoverEvent:
        return self.events.get(timeout=WAIT_S)

    def close(self) -> None:
        self.mover.close()


class Remote:
    """A mover in a process of its own. ``close`` ends the process whatever state it is in."""

    def __init__(
        self,
        ref: InstanceRef,
        seed: int,
        blocks: int,
        block_size: int,
        kind: str,
        config: dict[str, Any] | None = None,
        device: str = "cpu",
    ) -> None:
        self._setup = (seed, blocks, block_size, kind, config or {}, device)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.transfer.peers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=environment,
            text=True,
        )
        self.events: queue.Queue[dict[str, Any]] = queue.Queue()
        self._answers: queue.Queue[Any] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.restart(ref)

    def restart(self, ref: InstanceRef) -> None:
        """A new mover over a fresh pool in the same process; the one before it, if any, is closed."""
        self.ref = ref
        self.address = str(self.ask("start", ref.id, ref.incarnation, *self._setup))
        while not self.events.empty():
            self.events.get()

    def ask(self, *command: Any) -> Any:
        """Send a command and wait for its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self._answers.get(timeout=WAIT_S)

    def open_ticket(self, ticket: Ticket, blocks: tuple[int, ...]) -> None:
        self.ask("open", asdict(ticket), blocks)

    def send_stage(
        self, ticket: Ticket, address: str, start: int, end: int, blocks: tuple[int, ...], final: bool
    ) -> None:
        self.ask("send", asdict(ticket), address, start, end, blocks, final)

    def digest(self) -> str:
        return str(self.ask("digest"))

    def event(self) -> dict[str, Any]:
        return self.events.get(timeout=WAIT_S)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(WAIT_S)

    def stop(self) -> None:
        """Stop the process where it is; returns when it stands still."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitpid(self.process.pid, os.WUNTRACED)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        if self.process.poll() is None:
            self.go_on()
            assert self.process.stdin is not None
            self.process.stdin.close()
            try:
                self.process.wait(WAIT_S)
            except subprocess.TimeoutExpired:
                self.kill()
        self._reader.join(WAIT_S)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            message = json.loads(line)
            (self.events if "event" in message else self._answers).put(
                message if "event" in message else message["answer"]
            )


def ticket_from(fields: dict[str, Any]) -> Ticket:
    return Ticket(
        **(fields | {"source": InstanceRef(**fields["source"]), "destination": InstanceRef(**fields["destination"])})
    )


class _Other:
    """The other process: one mover, told what to do line by line."""

    def __init__(self) -> None:
        self._out = threading.Lock()
        self.mover: Mover | None = None
        self.pool = torch.empty(0)

    def say(self, message: dict[str, Any]) -> None:
        with self._out:
            print(json.dumps(message), flush=True)

    def report(self, event: MoverEvent) -> None:
        self.say({"event": type(event).__name__} | asdict(event))

    def start(
        self,
        name: str,
        incarnation: int,
        seed: int,
        blocks: int,
        block_size: int,
        kind: str,
        config: dict[str, Any],
        device: str,
    ) -> str:
        if self.mover is not None:
            self.mover.close()
        self.pool = make_pool(seed, blocks, block_size).to(device)
        self.mover = Mover(
            InstanceRef(name, incarnation),
            self.pool,
            block_size,
            fingerprint="model",
            report=self.report,
            kind=kind,
            config=TransferConfig(**config),
        )
        return self.mover.address

    def open(self, fields: dict[str, Any], blocks: list[int]) -> None:
        assert self.mover is not None
        self.mover.open_ticket(ticket_from(fields), tuple(blocks))

    def send(self, fields: dict[str, Any], address: str, start: int, end: int, blocks: list[int], final: bool) -> None:
        assert self.mover is not None
        self.mover.send_stage(ticket_from(fields), address, start, end, tuple(blocks), final)

    def digest(self) -> str:
        return digest(self.pool)

    def bytes(self) -> str:
        """The whole pool, in hexadecimal."""
        return bytes(self.pool.cpu().view(torch.uint8).numpy()).hex()

    def close_ticket(self, move_id: str) -> None:
        assert self.mover is not None
        self.mover.close_ticket(move_id)

    def counts(self) -> dict[str, int]:
        assert self.mover is not None
        return self.mover.counts()

    def lent(self) -> int:
        """Lanes whose device memory is still mapped by others."""
        LENT.sweep()
        return len(LENT)

    def cpu(self) -> float:
        return time.process_time()

    def close_mover(self) -> list[str]:
        """Close, and name what is left of it: threads and shared memory."""
        assert self.mover is not None
        self.mover.close()
        with open("/proc/self/maps") as maps:
            memory = sorted({line.split()[-1] for line in maps if "distserve" in line and "memfd" in line})
        return [t.name for t in threading.enumerate() if t.name.startswith("kv-")] + memory

    def run(self) -> None:
        for line in sys.stdin:
            command, *arguments = json.loads(line)
            self.say({"answer": getattr(self, command)(*arguments)})
        if self.mover is not None:
            self.mover.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    _Other().run()
