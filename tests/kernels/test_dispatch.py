"""Which kernels serve a device, and that it is said."""

from __future__ import annotations

import importlib.util
import logging

import pytest
import torch

from distserve_kernels import backend
from distserve_kernels.ops import REFERENCE, ops_for
from distserve_kernels.paged_ops import PAGED_REFERENCE, paged_ops_for

GPU = torch.device("cuda")  # named, never touched
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(autouse=True)
def forget() -> None:
    backend._triton_is_here.cache_clear()


def test_a_cpu_is_served_by_torch(caplog: pytest.LogCaptureFixture) -> None:
    assert ops_for(torch.device("cpu")) is REFERENCE
    assert paged_ops_for(torch.device("cpu")) is PAGED_REFERENCE
    assert not caplog.records


@needs_triton
def test_a_gpu_is_served_by_triton_and_the_log_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert paged_ops_for(GPU).decode_attention.__module__ == "distserve_kernels.triton.decode"
        assert ops_for(GPU).silu_mul.__module__ == "distserve_kernels.triton.gate"
        assert ops_for(GPU).kv_write is REFERENCE.kv_write
        assert ops_for(GPU).paged == paged_ops_for(GPU)
    assert [r.getMessage() for r in caplog.records] == ["kernels on cuda: Triton"]


def test_without_triton_a_gpu_is_served_by_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    assert paged_ops_for(GPU) is PAGED_REFERENCE and ops_for(GPU) is REFERENCE
    assert "Triton is not installed" in caplog.text


def test_other_kernels_that_were_asked_for_are_not_triton() -> None:
    assert ops_for(GPU, "torch") is ops_for(GPU, "native") is REFERENCE


@needs_triton
def test_triton_that_was_asked_for_serves_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(backend, "_interpreted", lambda: True)
    assert backend.triton_serves(GPU, "triton") and backend.triton_serves(cpu, "triton")
    monkeypatch.setattr(backend, "_interpreted", lambda: False)
    assert backend.triton_serves(GPU, "triton")
    with pytest.raises(backend.TritonUnavailable, match="not on cpu"):
        backend.triton_serves(cpu, "triton")
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(backend.TritonUnavailable, match="not installed"):
        backend.triton_serves(GPU, "triton")
