"""What chooses tokens, by name: every test of the rules runs over all of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import pytest
from torch import Tensor

from distserve.core.types import Sampling, StepItem, Token
from distserve.engine.native_sampler import NativeChooser
from distserve.engine.sampler import choose_tokens
from distserve.models.catalog import default_cache
from distserve_kernels.cores import Threads
from distserve_kernels.native.library import NativeUnavailable, load
from distserve_kernels.native.sampler import RowSampler

CHOOSERS = ("torch", "native")


@functools.cache
def native(vocab: int, threads: int = 2) -> NativeChooser:
    try:
        return NativeChooser(RowSampler(load(default_cache() / "native"), vocab, Threads(threads)))
    except NativeUnavailable as why:
        pytest.skip(f"native kernels cannot be built: {why}")


def choose(kind: str, logits: Tensor, items: Sequence[StepItem]) -> list[Token]:
    return choose_tokens(logits, items) if kind == "torch" else native(logits.shape[1])(logits, items)


def ids(kind: str, logits: Tensor, items: Sequence[StepItem]) -> list[int]:
    return [token.id for token in choose(kind, logits, items)]


def item(sampling: Sampling, index: int = 0, **fields: tuple[int, ...]) -> StepItem:
    return StepItem("r", 0, (1,), (0,), True, index, sampling, **fields)
