"""Building the native kernels: once, whole, by one of many; on processors of any kind."""

from __future__ import annotations

import multiprocessing
import os
import platform
import threading
from array import array
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from distserve_kernels.cores import Threads, usable_cores
from distserve_kernels.native import library
from distserve_kernels.native.decoder import Affine, Decoder, DecoderShape, Ends, LayerWeights, Norm
from distserve_kernels.native.library import NativeUnavailable, load
from distserve_kernels.native.sampler import Asks, RowSampler, pack_ask

try:
    library.find_compiler()
except NativeUnavailable as why:
    pytest.skip(f"native kernels cannot be built: {why}", allow_module_level=True)

QUICK = ("-O0", "-std=c++20", "-fPIC", "-shared", "-pthread", "-Wno-psabi")
X86 = platform.machine() == "x86_64"


def _load(cache: str) -> tuple[list[str], str]:
    said: list[str] = []
    found = load(Path(cache), said.append, (*QUICK, "-march=native"))
    return said, found.ds_describe().decode()


def test_of_two_processes_one_compiles(tmp_path):
    """Both get a whole library; nothing half made is left; a third finds it there."""
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as processes:
        results = list(processes.map(_load, [str(tmp_path)] * 2))
    assert sum(len(said) for said, _ in results) == 1
    assert results[0][1] == results[1][1]
    assert [p.suffix for p in sorted(tmp_path.iterdir())] == [".so", ".lock"]
    assert _load(str(tmp_path))[0] == []


def test_what_a_killed_build_left_is_cleared(tmp_path):
    load(tmp_path, flags=(*QUICK, "-march=native"))
    (path,) = tmp_path.glob("*.so")
    path.rename(tmp_path / f".{path.name}.dead")
    load(tmp_path, flags=(*QUICK, "-march=native"))
    assert [p.suffix for p in sorted(tmp_path.iterdir())] == [".so", ".lock"]


def test_a_file_that_is_no_library_is_refused(tmp_path):
    path = tmp_path / f"distserve-{library._digest(library.find_compiler(), QUICK)}.so"
    path.write_bytes(b"not a library")
    with pytest.raises(NativeUnavailable, match="cannot be made or loaded"):
        load(tmp_path, flags=QUICK)


def test_flags_change_the_name(tmp_path):
    compiler = library.find_compiler()
    assert library._digest(compiler, QUICK) != library._digest(compiler, (*QUICK, "-O1"))


@pytest.mark.skipif(not X86, reason="the flags are for x86-64")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("level", "name"), [("x86-64-v2", "portable"), ("x86-64-v3", "AVX2")])
def test_lesser_processors_compute_the_same(level, name, dtype, tmp_path_factory):
    """The code for processors without AVX-512, run on whatever this is: within rounding of the native build."""
    cache = Path(tmp_path_factory.getbasetemp()) / "lesser"
    lesser = load(cache, flags=(*QUICK, f"-march={level}"))
    best = load(cache, flags=(*QUICK, "-march=native"))
    assert name in lesser.ds_describe().decode()
    one, other = (_logits(built, dtype) for built in (lesser, best))
    assert (one - other).abs().max() < (1e-5 if dtype == torch.float32 else 2e-2)
    assert one.abs().max() > 0.5


