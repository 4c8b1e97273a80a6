"""The calls of CUDA's driver, against a library that stands in for it: every argument arrives as C expects it, in every
thread, and every refusal becomes a sentence. What a real driver makes of them only a GPU shows (``test_ipc``).
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from distserve.transfer import device_memory
from distserve.transfer.device_memory import GRANULE, HANDLE_BYTES, CudaMemory
from distserve.transfer.errors import LaneFailed

COMPILER = shutil.which("g++")
STUB = Path(__file__).with_name("driver_stub.cpp")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if COMPILER is None:
        pytest.skip("no compiler to make the stand-in with")
    made = tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", str(made), str(STUB)], check=True)
    return made


@dataclass
class Stream:
    """What the code needs of torch's."""

    cuda_stream: int = 41
    waits: list[str] = field(default_factory=list)

    def synchronize(self) -> None:
        self.waits.append("waited")


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Stream:
    found = Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: found)
    return found


@pytest.fixture
def driver(library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    real = ctypes.CDLL(str(library))
    monkeypatch.setattr(device_memory.ctypes, "CDLL", lambda name: {"libcuda.so.1": real}[name])
    device_memory._driver.cache_clear()
    yield real
    device_memory._driver.cache_clear()


def test_memory_is_shared_filled_and_given_back(driver: ctypes.CDLL, stream: Stream) -> None:
    memory = CudaMemory(3)
    address = memory.allocate(5)
    assert memory.extent(address) == GRANULE and memory.extent(address + 4096) == GRANULE - 4096
    handle = memory.export(address)
    assert len(handle) == HANDLE_BYTES and handle[:4] == bytes((0, 1, 2, 0)), "zeros within it, too"
    assert memory.map(handle) == address and driver.state(0) == 1
    memory.write(address, b"a\0b" * 5)
    memory.copy(address + 100, torch.arange(20, dtype=torch.uint8), 7)
    assert memory.read(address, 6) == b"a\0ba\0b" and memory.read(address + 100, 8) == bytes((*range(7), 0))
    assert len(stream.waits) == 4 and driver.state(2) == 41, "each copy on the thread's stream, and waited for"
    memory.unmap(address)
    assert driver.state(0) == 0
    memory.free(address)


def test_any_thread_may_call(driver: ctypes.CDLL, stream: Stream) -> None:
    """The context is a thread's own affair: it is made current before every call."""
    memory, found = CudaMemory(3), []
    thread = threading.Thread(target=lambda: found.append(memory.allocate(100)))
    thread.start()
    thread.join()
    memory.free(found[0])


def test_addresses_of_others_are_measured_by_their_attributes(driver: ctypes.CDLL) -> None:
    memory = CudaMemory(3)
    address = memory.allocate(10)
    assert memory.extent(16) == 77
    memory.free(address)


def test_pages_of_the_host_are_locked_and_unlocked(driver: ctypes.CDLL) -> None:
    memory = CudaMemory(3)
    memory.lock_pages(1 << 40, 12_345)
    assert driver.state(1) == 12_345
    memory.unlock_pages(1 << 40)
    assert driver.state(1) == 0


def test_refusals_are_sentences(driver: ctypes.CDLL, stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = CudaMemory(3)
    with pytest.raises(LaneFailed, match="answered cuMemAlloc_v2 with CUDA_ERROR_OUT_OF_MEMORY"):
        memory.allocate(1 << 50)
    with pytest.raises(LaneFailed, match="answered cuIpcOpenMemHandle_v2 with 400"):
        memory.map(bytes(HANDLE_BYTES))
    with pytest.raises(LaneFailed, match="63 bytes, not 64"):
        memory.map(bytes(63))
    with pytest.raises(LaneFailed, match="cuDeviceGet with 101"):
        CudaMemory(4)

    def broken() -> None:
        raise RuntimeError("an illegal address\nand more")

    monkeypatch.setattr(stream, "synchronize", broken)
    address = memory.allocate(10)
    with pytest.raises(LaneFailed, match=r"a copy of device memory failed: an illegal address$"):
        memory.write(address, b"x")
    memory.free(address)


def test_a_machine_without_a_driver_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> ctypes.CDLL:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(device_memory.ctypes, "CDLL", missing)
    device_memory._driver.cache_clear()
    with pytest.raises(LaneFailed, match=r"CUDA's driver cannot be used: libcuda.so.1"):
        CudaMemory(0)
    device_memory._driver.cache_clear()
