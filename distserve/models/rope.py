"""Rotary frequencies as configurations describe them: plain, linear, dynamic within its original length, llama3.

Reads both spellings: ``rope_parameters`` (transformers 5) and ``rope_theta`` with ``rope_scaling`` (before).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distserve.models.errors import UnsupportedModel


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary settings. ``kind`` is "default", "linear", "dynamic" or "llama3"; the rest is for kinds that need it."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 0


def parse_rope(raw: Mapping[str, Any], max_positions: int) -> Rope:
    """The rotary settings of a configuration. Raises UnsupportedModel for kinds we do not have."""
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = float(scaling.get("rope_theta", raw.get("rope_theta", 10000.0)))
    kind = str(scaling.get("rope_type", scaling.get("type", "default")))
    if kind not in ("default", "linear", "dynamic", "llama3"):
        raise UnsupportedModel(f'rope type "{kind}" is not supported; supported are default, linear, dynamic, llama3')
    if float(scaling.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))) != 1.0:
        raise UnsupportedModel("partial rotary embeddings (partial_rotary_factor) are not supported")
    return Rope(
        theta=theta,
        kind=kind,
        factor=float(scaling.get("factor", 1.0)),
        low_freq_factor=float(scaling.get("low_freq_factor", 1.0)),
        high_freq_factor=float(scaling.get("high_freq_factor", 4.0)),
        original_length=int(scaling.get("original_max_position_embeddings", max_positions)),
    )


def inverse_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """[head_dim / 2] float32. A dynamic rope equals the plain one up to the length it was trained for."""
    plain = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        return _llama3(plain, rope)
    return plain


def _llama3(plain: Tensor, rope: Rope) -> Tensor:
    """Long waves are stretched by ``factor``, short ones kept, those between blended (Llama 3.1 model card)."""
    wavelength = 2 * math.pi / plain
    low = rope.original_length / rope.low_freq_factor
    high = rope.original_length / rope.high_freq_factor
    smooth = (rope.original_length / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - smooth) * plain / rope.factor + smooth * plain
    stretched = torch.where(wavelength > low, plain / rope.factor, plain)
    return torch.where((wavelength <= low) & (wavelength >= high), blended, stretched)
