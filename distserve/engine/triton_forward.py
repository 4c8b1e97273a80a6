"""The forward pass in Triton's kernels over block tables, decode steps as CUDA graphs: what a GPU runs.

Owns that choice and the log lines that say what was chosen. On a CPU the same path runs in Triton's interpreter
(TRITON_INTERPRET=1 and kernels "triton"), for tests: slow, and step by step the same launches.

Never run on a GPU so far: the kernels are tested in the interpreter and compile for sm_80 and sm_90; what is recorded
is tested by running it, the recording itself is not. Both forward passes here take followers' ids on the device
(``chosen``), so that ``device_steps`` may launch a step while the one before it runs.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from distserve.core.types import StepPlan
from distserve.engine.chosen import ChosenIds
from distserve.engine.config import EngineConfig
from distserve.engine.forward import Forward, stoppable
from distserve.engine.graphs import CudaCapture, GraphedForward
from distserve.engine.paged_inputs import PagedInputs
from distserve.engine.pool import KvPool
from distserve.engine.sampler import Draw
from distserve.engine.stopping import StepGivenUp, StopSign
from distserve.models.errors import ModelError
from distserve.models.registry import Model
from distserve_kernels.backend import TritonUnavailable, triton_serves
from distserve_kernels.ops import Ops, ops_for
from distserve_kernels.streams import settle

log = logging.getLogger(__name__)

TRIAL_PROMPTS = (256, 2048)
"""Prompts that prefill kernels are tuned on before the first request: one of each case they are tuned for."""


class PagedForward:
    """A model layer by layer over block tables; between two layers the step may be given up."""

    def __init__(self, model: Model, pool: KvPool, length: int, sign: StopSign | None = None) -> None:
        """``length``: of the longest sequence served."""
        self._length = length
        self.model, self._pool = model, pool
        self._sign = sign if sign is not None else StopSign()
        self.chosen = ChosenIds()
        self._inputs = PagedInputs(pool.block_size, length, pool.tensor.device, self.chosen)

    def __call__(self, plan: StepPlan) -> Tensor | None:
        try:
            return self.model(self._inputs(plan), stoppable(self._pool, self._sign, plan.number))
        except StepGivenUp:
            settle(self._pool.tensor.device)
            raise

    def warm(self) -> None:
        """Let every kernel of a prompt be compiled and tuned now, before a request waits for it."""
        for tokens in sorted({min(n, self._length) for n in TRIAL_PROMPTS}):
            self.model(self._inputs.trial(tokens, self._pool.blocks), self._pool.layers)


def ops_of(config: EngineConfig) -> Ops:
    """The operations that a model of this engine is built with. Raises ModelError as ``triton_forward`` does."""
    kernels = config.kernels if _uses_triton(config) else "torch"
    return ops_for(torch.device(config.device), kernels)


def draw_of(config: EngineConfig, vocab: int) -> Draw | None:
    """What draws tokens on the device, all rows at once; None: torch does, on any device. Compiled when it returns."""
    if not _uses_triton(config):
        return None
    draw, device = ops_of(config).paged.sample, torch.device(config.device)
    if device.type == "cuda":
        one, counts = torch.ones(1, dtype=torch.float64, device=device), torch.ones(1, dtype=torch.int32, device=device)
        draw(torch.zeros(1, vocab, device=device), one, counts, one, one, one)
    return draw


def triton_forward(
    config: EngineConfig, model: Model, pool: KvPool, length: int, in_torch: Forward, sign: StopSign
) -> Forward | None:
    """The forward pass in Triton, or None where others are to serve.

    ``in_torch`` takes over where Triton's kernels do not fit the model, which the log says. Raises ModelError when
    Triton was asked for and is not there, or does not fit.
    """
    if not _uses_triton(config):
        return None
    if not _fits(config, pool):
        return in_torch
    device = pool.tensor.device
    paged = PagedForward(model, pool, length, sign)
    if device.type != "cuda":
        log.info("Triton kernels, interpreted on the CPU: for tests, far slower than any other")
        return paged
    with torch.inference_mode():
        paged.warm()
        if config.cuda_graphs == "off":
            log.info("Triton kernels on %s, without CUDA graphs, as asked", device)
            return paged
        return _graphed(model, pool, paged, length)


def paged_inputs(config: EngineConfig, pool: KvPool, length: int) -> PagedInputs | None:
    """For a rank that runs a model's share itself: what builds steps for Triton's kernels, or None where steps gather.

    Its steps are not recorded: a rank's own collectives would have to be. Raises ModelError as ``triton_forward``.
    """
    if not _uses_triton(config) or not _fits(config, pool):
        return None
    log.info("Triton kernels on %s, without CUDA graphs, for the model is cut over ranks", pool.tensor.device)
    return PagedInputs(pool.block_size, length, pool.tensor.device)


def _graphed(model: Model, pool: KvPool, paged: PagedForward, length: int) -> Forward:
    graphed = GraphedForward(model, pool, paged, length, CudaCapture(), chosen=paged.chosen)
    try:
        graphed.record_all()
    except RuntimeError as why:  # of CUDA: out of memory, or a library that cannot be recorded here
        log.warning("Triton kernels without CUDA graphs, which cannot be recorded here: %s", why)
        return paged
    log.info("Triton kernels on %s; decode steps as CUDA graphs of %s rows", pool.tensor.device, graphed.sizes)
    return graphed


def _uses_triton(config: EngineConfig) -> bool:
    try:
        return triton_serves(torch.device(config.device), config.kernels)
    except TritonUnavailable as why:
        raise ModelError(f"Triton kernels were asked for, but {why}; say --kernels auto to do without") from why


def _fits(config: EngineConfig, pool: KvPool) -> bool:
    """Whether Triton's attention serves this engine; says so where it does not."""
    why = _why_not(config, pool)
    if why and config.kernels == "triton":
        raise ModelError(f"Triton kernels were asked for, but {why}; say --kernels auto to do without")
    if why:
        log.info("torch kernels for attention: %s", why)
    return not why


def _why_not(config: EngineConfig, pool: KvPool) -> str:
    """Why Triton's attention does not fit this engine; empty: it does."""
    if config.kv_torch_dtype != config.torch_dtype:
        return f"Triton's keep KV in the model's {config.dtype}, not in {config.kv_name}"
    if pool.tensor.shape[5] % 2:
        return f"Triton's need an even head dimension, not {pool.tensor.shape[5]}"
    return ""
