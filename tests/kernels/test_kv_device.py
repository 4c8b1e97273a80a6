"""Whole blocks between a pool and staging by a device's kernels, and their checksum: Triton's (in its interpreter where
there is no GPU) and the reference in torch make the same bytes and the same sum, so that the ends of a link may differ.
"""

from __future__ import annotations

import pytest
import torch

from distserve_kernels import kv_device, kv_part
from distserve_kernels import paged_reference as reference
from distserve_kernels.checksum import digest
from distserve_kernels.kv_copy import PagedBytes
from distserve_kernels.kv_device import DeviceCopies, device_sum
from distserve_kernels.kv_window import PagedWindow
from distserve_kernels.paged_ops import PAGED_REFERENCE, PagedOps, triton_paged_ops
from distserve_kernels.streams import own_stream, settle
from tests.kernels.interpreted import DEVICE, modules, random

LAYERS, HEADS, SIZE, DIM = 3, 4, 4, 8
OPS = {"triton": triton_paged_ops(), "torch": PAGED_REFERENCE}
SEED = 0xFEDCBA9876543210


def pool(seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return random(9, LAYERS, 2, HEADS, SIZE, DIM, dtype=dtype, seed=seed)


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS.keys())
@pytest.mark.parametrize(("layers", "heads"), [(range(3), range(4)), (range(1, 3), range(2, 4)), (range(1), range(1))])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_gathered_and_scattered_blocks_are_those_of_the_host(
    ops: PagedOps, layers: range, heads: range, dtype: torch.dtype
) -> None:
    source, target = pool(1, dtype), pool(2, dtype)
    host = PagedWindow(source.cpu(), layers, heads)
    wanted = torch.zeros(3 * host.block_bytes, dtype=torch.uint8)
    host.gather((7, 0, 3), wanted.numpy())
    copies = DeviceCopies(source, layers, heads, ops)
    staged = torch.zeros(3 * host.block_bytes + 64, dtype=torch.uint8, device=DEVICE)
    assert copies.gather((7, 0, 3), staged, None) == 0
    assert torch.equal(staged[:-64].cpu(), wanted) and not staged[-64:].any()
    words = wanted.view(torch.int32)
    found = copies.gather((7, 0, 3), staged, SEED)
    assert found == (int(reference.staging_checksum(words).item()) & (1 << 64) - 1) ^ SEED
    copies_back = DeviceCopies(target, layers, heads, ops)
    copies_back.scatter((2, 8, 5), staged)
    settle(target.device)
    other = pool(2, dtype).cpu()
    PagedWindow(other, layers, heads).scatter((2, 8, 5), wanted.numpy(), SIZE, 0, 0, 3 * SIZE)
    assert torch.equal(target.cpu().view(torch.uint8), other.view(torch.uint8))
    with pytest.raises(ValueError, match="do not fit staging"):
        copies.gather(tuple(range(9)), staged, None)


def test_runs_that_are_no_words_are_left_to_others() -> None:
    odd = random(4, 1, 2, 3, 1, 3, dtype=torch.bfloat16)  # 6 bytes a head
    assert DeviceCopies.fitting(odd, range(1), range(1)) is None
    assert DeviceCopies.fitting(odd, range(1), range(3)) is None
    assert DeviceCopies.fitting(pool(1), range(1), range(1, 2)) is not None


@pytest.mark.parametrize("words", [0, 1, 5, 4096, 9001])
def test_the_sum_alone_is_the_one_on_the_way(words: int) -> None:
    data = torch.randint(0, 256, (4 * words,), dtype=torch.uint8, generator=torch.Generator().manual_seed(words))
    wanted = reference.staging_checksum(data)
    assert torch.equal(modules["kv_move"].staging_checksum(data.to(DEVICE)).cpu(), wanted)


@pytest.mark.parametrize(("first", "count"), [(0, 13), (1, 12), (3, 7), (4, 8)])
def test_odd_ends_and_beginnings_are_summed_too(first: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_device, "device_ops", lambda device: OPS["triton"])
    data = torch.arange(1, 30, dtype=torch.uint8, device=DEVICE)
    plain = data[first : first + count].clone().cpu()
    padded = torch.nn.functional.pad(plain, (0, -count % 4))
    assert torch.equal(device_sum(data[first : first + count]).cpu(), reference.staging_checksum(padded))


def test_a_part_on_a_device_takes_its_kernels_for_whole_blocks_and_torch_for_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a part of a pool on a device chooses; here staging merely counts as a device's."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(kv_part, "_on_device", lambda staged: isinstance(staged, torch.Tensor))
    source, target = pool(1), pool(2)
    wanted = target.clone()
    one, two = PagedBytes(source), PagedBytes(target)
    for part, memory in ((one, source), (two, target)):
        part._copies = DeviceCopies(memory, range(LAYERS), range(HEADS), OPS["triton"])
    staged = torch.zeros(3 * one.block_bytes, dtype=torch.uint8, device=DEVICE)
    one.gather((7, 0, 3), staged)
    two.scatter((2, 8, 5), staged, SIZE, 0, 0, 3 * SIZE)
    for here, there in zip((7, 0, 3), (2, 8, 5), strict=True):
        wanted[there] = source[here]
    assert torch.equal(target, wanted)


def test_a_cpu_has_no_streams() -> None:
    with own_stream(torch.device("cpu")) as nothing:
        assert nothing is None
    settle(torch.device("cpu"))


# ── with a GPU ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.gpu
def test_a_thread_of_its_own_stream_waits_for_nobody_else() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    source = pool(1)
    part = PagedBytes(source)
    staged = torch.zeros(3 * part.block_bytes, dtype=torch.uint8, device=device)
    with own_stream(device):
        assert torch.cuda.current_stream() != torch.cuda.default_stream()
        part.warm()
        part.gather((7, 0, 3), staged, seed=SEED)
        part.scatter((7, 0, 3), staged, SIZE, 0, 0, 3 * SIZE)  # memory of this stream is allocated, kernels are loaded
        done = torch.cuda.Event()
        with torch.cuda.stream(torch.cuda.default_stream()):
            torch.cuda._sleep(4_000_000_000)  # some two seconds
            done.record()
        found = part.gather((7, 0, 3), staged, seed=SEED)
        part.scatter((7, 0, 3), staged, SIZE, 0, 0, 3 * SIZE)
        assert not done.query(), "a copy waited for the default stream"
        assert found == digest(staged, SEED)
    assert torch.equal(source, pool(1))
