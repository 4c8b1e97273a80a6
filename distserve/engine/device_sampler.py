"""Chooses a step's tokens on the device and leaves them there: the host neither waits nor sees them yet.

Serves rows of which nothing but the id is asked: no logprobs, nothing banned, no bias, no penalties. What it chooses is
what ``sampler.choose_tokens`` chooses for the same rows with the same ``draw``.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from distserve.core.types import StepItem
from distserve.engine.sampler import Draw, uniform
from distserve.engine.upload import Upload
from distserve_kernels.batch_sampling import without_nan


class DeviceSampler:
    """One thread uses it, on one stream."""

    def __init__(self, device: torch.device, draw: Draw | None) -> None:
        self._draw = draw
        self._upload = Upload(device)

    def __call__(self, logits: Tensor, items: Sequence[StepItem]) -> Tensor | None:
        """Ids [items] int64 of ``logits`` [items, vocab], to be there in the order of the stream.

        None: some row asks for more, or draws where nothing can; ``choose_tokens`` is to serve the step.
        """
        if not all(_asks_only_its_id(item) for item in items):
            return None
        asked = [item.sampling for item in items]
        if all(s.temperature == 0 for s in asked):
            return without_nan(logits).max(-1).indices
        if self._draw is None:
            return None
        columns = self._upload.send(
            array("d", (s.temperature for s in asked)),
            array("i", (s.top_k for s in asked)),
            array("d", (s.top_p for s in asked)),
            array("d", (s.min_p for s in asked)),
            array("d", (uniform(item.sampling.seed, item.output_index) for item in items)),
        )
        return self._draw(without_nan(logits.float()), *columns)


def _asks_only_its_id(item: StepItem) -> bool:
    s = item.sampling
    return s.logprobs < 0 and not (s.logit_bias or item.banned or s.needs_history)