@pytest.mark.skipif(not X86, reason="the flags are for x86-64")
@pytest.mark.parametrize("level", ["x86-64-v2", "x86-64-v3"])
def test_lesser_processors_choose_the_same_tokens(level, tmp_path_factory):
    """Draws of every kind, and what is most likely. Points near a border are rarer than these."""
    cache = Path(tmp_path_factory.getbasetemp()) / "lesser"
    lesser = load(cache, flags=(*QUICK, f"-march={level}"))
    best = load(cache, flags=(*QUICK, "-march=native"))
    logits = 3 * torch.randn(60, 1003, generator=torch.Generator().manual_seed(3))
    logits[20:40] = (2 * logits[20:40]).round() / 2
    asked = [(0.8, 0, 0.95, 0.0), (1.0, 40, 1.0, 0.0), (1.2, 40, 0.9, 0.01), (0.7, 0, 1.0, 0.05), (0.0, 0, 1.0, 0.0)]
    history = array("q", [*range(5, 25), *range(15, 35)])
    rows = b"".join(
        pack_ask(t, top_p, min_p, 1.2, 0.1, 0.2, 77 + i, i, top_k, 3, 0, 1, 1, 20, 18, 0)
        for i, (t, top_k, top_p, min_p) in enumerate(asked * 12)
    )
    asks = Asks(rows, history, array("d", [2.5]), 3)
    one, other = (RowSampler(built, 1003, Threads(1)).choose(logits, asks) for built in (lesser, best))
    assert one.ids == other.ids and one.top_ids == other.top_ids
    assert list(one.top) == pytest.approx(list(other.top), abs=1e-5)
    assert list(one.logprobs) == pytest.approx(list(other.logprobs), abs=1e-5)


def _logits(built, dtype: torch.dtype) -> torch.Tensor:
    """Of a prompt of 70 tokens and a token after it, through a random gated network of two layers."""
    shape = DecoderShape(48, 4, 2, 16, 80, 101, 128, True, 1e-5, dtype)
    generator = torch.Generator().manual_seed(5)

    def random(*size: int) -> torch.Tensor:
        return (torch.randn(*size, generator=generator) / size[-1] ** 0.5).to(dtype)

    layers = [
        LayerWeights(
            qkv=Affine(random(128, 48), random(128)),
            out=Affine(random(48, 64)),
            up=Affine(random(160, 48), random(160)),
            down=Affine(random(48, 80)),
            norm1=Norm(torch.ones(48, dtype=dtype)),
            norm2=Norm(torch.ones(48, dtype=dtype)),
        )
        for _ in range(2)
    ]
    angles = torch.arange(128).unsqueeze(1) * 0.1 ** torch.arange(8)
    cos, sin = (torch.cat(pair, -1).to(dtype) for pair in ((angles.cos(),) * 2, (-angles.sin(), angles.sin())))
    ends = Ends(head=random(101, 48), cos=cos, sin=sin, final_norm=Norm(torch.ones(48, dtype=dtype)))
    decoder = Decoder(built, shape, layers, ends, Threads(2))
    pool = torch.zeros(40, 2, 2, 2, 4, 16, dtype=dtype)
    blocks = torch.randperm(40, generator=generator)[:18].tolist()
    tokens = torch.randint(0, 101, (71,), generator=generator).tolist()
    from_prompt = decoder.run(pool, *_arrays(tokens[:70], (0, 70, 0, 0, 18), blocks)).clone()
    return torch.cat((from_prompt, decoder.run(pool, *_arrays(tokens[70:], (0, 1, 70, 0, 18), blocks))))


def _arrays(tokens: list[int], segment: tuple[int, ...], blocks: list[int]):
    return (array("q", values) for values in (tokens, segment, blocks, [len(tokens) - 1]))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="only Linux tells where threads may run")
def test_threads_of_a_team_keep_to_a_core_each_but_for_the_caller(tmp_path):
    built = load(tmp_path, flags=(*QUICK, "-march=native"))
    core = usable_cores()[-1]

    def pinned() -> dict[int, set[int]]:
        return {int(t.name): os.sched_getaffinity(int(t.name)) for t in Path("/proc/self/task").iterdir()}

    before = pinned()
    free, kept = RowSampler(built, 4096, Threads(2)), RowSampler(built, 4096, Threads(3, (0, core, core)))
    for rows in (free, kept):  # a thread has begun when it has worked
        rows.choose(torch.zeros(64, 4096), Asks())
    fresh = [cores for thread, cores in pinned().items() if thread not in before]
    assert sorted(fresh, key=len) == [{core}, {core}, set(usable_cores())]
    assert usable_cores() == tuple(sorted(before[threading.get_native_id()]))
